"""A small decoder, and a batch with short and absent captions, for tests of the training objective."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap.config import Config, Dropout, Model, Train
from flaxcap.models import decoder as decoder_lib
from flaxcap.models import output_layer
from flaxcap.text.vocabulary import END, PAD, START
from flaxcap.training import objective
from flaxcap.training.objective import Microbatch, StepContext, StepSums

F, V, I, C, T, P = 5, 20, 4, 3, 7, 9
SIZES = decoder_lib.Sizes(P, F, V)
WIDTHS: dict[str, Any] = {"image_dim": 6, "embedding_dim": 5, "attention_dim": 7, "hidden_dim": 8, "head_dim": 9}


@functools.cache
def make(
    seed: int = 0, sizes: decoder_lib.Sizes = SIZES, **options: Any
) -> tuple[decoder_lib.Bind, decoder_lib.Params]:
    """Returns a decoder's bind, and parameters that are all different from zero. `options`: fields of Model."""
    bind, init = decoder_lib.create(Config(model=Model(**WIDTHS | options)), sizes)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return bind, jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def batch(seed: int = 0) -> Microbatch:
    """Returns captions of 1 to 5 words. The first caption of every second image is absent."""
    rng = np.random.default_rng(seed)
    tokens_ICT = np.full((I, C, T), PAD, np.int32)
    for i, c in np.ndindex(I, C):
        n = int(rng.integers(1, T - 1))
        if c or i % 2:
            tokens_ICT[i, c, : n + 2] = [START, *rng.integers(4, V, n), END]
    feats_IPF = rng.standard_normal((I, P, F)).astype(np.float32)
    return Microbatch(jnp.asarray(feats_IPF), jnp.asarray(tokens_ICT), jnp.ones((I, C)), jnp.arange(I))


def step_context(done: float = 1.0, baseline: float = 0.0, seed: int = 0) -> StepContext:
    return StepContext(jax.random.key(seed), jnp.float32(done), jnp.float32(baseline))


@functools.cache
def compiled(bind: Any, output_dropout: float = 0.0, **train: Any) -> Any:
    """Returns the jitted objective with its gradients. `train`: fields of Train."""
    config = Train(dropout=Dropout(output=output_dropout), **train)

    def total(params: Any, microbatch: Microbatch, context: StepContext) -> tuple[jax.Array, StepSums]:
        return objective.objective(bind(params), microbatch, context, config)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def results(bind: Any, params: Any, microbatch: Microbatch, context: StepContext | None = None, **options: Any) -> Any:
    """Returns ((objective, sums), gradients). `options`: of `compiled`."""
    return compiled(bind, **options)(params, microbatch, step_context() if context is None else context)


def logits(decoder: Any, states: Any) -> jax.Array:
    return output_layer.logits(decoder.output_weights(), states)


def assert_near(ours: Any, expected: Any, tolerance: float) -> None:
    """Asserts that no number differs by more than `tolerance` times the largest number of the tree."""
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    assert largest > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 0, tolerance * largest), ours, expected)


def sharpened(params: Any) -> Any:
    """Returns larger parameters: the decoder's probabilities are farther from uniform."""
    return jax.tree.map(lambda x: 3 * x, params)


def largest_difference(a: Any, b: Any) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), a, b)))
