"""Compares the gradients of one training step on the device with those of a CPU."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_parts.sizes import changed

from flaxcap.bench import synthetic
from flaxcap.config import Config
from flaxcap.encoders import base as encoders
from flaxcap.models import decoder as decoder_lib
from flaxcap.training import objective

EXACT = 1e-4  # relative error of a layer's gradient, in float32
# The tolerances of tests/training/test_fast_path.py between bfloat16 and float32.
COSINE, NORM = 0.999, 0.01


def compare(config: Config, images: int) -> Iterator[dict[str, Any]]:
    """Yields the comparison in float32, then the one of bfloat16 on the device with float32 on the CPU.

    Args:
      config: sizes of the model.
      images: of the batch.
    """
    config = changed(config, train__batch_images=images)
    encoder = encoders.make(config.encoder)
    sizes = decoder_lib.Sizes(encoder.positions, encoder.features, synthetic.vocabulary_size(config.data))
    batch = synthetic.plan(images, config).in_order(0)
    source = synthetic.SyntheticFeatures(images, encoder.positions, encoder.features, np.dtype(np.float32))
    given = source.read(batch.rows_I), batch.tokens_ICT
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    _, init = decoder_lib.create(config, sizes)
    params = jax.jit(init)(jax.random.key(config.seed))
    with jax.default_matmul_precision("highest"):
        expected = _gradients(config, sizes, params, given, cpu)
        yield exact(_gradients(config, sizes, params, given, device), expected)
    half = changed(config, train__dtype="bfloat16")
    yield rounded(_gradients(half, sizes, params, given, device), expected)


def _gradients(config: Config, sizes: decoder_lib.Sizes, params: Any, given: tuple, device: Any) -> tuple[float, dict]:
    """Returns the loss of a token, and the gradient of each layer as one vector."""
    bind, _ = decoder_lib.create(config, sizes)

    def loss(params: Any, feats_IPF: jax.Array, tokens_ICT: jax.Array) -> jax.Array:
        weight_IC, zero = jnp.ones(tokens_ICT.shape[:2]), jnp.zeros(())
        microbatch = objective.Microbatch(feats_IPF, tokens_ICT, weight_IC, jnp.arange(len(tokens_ICT)))
        context = objective.StepContext(jax.random.key(0), zero, zero)
        total, sums = objective.objective(bind(params), microbatch, context, config.train)
        return total / sums.sums.tokens

    value, grads = jax.jit(jax.value_and_grad(loss))(*jax.device_put((params, *given), device))
    return float(value), layers(jax.device_get(grads))


def layers(grads: Any) -> dict[str, np.ndarray]:
    """Returns the gradient of each layer as one vector, float64.

    A layer's kernel and bias are compared together: the gradient of a bias may be a sum that is near 0.
    """
    found: dict[str, list[np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        found.setdefault(jax.tree_util.keystr(path[:-1], simple=True, separator="."), []).append(
            np.ravel(leaf).astype(np.float64)
        )
    return {name: np.concatenate(parts) for name, parts in found.items()}


def exact(found: tuple[float, dict], expected: tuple[float, dict]) -> dict[str, Any]:
    """Returns the relative error of each layer, and whether the worst one is at most `EXACT`."""
    (loss, grads), (expected_loss, expected_grads) = found, expected
    errors = {name: _relative(grads[name], expected_grads[name]) for name in expected_grads}
    worst = max(errors, key=lambda name: errors[name])
    total = _relative(*(np.concatenate([g[name] for name in expected_grads]) for g in (grads, expected_grads)))
    notes = f"limit {EXACT:g}; all layers together {total:.2g}; loss {loss:.6f} and {expected_loss:.6f}"
    return {
        "dtype": "float32",
        "passes": bool(errors[worst] <= EXACT),
        "rows": [(f"float32: relative error of the gradient, worst layer ({worst})", errors[worst], notes)],
        "errors": errors,
    }


def rounded(found: tuple[float, dict], expected: tuple[float, dict]) -> dict[str, Any]:
    """Returns the cosine and the ratio of norms of the complete gradients, and whether both are near 1."""
    (loss, grads), (expected_loss, expected_grads) = found, expected
    ours, theirs = (np.concatenate([g[name] for name in expected_grads]) for g in (grads, expected_grads))
    norms = np.linalg.norm(ours), np.linalg.norm(theirs)
    cosine, ratio = float(ours @ theirs / (norms[0] * norms[1])), float(norms[0] / norms[1])
    notes = f"limit {COSINE}; ratio of norms {ratio:.4f}, limit 1 ± {NORM}; loss {loss:.5f} and {expected_loss:.5f}"
    return {
        "dtype": "bfloat16",
        "passes": bool(cosine > COSINE and abs(ratio - 1) < NORM),
        "rows": [("bfloat16: cosine with the CPU's float32 gradient", cosine, notes)],
        "cosine": cosine,
        "norm_ratio": ratio,
    }


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))
