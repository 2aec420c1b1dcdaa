"""Trains and scores variants of a preset, one after another, and keeps their scores and curves.

    python experiments/sweep.py --manual_dir=FLICKR8K                 prepares, then all variants, hours on two cores
    python experiments/sweep.py --only=full,plain --seeds=0,1,2       two variants with three seeds each
    python experiments/sweep.py --table                               tables and curves of the existing results

A variant with a result file, RESULTS/NAME-SEED.json, is skipped. An interrupted variant resumes. All choices are made
on the dev split.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

import numpy as np
from matplotlib.figure import Figure

from flaxcap import presets
from flaxcap.features import store
from flaxcap.inference import coco_results
from flaxcap.metrics import scorer
from flaxcap.training import checkpoints

HERE = pathlib.Path(__file__).parent
SHOWN = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "CIDEr_swapped")

# Each variant changes these fields of the preset. `plain` has a shorter first stage and no second one. The variants
# after it are compared with it. The variants `first_stage_…` are compared with `first_stage`.
PLAIN = ["train.epochs=6", "train.cider_epochs=0"]
HALF_DROPOUT = [f"train.dropout.{kind}" for kind in ("image=0.15", "embedding=0.15", "output=0.25", "recurrent=0.1")]
DROPOUTS = ("image", "embedding", "output", "recurrent")
VARIANTS = {
    "full": [],
    "first_stage": ["train.cider_epochs=0"],
    "first_stage_half_dropout": ["train.cider_epochs=0", *HALF_DROPOUT],
    "first_stage_double_rate": ["train.cider_epochs=0", "train.learning_rate=4e-3"],
    "plain": PLAIN,
    "mixed10": [*PLAIN, "encoder.block=mixed10"],
    "no_dropout": [*PLAIN, *(f"train.dropout.{kind}=0" for kind in DROPOUTS)],
    **{f"no_{kind}_dropout": [*PLAIN, f"train.dropout.{kind}=0"] for kind in DROPOUTS},
    "half_dropout": [*PLAIN, *HALF_DROPOUT],
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
    "half_rate": [*PLAIN, "train.learning_rate=1e-3"],
    "large_vocabulary": [*PLAIN, "data.vocab_size=5000"],
}


def flaxcap(*args: str) -> None:
    """Runs a command of flaxcap, which must succeed."""
    subprocess.run([sys.executable, "-m", "flaxcap", *args], check=True)


def training_seconds(workdir: pathlib.Path) -> float:
    """Returns the seconds of training, without compilation, validation and checkpoints."""
    newest = checkpoints.steps(workdir / "checkpoints")[-1]
    return json.loads((newest / "progress" / "metadata").read_text())["seconds"]


def drawn(workdir: pathlib.Path, data_dir: str, count: int = 20) -> list[dict]:
    """Returns captions of random images of the dev split, with their CIDEr-D. The images are the same for all runs."""
    split = store.Store.finished(data_dir, presets.load(str(workdir / "config.json"))).split("val")
    rows = [split.rows[n] for n in split.present()]
    _, texts = coco_results.read(workdir / "val" / "predictions.json", rows)
    cider_I = scorer.Scorer([row.captions for row in rows]).cider(texts)
    chosen = np.random.default_rng(0).choice(len(rows), count, replace=False)
    return [{"image": rows[n].filename, "caption": texts[n], "CIDEr": round(float(cider_I[n]), 3)} for n in chosen]


def run(name: str, seed: int, a: argparse.Namespace) -> None:
    """Trains and scores a variant, unless it has a result.

    Args:
      name: a key of `VARIANTS`.
      seed: of the run.
      a: the command line.
    """
    file, workdir = a.results / f"{name}-{seed}.json", a.runs / f"{name}-{seed}"
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
    found = json.loads((workdir / "val" / "scores.json").read_text())
    seconds = round(training_seconds(workdir), 1)
    result = {"variant": name, "seed": seed, "fields": fields, "training_seconds": seconds, **found}
    result |= {"curve": curve, "captions": drawn(workdir, a.data_dir)}
    a.results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def read(results: pathlib.Path) -> dict[str, list[dict]]:
    """Returns the results of each variant, one for each seed, in the order of `VARIANTS`."""
    found = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    by_name = {name: [r for r in found if r["variant"] == name] for name in VARIANTS}
    return {name: runs for name, runs in by_name.items() if runs}


def table(found: dict[str, list[dict]]) -> str:
    """Returns a table in Markdown with means, and standard deviations of variants with several seeds."""
    lines = ["| variant | seeds | " + " | ".join(SHOWN) + " | minutes of training |", "|---" * (len(SHOWN) + 3) + "|"]
    for name, runs in found.items():
        cells = []
        for score in SHOWN:
            values = [100 * r["scores"][score] for r in runs if score in r["scores"]]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "–")
        minutes = statistics.mean(r["training_seconds"] for r in runs) / 60
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {minutes:.0f} |")
    return "\n".join(lines)


def captions(result: dict) -> str:
    """Returns a table in Markdown with the random captions of a result, best first."""
    found = sorted(result["captions"], key=lambda c: -c["CIDEr"])
    lines = ["| image | caption | CIDEr |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {c['image']} | {c['caption']} | {100 * c['CIDEr']:.0f} |" for c in found)])


def curves(found: dict[str, list[dict]], file: pathlib.Path) -> None:
    """Plots the CIDEr on the dev split after each epoch.

    Args:
      found: results of each variant. `full` is black with a line for each seed. The others show their first seed.
      file: the PNG to write.
    """
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="CIDEr on dev")
    for index, (name, runs) in enumerate(found.items()):
        # Matplotlib has ten colours, so each further ten variants have another line style.
        color, width, style = (
            ("black", 2, "-") if name == "full" else (f"C{index % 10}", 1, ("-", "--", ":")[index // 10 % 3])
        )
        for number, result in enumerate(runs if name == "full" else runs[:1]):
            points = [(line["epoch"], 100 * line["val/cider"]) for line in result["curve"]]
            axes.plot(*zip(*points, strict=True), label="" if number else name, color=color, lw=width, ls=style)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(HERE / "flickr8k.py"))
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/flickr8k"))
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results" / "flickr8k")
    parser.add_argument("--manual_dir", default="", help="Flickr8k's files; not needed if the features are prepared")
    parser.add_argument("--encoder_weights", default="", help="instead of the published ones")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, separated by commas")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--field", dest="fields", action="append", default=[], help="FIELD=VALUE, for every variant")
    parser.add_argument("--table", action="store_true", help="only the tables and the curves")
    a = parser.parse_args()
    unknown = set(a.only.split(",")) - set(VARIANTS)
    if unknown:
        parser.error(f"--only={a.only}: expected variants among {', '.join(VARIANTS)}")
    if not a.table:
        for seed in map(int, a.seeds.split(",")):
            for name in a.only.split(","):
                run(name, seed, a)
    found = read(a.results)
    print(table(found))
    if "full" in found:
        print(f"\n{captions(found['full'][0])}")
    if found:
        curves(found, a.results / "curves.png")


if __name__ == "__main__":
    main()
