"""Plots: the curves of a run, and the attention weights of a caption's words."""

import os
import textwrap
from collections.abc import Sequence
from typing import IO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from flaxcap.images.preprocess import centre

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
        label = "validation CIDEr (right)"
        curves += right.plot(*zip(*points, strict=True), label=label, color="tab:green", **validation)
        right.set_ylabel("CIDEr", color="tab:green")
    if curves:  # outside the axes, where it cannot hide a curve
        figure.legend(handles=curves, loc="outside upper center", ncols=len(curves), frameon=False)
    return figure


def _points(lines: list[dict], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def attention_plot(
    image: Image.Image,
    text: str,
    words: Sequence[str],
    alpha_TP: np.ndarray,
    path: str | os.PathLike[str],
    grid: tuple[int, int] | None,
    crop: float = 0.0,
) -> None:
    """Writes a PNG: the image, then a cell for each word with its attention weights and the largest of them.

    With a grid, the weights brighten and colour the grey image. The colours are scaled to the word's largest weight.
    Without a grid, the weights are bars by position.

    Args:
      image: as the user sees it.
      text: the caption.
      words: its words, or other tokens.
      alpha_TP: attention weights, a row for each word. More rows are ignored.
      path: of the PNG.
      grid: rows and columns of the positions, in reading order; None: the positions have no layout.
      crop: share of the shorter side that the grid covers, in the centre; 0: the grid covers the image.
    """
    count = len(words) + 1
    # The number of columns with the fewest empty cells.
    columns = max(count, 3) if count < 7 else min(range(4, 8), key=lambda c: (-count % c, -c))
    rows = -(-count // columns)
    caption = textwrap.wrap(text, 15 * columns) or ["(no word)"]
    # In inches. A cell is 0.3 to 2 times as high as wide; an image of another aspect is centred in its cell.
    width, height, label, gap = 2.2, 2.2 * float(np.clip(image.height / image.width, 0.3, 2)), 0.3, 0.1
    top, bottom = 0.2 + 0.25 * len(caption), 0.3
    size = (columns * (width + gap) + gap, top + rows * (height + label) + bottom)
    figure = Figure(figsize=size)
    figure.text(0.5, 1 - 0.12 / size[1], "\n".join(caption), ha="center", va="top", fontsize=14, parse_math=False)
    note = "%: the word's largest attention weight" + ("" if grid else "; bars: its weights by position")
    figure.text(0.5, 0.1 / size[1], note, ha="center", va="bottom", fontsize=8, color="gray")

    def cell(number: int, title: str) -> Axes:
        x = gap + number % columns * (width + gap)
        y = size[1] - top - (number // columns + 1) * (height + label)
        axes = figure.add_axes((x / size[0], y / size[1], width / size[0], height / size[1]))
        axes.axis("off")
        axes.set_title(title, fontsize=11, pad=4, parse_math=False)
        return axes

    cell(0, "").imshow(image)
    for number, (word, alpha_P) in enumerate(zip(words, alpha_TP, strict=False), 1):
        axes = cell(number, f"{word if len(word) <= 18 else word[:17] + '…'}  {alpha_P.max():.0%}")
        if grid:
            axes.imshow(_heat(image, alpha_P.reshape(grid), crop))
        else:
            axes.bar(range(len(alpha_P)), alpha_P / max(alpha_P.max(), 1e-9), width=1, color=_HEAT(0.6))
            axes.set(xlim=(-0.5, len(alpha_P) - 0.5), ylim=(0, 1))
    figure.savefig(path, dpi=_DPI)


def _heat(image: Image.Image, alpha: np.ndarray, crop: float) -> np.ndarray:
    """Returns the grey image, coloured and brightened by the grid's attention weights over their largest."""
    heat_YX = np.zeros((image.height, image.width), np.float32)
    left, top, right, bottom = map(round, centre(image.width, image.height, crop))
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    cells = Image.fromarray((alpha / max(alpha.max(), 1e-9)).astype(np.float32))
    cells = cells.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    heat_YX[top:bottom, left:right] = np.asarray(cells)
    heat_YX = np.clip(heat_YX, 0, 1)
    grey_YX1 = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    strength_YX1 = 0.65 * heat_YX[..., None]
    return (1 - strength_YX1) * 0.65 * grey_YX1 + strength_YX1 * _HEAT(heat_YX)[..., :3]
