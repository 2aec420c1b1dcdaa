"""Trains and scores variants of a preset, one after the other, and keeps their scores and curves.

    python experiments/sweep.py --manual_dir=FLICKR8K                 prepares, then all variants, hours on two cores
    python experiments/sweep.py --only=full,plain --seeds=0,1,2       those alone, each with three seeds
    python experiments/sweep.py --table                               the table of what is there

A variant that has its result file is left alone, and one that was interrupted goes on: start it again at any time. The
results are experiments/results/flickr8k/NAME-SEED.json; all choices are made on the dev split.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

from flaxcap import checkpoint

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "flickr8k"
SHOWN = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "CIDEr_swapped")

# Each differs from the preset in these fields alone. `plain` is the preset with a shorter first stage and without the
# second: what follows it is compared with it.
PLAIN = ["train.epochs=6", "train.cider_epochs=0"]
VARIANTS = {
    "full": [],
    "first_stage": ["train.cider_epochs=0"],
    "plain": PLAIN,
    "mixed10": [*PLAIN, "encoder.block=mixed10"],
    "no_dropout": [*PLAIN, *(f"train.dropout.{kind}=0" for kind in ("image", "embedding", "output", "recurrent"))],
    "half_dropout": [
        *PLAIN,
        *(f"train.dropout.{kind}" for kind in ("image=0.15", "embedding=0.15", "output=0.25", "recurrent=0.1")),
    ],
    "no_label_smoothing": [*PLAIN, "train.label_smoothing=0"],
    "no_ema": [*PLAIN, "train.ema=0"],
    "shallow_output": [*PLAIN, "model.output=state"],
    "zero_state": [*PLAIN, "model.initial_state=zeros"],
    "image_256": [*PLAIN, "model.image_dim=256"],
    "lstm": [*PLAIN, "model.cell=lstm"],
    "gate": [*PLAIN, "model.attention_gate=true"],
    "doubly_stochastic": [*PLAIN, "train.doubly_stochastic=1"],
    "scheduled_sampling": [*PLAIN, "train.scheduled_sampling=0.25"],
    "weight_decay": [*PLAIN, "train.weight_decay=0.05"],
    "attention_dropout": [*PLAIN, "train.dropout.attention=0.2"],
    "hard_attention": [*PLAIN, "model.attention=hard"],
    "tied": [*PLAIN, "model.tied=true", "model.head_dim=256"],
    "constant_rate": [*PLAIN, "train.schedule=constant"],
    "plateau": [*PLAIN, "train.schedule=plateau"],
    "long": ["train.epochs=20", "train.cider_epochs=0"],
    "double_rate": [*PLAIN, "train.learning_rate=2e-3"],
    "large_vocabulary": [*PLAIN, "data.vocab_size=5000"],
}


def flaxcap(*args: str) -> None:
    """Runs a command to its end."""
    subprocess.run([sys.executable, "-c", "from flaxcap.main import run; run()", *args], check=True)


def trained(workdir: pathlib.Path) -> float:
    """Seconds of training alone, all that went on after an interruption together."""
    newest = checkpoint.steps(workdir / "checkpoints")[-1]
    return json.loads((newest / "progress" / "metadata").read_text())["seconds"]


def run(name: str, seed: int, a: argparse.Namespace) -> None:
    """Trains and scores a variant, unless it has a result."""
    file, workdir = RESULTS / f"{name}-{seed}.json", a.runs / f"{name}-{seed}"
    if file.exists():
        return
    print(f"{name}, seed {seed}", flush=True)
    fields = [*a.fields, *VARIANTS[name], f"seed={seed}"]
    preset = [f"--config={a.config}", *(f"--config.{field}" for field in fields), f"--data_dir={a.data_dir}"]
    if a.manual_dir:
        more = [f"--encoder_weights={a.encoder_weights}"] if a.encoder_weights else []
        flaxcap("prepare", *preset, f"--manual_dir={a.manual_dir}", *more)
    flaxcap("train", *preset, f"--workdir={workdir}")
    flaxcap("evaluate", f"--workdir={workdir}", f"--data_dir={a.data_dir}", "--split=val")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {k: v for k, v in line.items() if k == "epoch" or k.startswith("val/")} for line in lines if "epoch" in line
    ]
    scores = json.loads((workdir / "val" / "scores.json").read_text())
    seconds = round(trained(workdir), 1)
    found = {"variant": name, "seed": seed, "fields": fields, "training_seconds": seconds, **scores, "curve": curve}
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def table() -> str:
    """Of all results, as Markdown: a variant's mean, and its standard deviation where it has several seeds."""
    found: dict[str, list[dict]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        found.setdefault(result["variant"], []).append(result)
    lines = ["| variant | seeds | " + " | ".join(SHOWN) + " | minutes of training |", "|---" * (len(SHOWN) + 3) + "|"]
    for name in (name for name in VARIANTS if name in found):
        runs = found[name]
        cells = []
        for score in SHOWN:
            values = [100 * r["scores"][score] for r in runs if score in r["scores"]]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "–")
        minutes = statistics.mean(r["training_seconds"] for r in runs) / 60
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {minutes:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(HERE / "flickr8k.py"))
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/flickr8k"))
    parser.add_argument("--manual_dir", default="", help="Flickr8k's files; without, features are there already")
    parser.add_argument("--encoder_weights", default="", help="in the place of the published ones")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, separated by commas")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--field", dest="fields", action="append", default=[], help="FIELD=VALUE, of every variant")
    parser.add_argument("--table", action="store_true", help="only print the table")
    a = parser.parse_args()
    unknown = set(a.only.split(",")) - set(VARIANTS)
    if unknown:
        parser.error(f"--only={a.only}: expected variants among {', '.join(VARIANTS)}")
    if not a.table:
        for seed in map(int, a.seeds.split(",")):
            for name in a.only.split(","):
                run(name, seed, a)
    print(table())


if __name__ == "__main__":
    main()
