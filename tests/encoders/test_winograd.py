"""Winograd convolutions equal the sum that defines a convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxcap.encoders.inception_v3 import winograd

SIZES = sorted(winograd.OUTPUTS)
convolve = jax.jit(winograd.convolve, static_argnames=("size", "padding"))


def plain(x, kernel, padding):
    """Returns the convolution in float64, summed over the entries of the kernel."""
    rows, columns = kernel.shape[:2]
    if padding == "SAME":
        x = np.pad(x, ((0, 0), ((rows - 1) // 2, rows // 2), ((columns - 1) // 2, columns // 2), (0, 0)))
    height, width = x.shape[1] - rows + 1, x.shape[2] - columns + 1
    y = np.zeros((len(x), height, width, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            y += x[:, i : i + height, j : j + width].astype(np.float64) @ kernel[i, j].astype(np.float64)
    return y


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SIZES),
    st.sampled_from(SIZES),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from(["SAME", "VALID"]),
    st.integers(0, 2**32 - 1),
)
def test_it_equals_the_convolution(rows, columns, more_rows, more_columns, padding, seed):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((2, rows + more_rows, columns + more_columns, 3), np.float32)
    kernel = draw.standard_normal((rows, columns, 3, 4), np.float32)
    expected = plain(x, kernel, padding)
    found = np.asarray(convolve(x, winograd.transform(kernel), size=(rows, columns), padding=padding))
    assert found.shape == expected.shape
    scale = np.abs(kernel).sum((0, 1, 2)).max()
    np.testing.assert_allclose(found, expected, atol=5e-6 * scale)


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (5, 5), (1, 7), (7, 1), (1, 3), (3, 1)])
def test_rounding_errors_are_near_those_of_a_plain_convolution(rows, columns):
    draw = np.random.default_rng(0)
    x = np.maximum(draw.standard_normal((1, 17, 17, 64), np.float32), 0)
    kernel = draw.standard_normal((rows, columns, 64, 64), np.float32) / np.float32(np.sqrt(rows * columns * 64))
    exact = plain(x, kernel, "SAME")
    given = jnp.asarray(x), jnp.asarray(kernel)
    baseline = jax.lax.conv_general_dilated(*given, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    fast = convolve(x, winograd.transform(kernel), size=(rows, columns), padding="SAME")
    errors = [np.sqrt(np.mean((np.asarray(y) - exact) ** 2)) for y in (baseline, fast)]
    assert errors[1] < 10 * errors[0]
    assert errors[1] < 2e-6


@pytest.mark.parametrize(("size", "share"), [((3, 3), 1 / 4), ((5, 5), 0.36), ((1, 7), 4 / 7), ((3, 1), 1 / 2)])
def test_the_share_of_multiplications(size, share):
    """Counts the multiplications of complete tiles, for one input channel and one filter."""
    kernel = np.ones((*size, 1, 1), np.float32)
    points = winograd.transform(kernel).size
    outputs = np.prod([winograd.OUTPUTS[n] for n in size])
    assert points / (outputs * kernel.size) == pytest.approx(share)
