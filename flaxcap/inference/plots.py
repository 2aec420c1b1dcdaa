"""Plots: the curves of a run, and the attention of a caption."""

import os
import textwrap
from typing import IO

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

matplotlib.use("Agg")

_DPI = 110
_HEAT = matplotlib.colormaps["inferno"]


def loss_plot(lines: list[dict], path: str | os.PathLike[str] | IO[bytes]) -> None:
    """Writes a PNG of the training loss, the validation loss and the validation CIDEr by step.

    Args:
      lines: of `metrics.jsonl`.
      path: the file.
    """
    _loss_figure(lines).savefig(path, dpi=_DPI)


def _loss_figure(lines: list[dict]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot()
    left.set_xlabel("step")
    left.set_ylabel("cross-entropy, nats a token")
    left.grid(alpha=0.3)
    validation = {"lw": 2, "marker": "o", "ms": 3}
    curves = []
    for name, label, style in (
        ("train/loss", "training loss", {"lw": 1, "alpha": 0.7}),
        ("val/loss", "validation loss", validation),
    ):
        if points := _points(lines, name):
            curves += left.plot(*zip(*points, strict=True), label=label, **style)
    if points := _points(lines, "val/cider"):
        right = left.twinx()
        curves += right.plot(
            *zip(*points, strict=True), label="validation CIDEr (right)", color="tab:green", **validation
        )
        right.set_ylabel("CIDEr", color="tab:green")
    if curves:  # above the axes, where no curve can be
        figure.legend(handles=curves, loc="outside upper center", ncols=len(curves), frameon=False)
    return figure


def _points(lines: list[dict], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def attention_plot(image: Image.Image, words: list[str], alpha_TP: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Writes a PNG of an image and, for each word of its caption, of the attention weights over the image in grey.

    The brightness is relative to the word's largest weight. The number at the word is that weight.

    Args:
      image: the captioned image, of any size.
      words: the caption.
      alpha_TP: float, a row of attention weights for each word; P is a square number.
      path: the file.
    """
    count = len(words) + 1
    # The number of columns that leaves the fewest cells empty.
    columns = max(count, 3) if count < 7 else min(range(4, 8), key=lambda c: (-count % c, -c))
    rows = -(-count // columns)
    caption = textwrap.wrap(" ".join(words), 15 * columns) or ["(no word)"]
    # Inches. Cells have a bounded aspect; an image beyond it keeps its own aspect inside its cell.
    width, height, label, gap = 2.2, 2.2 * float(np.clip(image.height / image.width, 0.3, 2)), 0.3, 0.1
    top, bottom = 0.2 + 0.25 * len(caption), 0.3
    figure_width, figure_height = columns * (width + gap) + gap, top + rows * (height + label) + bottom
    figure = Figure(figsize=(figure_width, figure_height))
    title_y, note_y = 1 - 0.12 / figure_height, 0.1 / figure_height
    figure.text(0.5, title_y, "\n".join(caption), ha="center", va="top", fontsize=14, parse_math=False)
    note = "%: the attention weight of the brightest position"
    figure.text(0.5, note_y, note, ha="center", va="bottom", fontsize=8, color="gray")
    panels: list[tuple[Image.Image | np.ndarray, str]] = [(image, "")]
    for word, alpha_P in zip(words, alpha_TP, strict=False):
        text = word if len(word) <= 18 else word[:17] + "…"
        panels.append((_overlay(image, alpha_P), f"{text}  {alpha_P.max():.0%}"))
    for n, (panel, text) in enumerate(panels):
        x = gap + n % columns * (width + gap)
        y = figure_height - top - (n // columns + 1) * (height + label)
        box = (x / figure_width, y / figure_height, width / figure_width, height / figure_height)
        axes = figure.add_axes(box)
        axes.axis("off")
        axes.imshow(panel)
        axes.set_title(text, fontsize=11, pad=4, parse_math=False)
    figure.savefig(path, dpi=_DPI)


def _overlay(image: Image.Image, alpha_P: np.ndarray) -> np.ndarray:
    """Returns the image in grey, coloured and brightened by the weights relative to the largest, float [Y, X, 3]."""
    side = round(len(alpha_P) ** 0.5)
    heat = Image.fromarray((alpha_P / max(alpha_P.max(), 1e-9)).reshape(side, side).astype(np.float32))
    heat_YX = np.clip(np.asarray(heat.resize(image.size, Image.Resampling.BICUBIC)), 0, 1)
    grey_YX1 = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    strength_YX1 = 0.65 * heat_YX[..., None]
    return (1 - strength_YX1) * 0.65 * grey_YX1 + strength_YX1 * _HEAT(heat_YX)[..., :3]
