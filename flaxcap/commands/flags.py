"""What each command is for, its flags, and its help. JAX is not imported: help is quick."""

import dataclasses
import os
from typing import Any

from absl import flags, logging

import flaxcap
from flaxcap import config as config_lib

# Each command's purpose, and an example.
COMMANDS = {
    "prepare": (
        "Turn a data set into features, captions and a vocabulary, once.",
        "flaxcap prepare --config=experiments/shapes.py --data_dir=data",
    ),
    "train": (
        "Train a captioner on prepared features; the same command goes on where it stopped.",
        "flaxcap train --config=experiments/shapes.py --data_dir=data --workdir=runs/shapes",
    ),
    "evaluate": (
        "Score the captions that a captioner, or anyone's file, has for a split.",
        "flaxcap evaluate --workdir=runs/shapes --data_dir=data --split=test",
    ),
    "caption": (
        "Caption pictures: files, directories, http(s) addresses.",
        "flaxcap caption photo.jpg holiday/ https://example.com/cat.jpg --model=exported --plot",
    ),
    "export": (
        "Write a trained captioner to a directory that needs nothing else.",
        "flaxcap export --workdir=runs/shapes --data_dir=data --out=exported",
    ),
    "verify": (
        "Compare the files of a run, or of prepared features, with their checksums.",
        "flaxcap verify --workdir=runs/shapes --config=experiments/shapes.py --data_dir=data",
    ),
    "bench": (
        "Measure this machine: train, decode, extract, input or score; beside other programs, with --against.",
        "flaxcap bench train --config=experiments/coco.py",
    ),
}
NEEDED = {"prepare": ("config",), "train": ("config", "workdir"), "export": ("workdir", "out")}


def define(command: str, values: flags.FlagValues) -> None:
    """The flags of a command."""
    text: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("config", None, "the preset: experiments/NAME.py, or a saved config.json", **text)
    flags.DEFINE_integer("verbosity", logging.WARNING, "-1: warnings, 0: what libraries tell, 1: all", **text)
    if command == "bench":
        _define_bench(text)
        return
    flags.DEFINE_string("data_dir", "data", "where prepared data sets and features are kept", **text)
    if command not in ("export", "verify"):
        flags.DEFINE_string(
            "compilation_cache_dir", None, "where compiled programs are kept for the next run; default:"
            " $JAX_COMPILATION_CACHE_DIR, else ~/.cache/flaxcap/compiled; empty: nowhere", **text,
        )  # fmt: skip
    if command in ("train", "export", "verify"):
        flags.DEFINE_string("workdir", None, "the run: its checkpoints, metrics and plots", **text)
    if command in ("evaluate", "caption"):
        flags.DEFINE_list("workdir", [], "a run; of several, RUN,RUN, each word's probability is the mean", **text)
        flags.DEFINE_list("model", [], "an export, or several, instead of a run", **text)
        flags.DEFINE_integer("seed", 0, "seed of sampling", **text)
    if command in ("prepare", "train"):
        flags.DEFINE_string(
            "distributed", None, "several processes: auto (TPU pods, Slurm), or COORDINATOR:PORT,PROCESSES,ID", **text
        )
    if command in ("prepare", "evaluate"):
        flags.DEFINE_string("manual_dir", None, "your own files: see the data set's description", **text)
    if command == "prepare":
        flags.DEFINE_string("npy_dir", None, "import feature maps FILENAME.npy from here, compute none", **text)
        flags.DEFINE_string("encoder_weights", None, "a Keras no-top .h5, instead of downloading it", **text)
        flags.DEFINE_integer("num_workers", os.cpu_count() or 1, "threads that decode pictures", lower_bound=1, **text)
        flags.DEFINE_float(
            "max_bad_fraction", 0.05, "unreadable pictures are skipped; more than this share stop the run",
            lower_bound=0, upper_bound=1, **text,
        )  # fmt: skip
    elif command == "train":
        flags.DEFINE_boolean("resume", True, "go on with the run in --workdir, where there is one", **text)
        flags.DEFINE_string("init_from", None, "start a new run from the parameters of this run or export", **text)
        flags.DEFINE_string("profile_dir", None, "write a trace of a few steps there, for XProf", **text)
        flags.DEFINE_integer(
            "max_bad_steps", 10, "a step whose loss or gradient is not finite is skipped; so many in a row end the run",
            lower_bound=1, **text,
        )  # fmt: skip
    elif command == "evaluate":
        flags.DEFINE_string(
            "predictions", None, "score this file of captions (COCO's results format) instead of a model's", **text
        )
        flags.DEFINE_enum("split", "val", ("train", "val", "test"), "which split", **text)
        flags.DEFINE_string(
            "out_dir", None, "where predictions.json and scores.json go; default: WORKDIR/SPLIT", **text
        )
    elif command == "caption":
        flags.DEFINE_enum("split", None, ("train", "val", "test"), "caption pictures of the data set itself", **text)
        flags.DEFINE_integer("num_images", 5, "how many of --split", lower_bound=1, **text)
        flags.DEFINE_boolean("plot", False, "draw where the model looked for each word", **text)
        flags.DEFINE_string("out_dir", "captions", "where the drawings go", **text)
        flags.DEFINE_boolean(
            "allow_private_urls", False, "read addresses of this machine and of local networks too, and through the"
            " environment's proxies", **text,
        )  # fmt: skip
    elif command == "export":
        flags.DEFINE_string("out", None, "the new directory", **text)


def _define_bench(text: dict[str, Any]) -> None:
    # 32 batches of 64, each full.
    flags.DEFINE_integer("images", 2048, "made-up images", lower_bound=1, **text)
    flags.DEFINE_integer("steps", 20, "timed steps (batches) of a repetition", lower_bound=1, **text)
    flags.DEFINE_integer(
        "warmup",
        3,
        "steps before the first repetition; training: at least one of each length, or 0",
        lower_bound=0,
        **text,
    )
    flags.DEFINE_integer("repeats", 5, "repetitions", lower_bound=1, **text)
    flags.DEFINE_integer("workers", os.cpu_count() or 1, "extract: threads that decode pictures", lower_bound=1, **text)
    flags.DEFINE_multi_string(
        "against", [], "another program to run after each repetition, may be given again: a command line, PYTHON"
        " SCRIPT.py ARGUMENTS, whose last line of JSON has captions_s or images_s", **text,
    )  # fmt: skip
    flags.DEFINE_string("out", None, "a file that the line of JSON is appended to", **text)


def overview() -> str:
    lines = [
        f"flaxcap {flaxcap.__version__}: trains attention image captioners, and captions pictures with them.",
        "",
    ]
    lines += [f"  {name:9} {purpose}" for name, (purpose, _) in COMMANDS.items()]
    lines += ["", "In this order:", ""]
    lines += [f"  {example}" for _, example in COMMANDS.values()]
    return "\n".join([*lines, "", "`flaxcap COMMAND --help` tells its flags and the fields of a preset."])


def help_text(command: str, values: flags.FlagValues) -> str:
    purpose, example = COMMANDS[command]
    lines = [purpose, "", f"  {example}", "", "Flags:"]
    for name in sorted(values):
        flag = values[name]
        default = "" if flag.value in (None, []) else f" (default: {flag.value})"
        lines.append(f"  --{'[no]' if flag.boolean else ''}{name}: {flag.help}{default}")
    lines += ["", "Fields of the preset, each set by --config.FIELD=VALUE, with their defaults:"]
    return "\n".join([*lines, *_fields_help(config_lib.Config())])


def _fields_help(group: Any, prefix: str = "") -> list[str]:
    """Returns a line for each field of a preset or of a group, and then its groups with a heading each."""
    lines, groups = [], []
    for f in dataclasses.fields(group):
        value, name, rules = getattr(group, f.name), prefix + f.name, f.metadata["rules"]
        if dataclasses.is_dataclass(value):
            groups += ["", f"{name}: {rules.help}", *_fields_help(value, f"{name}.")]
        else:
            bounds = f" [{rules.bounds}]" if rules.bounds else ""
            choices = f" <{'|'.join(rules.choices)}>" if rules.choices else ""
            lines.append(f"  {name} = {value!r}: {rules.help}{bounds}{choices}")
    return lines + groups
