"""Pictures of a run: its loss, and where the model looked."""

import os
import textwrap
from typing import IO

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

matplotlib.use("Agg")

_HEAT = matplotlib.colormaps["inferno"]


def loss_plot(lines: list[dict], path: str | os.PathLike[str] | IO[bytes]) -> None:
    """A PNG of the training and validation loss (nats a token) and CIDEr by step, from the lines of `metrics.jsonl`."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (
        ("train/loss", "training", {"lw": 1, "alpha": 0.7}),
        ("val/loss", "validation", {"lw": 2, "marker": "o", "ms": 3}),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats a token")
    axes.grid(alpha=0.3)
    scores = [(line["step"], line["val/cider"]) for line in lines if "val/cider" in line]
    if scores:
        right = axes.twinx()
        right.plot(*zip(*scores, strict=True), color="tab:green", lw=2, marker="o", ms=3)
        right.set_ylabel("validation CIDEr", color="tab:green")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=110)


def attention_plot(image: Image.Image, words: list[str], alpha_TP: np.ndarray, path: str | os.PathLike[str]) -> None:
    """A PNG with the picture, and the picture once a word, in grey, with the attention over its grid laid on it.

    `alpha_TP`: a row of weights a word, P a square number. The glow is scaled to the word's largest weight, which
    stands beside the word as a share of all its attention.
    """
    count = len(words) + 1
    # As few empty cells as can be.
    columns = max(count, 3) if count < 7 else min(range(4, 8), key=lambda c: (-count % c, -c))
    rows = -(-count // columns)
    caption = textwrap.wrap(" ".join(words), 15 * columns) or ["(no word)"]
    # Inches. A very long or very wide picture keeps its aspect inside a cell that does not.
    width, height, label, gap = 2.2, 2.2 * float(np.clip(image.height / image.width, 0.3, 2)), 0.3, 0.1
    top, bottom = 0.2 + 0.25 * len(caption), 0.3
    whole = (columns * (width + gap) + gap, top + rows * (height + label) + bottom)
    figure = Figure(figsize=whole)
    figure.text(0.5, 1 - 0.12 / whole[1], "\n".join(caption), ha="center", va="top", fontsize=14, parse_math=False)
    note = "%: the share of a word's attention that its brightest place has"
    figure.text(0.5, 0.1 / whole[1], note, ha="center", va="bottom", fontsize=8, color="gray")
    pictures: list[tuple[Image.Image | np.ndarray, str]] = [(image, "")]
    for word, alpha_P in zip(words, alpha_TP, strict=False):
        text = word if len(word) <= 18 else word[:17] + "…"
        pictures.append((_glow(image, alpha_P), f"{text}  {alpha_P.max():.0%}"))
    for n, (picture, text) in enumerate(pictures):
        x = gap + n % columns * (width + gap)
        y = whole[1] - top - (n // columns + 1) * (height + label)
        axes = figure.add_axes((x / whole[0], y / whole[1], width / whole[0], height / whole[1]))
        axes.axis("off")
        axes.imshow(picture)
        axes.set_title(text, fontsize=11, pad=4, parse_math=False)
    figure.savefig(path, dpi=110)


def _glow(image: Image.Image, alpha_P: np.ndarray) -> np.ndarray:
    """The picture in grey, coloured and brightened by the attention's share of its largest value."""
    side = round(len(alpha_P) ** 0.5)
    heat = Image.fromarray((alpha_P / max(alpha_P.max(), 1e-9)).reshape(side, side).astype(np.float32))
    heat_YX = np.clip(np.asarray(heat.resize(image.size, Image.Resampling.BICUBIC)), 0, 1)
    grey_YX1 = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    strength_YX1 = 0.65 * heat_YX[..., None]
    return (1 - strength_YX1) * 0.65 * grey_YX1 + strength_YX1 * _HEAT(heat_YX)[..., :3]
