"""Pictures of a run: its loss, and where the model looked."""

import os
from typing import IO, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

matplotlib.use("Agg")


def loss_plot(lines: list[dict], path: str | os.PathLike[str] | IO[bytes]) -> None:
    """A PNG of the training and validation loss (nats a token) by step, from the lines of `metrics.jsonl`."""
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
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=110)


def attention_plot(image: Image.Image, words: list[str], alpha_TP: np.ndarray, path: str | os.PathLike[str]) -> None:
    """A PNG with the picture, and the picture once a word with the attention over its grid laid on it.

    `alpha_TP`: a row of weights a word, P a square number. Each overlay is scaled to its own largest weight,
    which stands beside the word as a share of all attention.
    """
    columns = min(5, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    height = image.height / image.width
    figure = Figure(figsize=(2.3 * columns, (2.3 * height + 0.35) * rows), layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    side = int(np.sqrt(alpha_TP.shape[1]))
    cells = list(grid.flat)
    for axes in cells:
        axes.axis("off")
    cells[0].imshow(image)
    extent = (0, image.width, image.height, 0)
    for axes, word, alpha_P in zip(cells[1:], words, alpha_TP, strict=False):
        axes.imshow(image.convert("L"), cmap="gray", extent=extent, alpha=0.85)
        heat = alpha_P.reshape(side, side)
        axes.imshow(heat, cmap="inferno", extent=extent, alpha=0.55, interpolation="bicubic", vmin=0)
        axes.set_title(f"{word}  {heat.max():.0%}", fontsize=10)
    figure.savefig(path, dpi=110)
