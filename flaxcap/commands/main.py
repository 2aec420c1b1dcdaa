"""The command line: flags in, calls out. Nothing here is about captioning."""

import errno
import io
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

import flaxcap
from flaxcap import config as config_lib
from flaxcap import presets
from flaxcap.commands import flags as flags_lib
from flaxcap.errors import UserError, plain
from flaxcap.runtime import huge_pages

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_WRITTEN_TO = ("workdir", "data_dir", "out", "out_dir")
FAILED, PREEMPTED, INTERRUPTED = 1, 75, 130  # 75: EX_TEMPFAIL, "saved; run me again"


def run() -> None:
    """The `flaxcap` program."""
    if sys.argv[1:2] in (["train"], ["bench"]):
        huge_pages.use()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know a caption's letters
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as `head` goes; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = FAILED
    except KeyboardInterrupt:
        print("flaxcap: interrupted; the same command goes on with what was saved", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)


def main(args: Sequence[str]) -> int:
    """Runs a command line (without the program's name) and returns its exit status."""
    if args and args[0] == "help":
        args = [*args[1:2], "--help"]
    if not args or args[0] in ("--help", "-h"):
        print(flags_lib.overview())
        return 0
    if args[0] == "--version":
        print(f"flaxcap {flaxcap.__version__}")
        return 0
    command, rest = args[0], list(args[1:])
    given = types.SimpleNamespace()
    try:
        if command not in flags_lib.COMMANDS:
            hint = config_lib.nearest(command, list(flags_lib.COMMANDS))
            print(f"flaxcap: unknown command {command!r} (`flaxcap --help` lists them){hint}", file=sys.stderr)
            return FAILED
        values = flags.FlagValues()
        flags_lib.define(command, values)
        if {"--help", "-h", "-help"} & set(rest):
            print(flags_lib.help_text(command, values))
            return 0
        overrides = [a for a in rest if a.startswith(("--config.", "-config."))]
        positional = values(["flaxcap", *(a for a in rest if a not in overrides)])[1:]
        given = types.SimpleNamespace(**values.flag_values_dict())
        if positional and command not in ("caption", "bench"):
            raise UserError(f"unexpected {positional[0]!r}; values are given as --flag=value")
        for name in flags_lib.NEEDED.get(command, ()):
            if not getattr(given, name):
                raise UserError(f"--{name} is missing: {values[name].help}")
        logging.set_verbosity(given.verbosity)
        if command not in ("export", "verify", "bench"):  # bench times compilations
            from flaxcap.runtime import devices

            devices.keep_compiled(given.compilation_cache_dir)
            if getattr(given, "distributed", None):
                devices.join(given.distributed)
        config = _preset(command, given, overrides)
        work = positional[0] if command == "bench" and positional else command
        if work in ("train", "input") and not getattr(given, "distributed", None):
            from flaxcap.runtime import devices
            from flaxcap.training import step

            devices.share_cores(config.train.batch_images, step.CPU_IMAGES)
        return _RUN[command](given, config, positional)
    except (UserError, flags.Error) as e:
        print("\n".join(map(plain, f"flaxcap {command}: {e}".split("\n"))), file=sys.stderr)
    except OSError as e:
        # The errors of a write to an open file name none.
        places = [f"--{name}={place}" for name in _WRITTEN_TO if (place := getattr(given, name, None))]
        if e.filename is None and e.errno not in _DISK:
            raise
        print(plain(f"flaxcap {command}: {e.filename or ' or '.join(places)}: {e.strerror}"), file=sys.stderr)
    return FAILED


def _preset(command: str, given: types.SimpleNamespace, overrides: list[str]) -> config_lib.Config:
    """The preset of --config, else the one saved with the run or export, with `--config.FIELD=VALUE` applied."""
    file = given.config
    if given.config:
        config = presets.load(given.config)
    elif command == "verify":  # of a run alone: no preset is needed
        config = config_lib.Config()
    elif saved := getattr(given, "model", None) or getattr(given, "workdir", None):
        from flaxcap.inference import captioner as captioner_lib

        directory = saved if isinstance(saved, str) else saved[0]
        file = os.path.join(directory, "config.json")
        config = captioner_lib.read_config(directory)
    elif command == "bench":
        config = config_lib.Config()
    else:
        raise UserError(
            "which data set? give --config=PRESET"
            if getattr(given, "predictions", None)
            else "which model? give --workdir=RUN or --model=EXPORT"
        )
    known = config_lib.leaves(config)
    for override in overrides:
        name, equals, _ = override.lstrip("-").removeprefix("config.").partition("=")
        if name not in known:
            within = [field for field in known if field.startswith(f"{name}.")]
            hint = f"; it is a group, as in {within[0]!r}" if within else config_lib.nearest(name, list(known))
            raise config_lib.ConfigError(
                f"--config.{name}: no such field (`flaxcap {command} --help` lists them){hint}"
            )
        if not equals and not isinstance(known[name][0], bool):
            raise config_lib.ConfigError(f"--config.{name}: give it as --config.{name}=VALUE")
    overridden = flags.FlagValues()
    argv = ["flaxcap", *overrides]
    holder = config_flags.DEFINE_config_dataclass("config", config, flag_values=overridden, sys_argv=argv)
    overridden(["flaxcap"])
    for override in overrides:
        try:
            overridden(["flaxcap", override])
        except flags.Error as e:
            kind = type(known[override.lstrip("-").removeprefix("config.").partition("=")[0]][0])
            raise config_lib.ConfigError(f"--{override.lstrip('-')}: expected {_TYPES[kind]}") from e
    try:
        return config_lib.check(holder.value)
    except config_lib.ConfigError as e:
        here = any(str(e).startswith(f"--{override.lstrip('-').partition('=')[0]}") for override in overrides)
        raise e if here or not file else config_lib.ConfigError(f"{file}: {e}") from e


_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _prepare(given: types.SimpleNamespace, config: config_lib.Config, _: list[str]) -> int:
    from flaxcap.commands import prepare

    prepare.prepare(
        config,
        given.data_dir,
        manual_dir=given.manual_dir,
        npy_dir=given.npy_dir,
        encoder_weights=given.encoder_weights,
        num_workers=given.num_workers,
        max_bad_fraction=given.max_bad_fraction,
    )
    return 0


def _train(given: types.SimpleNamespace, config: config_lib.Config, _: list[str]) -> int:
    from flaxcap.commands import train
    from flaxcap.training import trainer

    try:
        train.train(
            config,
            given.workdir,
            given.data_dir,
            resume=given.resume,
            init_from=given.init_from,
            profile_dir=given.profile_dir,
            max_bad_steps=given.max_bad_steps,
        )
    except trainer.Preempted as e:
        print(f"flaxcap train: {e}")
        return PREEMPTED
    except trainer.LostError as e:
        print(f"flaxcap train: {e}", file=sys.stderr, flush=True)
        os._exit(FAILED)  # as any other end would wait for the process that has gone
    return 0


def _evaluate(given: types.SimpleNamespace, config: config_lib.Config, _: list[str]) -> int:
    from flaxcap.commands import evaluate

    place = given.data_dir, given.split
    if given.predictions:
        if given.workdir or given.model:
            raise UserError("--predictions is a model's captions already: give it without --workdir and --model")
        out_dir = given.out_dir or os.path.join("evaluation", given.split)
        report = evaluate.evaluate_file(given.predictions, config, *place, out_dir, manual_dir=given.manual_dir)
    else:
        out_dir = given.out_dir or os.path.join(given.workdir[0] if given.workdir else "evaluation", given.split)
        report = evaluate.evaluate(
            _captioner(given, config), *place, out_dir, manual_dir=given.manual_dir, seed=given.seed
        )
    width = max(map(len, report.scores))
    for name, value in report.scores.items():
        print(f"{name:{width}}  {value:.4f}")
    for name, reason in report.missing.items():
        print(f"{name:{width}}  none: {reason}")
    print(f"{out_dir}/predictions.json, {out_dir}/scores.json")
    return 0


def _caption(given: types.SimpleNamespace, config: config_lib.Config, sources: list[str]) -> int:
    from flaxcap.commands import caption

    if bool(sources) == bool(given.split):
        raise UserError("name pictures to caption (files, directories, addresses), or a --split")
    captioner = _captioner(given, config)
    if sources:
        pictures = caption.from_sources(sources, private_urls=given.allow_private_urls)
    else:
        pictures = caption.from_split(captioner, given.data_dir, given.split, given.num_images)
    failed = 0
    plot_dir = given.out_dir if given.plot else None
    for found in caption.caption(captioner, pictures, plot_dir=plot_dir, seed=given.seed):
        if found.reason:
            failed += 1
            reason = found.reason.removeprefix(f"{found.name}: ")
            print(f"{plain(found.name)}: {plain(reason)}", file=sys.stderr)
            continue
        print(f"{plain(found.name)}: {plain(found.caption)}  (log-probability {found.log_prob:.2f})")
        if found.plot:
            print(f"  {found.plot}")
    return FAILED if failed else 0


def _export(given: types.SimpleNamespace, config: config_lib.Config, _: list[str]) -> int:
    from flaxcap.inference import captioner as captioner_lib

    captioner_lib.write(_captioner(given, config), given.out)
    print(f"exported to {given.out}")
    return 0


def _verify(given: types.SimpleNamespace, config: config_lib.Config, _: list[str]) -> int:
    from flaxcap.commands import verify
    from flaxcap.features import store

    if not given.workdir and not given.config:
        raise UserError("verify what? give --workdir=RUN, or --config and --data_dir of a store, or both")
    store_dir = store.path_for(given.data_dir, config) if given.config else None
    report = verify.verify(workdir=given.workdir or None, store_dir=store_dir)
    for line in report.lines():
        print(line)
    return FAILED if report.wrong else 0


def _bench(given: types.SimpleNamespace, config: config_lib.Config, what: list[str]) -> int:
    from flaxcap.bench import runner

    if len(what) != 1:
        raise UserError(f"bench what? expected one of {', '.join(runner.WORKS)}; found {' '.join(what) or 'nothing'}")
    runner.bench(
        what[0],
        config,
        images=given.images,
        steps=given.steps,
        warmup=given.warmup,
        repeats=given.repeats,
        workers=given.workers,
        against=given.against,
        out=given.out,
    )
    return 0


def _captioner(given: types.SimpleNamespace, config: config_lib.Config) -> Any:
    """The model of --model or --workdir; of its preset, what does not make the model may be overridden."""
    from flaxcap.inference import captioner as captioner_lib

    workdirs = [given.workdir] if isinstance(given.workdir, str) else given.workdir
    captioner = captioner_lib.load_all(
        workdirs=workdirs, model_dirs=getattr(given, "model", []), data_dir=given.data_dir
    )
    changed = presets.difference(captioner.config, config, _MODEL)
    if changed:
        raise config_lib.ConfigError(f"the model was trained otherwise: {'; '.join(changed)}")
    return captioner._replace(config=config)


_MODEL = (
    *("model", "data.vocab_size", "data.max_length"),
    *("encoder.weights", "encoder.block", "encoder.image_size", "encoder.seed"),
)
_RUN: dict[str, Any] = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "caption": _caption,
    "export": _export,
    "verify": _verify,
    "bench": _bench,
}
