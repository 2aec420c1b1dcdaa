"""Plots show the curves of a run and the attention weights, for any image and any caption."""

import io

import numpy as np
import pytest
from PIL import Image

from flaxcap.inference import plots

IMAGE = Image.fromarray(np.full((60, 90, 3), (200, 30, 30), np.uint8))
WORDS = ["a", "red", "ring", "is", "to", "the", "left", "of", "a", "small", "blue", "square"]


def loss(*lines: dict) -> np.ndarray:
    out = io.BytesIO()
    plots.loss_plot([{"step": 0, "epoch": 1}, *lines], out)
    return pixels(out)


def attention(
    tmp_path,
    image: Image.Image,
    words: list[str],
    alpha_TP: np.ndarray,
    grid: tuple[int, int] | None = (8, 8),
    crop: float = 0.0,
) -> np.ndarray:
    path = tmp_path / "plot.png"
    plots.attention_plot(image, " ".join(words), words, alpha_TP, path, grid, crop)
    return pixels(path)


def pixels(file) -> np.ndarray:
    with Image.open(file) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def cells(plot: np.ndarray) -> list[np.ndarray]:
    """Returns the images in a plot in reading order, [Y, X, 3] each: the rectangles without white."""
    dark = np.any(plot < 250, -1)
    found = []
    for top, bottom in runs(dark.mean(1) > 0.1, 20):
        found += [plot[top:bottom, a:b] for a, b in runs(dark[top:bottom].mean(0) > 0.9, 20)]
    return found


def runs(mask: np.ndarray, least: int) -> list[tuple[int, int]]:
    """Returns the begin and end of each run of True of at least `least` elements."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= least]


def spot(position: int) -> np.ndarray:
    alpha_P = np.full(64, 0.1 / 63)
    alpha_P[position] = 0.9
    return alpha_P


def test_the_curves_of_a_run():
    training = [{"step": s, "train/loss": 4 / s, "captions_per_s": 9.0} for s in range(1, 200)]
    validation = [{"step": s, "val/loss": 5 / s} for s in (50, 100)]
    nothing, one, many = loss(), loss(training[0]), loss(*training, *validation)
    assert nothing.shape == one.shape == many.shape == (440, 770, 3)
    saturated = [(np.ptp(plot, axis=-1) > 60).sum() for plot in (nothing, one, many)]
    assert saturated[0] == 0  # only axes
    assert saturated[0] < saturated[1] < saturated[2]


def test_the_legend_names_all_curves_and_is_outside_the_axes():
    lines = [{"step": s, "train/loss": 4 / s, "val/loss": 5 / s, "val/cider": s / 9} for s in range(1, 9)]
    figure = plots._loss_figure(lines)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["training loss", "validation loss", "validation CIDEr (right)"]
    box = legend.get_window_extent()
    assert box.y1 <= figure.bbox.y1
    for axes in figure.axes:
        assert box.y0 > axes.get_window_extent().y1
        assert axes.get_legend() is None


def test_a_loss_that_is_not_finite_does_not_spoil_the_plot():
    good = [{"step": s, "train/loss": 4 / s} for s in range(1, 20)]
    bad = [{"step": 20, "train/loss": float("nan")}, {"step": 21, "val/loss": float("inf")}]
    assert (np.ptp(loss(*good, *bad), axis=-1) > 60).sum() > 500


@pytest.mark.parametrize("count", [1, 2, 5, 11, 20])
def test_every_word_has_an_overlay(count, tmp_path):
    words = (WORDS * 2)[:count]
    found = cells(attention(tmp_path, IMAGE, words, np.stack([spot(k) for k in range(count)])))
    assert len(found) == count + 1
    assert (np.abs(found[0] - (200, 30, 30)) <= 2).all()  # the image itself
    for overlay in found[1:]:
        assert np.abs(np.subtract(overlay.shape, found[0].shape)).max() <= 1  # rounding to pixels
        assert overlay.shape[1] / overlay.shape[0] == pytest.approx(90 / 60, rel=0.02)


@pytest.mark.parametrize("position", [0, 7, 27, 56, 63])
def test_the_overlay_is_bright_where_the_attention_weight_is_large(position, tmp_path):
    _, overlay = cells(attention(tmp_path, IMAGE, ["ring"], spot(position)[None]))
    height, width = overlay.shape[:2]
    bright_YX = overlay.sum(-1)
    y, x = np.unravel_index(np.argmax(bright_YX), bright_YX.shape)
    assert (y * 8 // height, x * 8 // width) == divmod(position, 8)
    # Far from it the overlay is the image in grey.
    far = overlay[: height // 3] if position >= 32 else overlay[-height // 3 :]
    assert np.ptp(far, axis=-1).max() < 30


def test_the_brightness_is_relative_to_the_largest_weight(tmp_path):
    weak = np.full(64, 0.99 / 64)
    weak[27] *= 3
    overlays = [cells(attention(tmp_path, IMAGE, ["a"], a[None]))[1] for a in (weak, spot(27))]
    assert overlays[0].sum(-1).max() == pytest.approx(overlays[1].sum(-1).max(), rel=0.05)


def test_nothing_is_cut_off_or_overlaps(tmp_path):
    # Words of an untrusted vocabulary, some with the characters of TeX's mathematics.
    long = ["pneumonoultramicroscopicsilicovolcanoconiosis", "$x_1$", "$", "", "counterrevolutionaries"] * 5
    plot = attention(tmp_path, IMAGE, long, np.stack([spot(3)] * 25))
    ink = np.any(plot < 250, -1)
    assert not ink[:8].any()
    assert not ink[-8:].any()
    assert not ink[:, :8].any()
    assert not ink[:, -8:].any()
    assert len(cells(plot)) == 26


@pytest.mark.parametrize("size", [(1, 1), (1000, 10), (10, 1000), (480, 480)])
def test_images_of_any_aspect(size, tmp_path):
    plot = attention(tmp_path, Image.new("RGB", size, "green"), WORDS, np.stack([spot(9)] * len(WORDS)))
    assert 100 < plot.shape[0] < 2000
    assert 300 < plot.shape[1] < 2000
    green = (plot[..., 1] > 100) & (plot[..., [0, 2]] < 60).all(-1)
    assert green.any()


def test_captions_without_words_and_weights_of_zero(tmp_path):
    assert len(cells(attention(tmp_path, IMAGE, [], np.zeros((3, 64))))) == 1
    assert len(cells(attention(tmp_path, IMAGE, ["a"], np.zeros((3, 64))))) == 2


def brightest(overlay: np.ndarray) -> tuple[float, float]:
    """Returns the position of the brightest pixel, as shares of the height and width."""
    y, x = np.unravel_index(np.argmax(overlay.sum(-1)), overlay.shape[:2])
    return float((y + 0.5) / overlay.shape[0]), float((x + 0.5) / overlay.shape[1])


@pytest.mark.parametrize("grid", [(3, 3), (3, 4), (4, 3), (1, 6), (5, 1)])
def test_any_grid(grid, tmp_path):
    for position in (0, grid[1] - 1, np.prod(grid) - 1):
        alpha_P = np.eye(np.prod(grid))[position]
        _, overlay = cells(attention(tmp_path, IMAGE, ["a"], alpha_P[None], grid))
        y, x = brightest(overlay)
        assert (int(y * grid[0]), int(x * grid[1])) == divmod(position, grid[1])


@pytest.mark.parametrize("position", [0, 5, 15])
def test_the_grid_of_a_centre_crop_covers_the_crop_alone(position, tmp_path):
    """The image has 90x60 pixels, the crop is the square of 30 pixels in its centre."""
    _, overlay = cells(attention(tmp_path, IMAGE, ["a"], np.eye(16)[position][None], (4, 4), 0.5))
    y, x = brightest(overlay)
    row, column = divmod(position, 4)
    assert 1 / 4 + row / 8 <= y <= 1 / 4 + (row + 1) / 8
    assert 1 / 3 + column / 12 <= x <= 1 / 3 + (column + 1) / 12
    outside = [overlay[: len(overlay) // 5], overlay[:, : overlay.shape[1] // 4]]
    assert all(np.ptp(part, axis=-1).max() < 30 for part in outside)


def test_positions_without_a_layout_are_bars(tmp_path):
    alpha_TP = np.stack([np.full(36, 1 / 36), np.eye(36)[20]])
    plot = attention(tmp_path, IMAGE, ["a", "ring"], alpha_TP, None)
    uniform, bar = (plot[100:-40, left : left + 240] for left in (255, 510))
    shares = [(np.ptp(cell, axis=-1) > 60).mean() for cell in (uniform, bar)]
    assert shares[0] > 20 * shares[1] > 0
    columns = np.flatnonzero((np.ptp(bar, axis=-1) > 60).any(0))
    assert np.ptp(columns) < 12
    assert 20 / 36 < (columns.mean() - 9) / 242 < 21 / 36
