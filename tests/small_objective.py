"""What a step minimises, of a small model and a batch with short and absent captions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcap.config import Config, Dropout, Model, Train
from flaxcap.models import recurrent
from flaxcap.text.vocabulary import END, PAD, START
from flaxcap.training import objective
from flaxcap.training.objective import Microbatch, StepContext, StepSums

F, V, I, C, T, P = 5, 20, 4, 3, 7, 9
SIZES: dict[str, Any] = {"image_dim": 6, "embedding_dim": 5, "attention_dim": 7, "hidden_dim": 8, "head_dim": 9}


@functools.cache
def made(seed: int = 0, **options: Any) -> tuple[recurrent.Bind, recurrent.Params]:
    """A decoder with every parameter away from zero."""
    bind, init = recurrent.create(Config(model=Model(**SIZES | options)), F, V)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return bind, jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def batch(seed: int = 0) -> Microbatch:
    """Captions of 1 to 5 words; two images have only two."""
    rng = np.random.default_rng(seed)
    tokens_ICT = np.full((I, C, T), PAD, np.int32)
    for i, c in np.ndindex(I, C):
        n = int(rng.integers(1, T - 1))
        if c or i % 2:
            tokens_ICT[i, c, : n + 2] = [START, *rng.integers(4, V, n), END]
    feats_IPF = rng.standard_normal((I, P, F)).astype(np.float32)
    return Microbatch(jnp.asarray(feats_IPF), jnp.asarray(tokens_ICT), jnp.ones((I, C)), jnp.arange(I))


def at(done: float = 1.0, baseline: float = 0.0, seed: int = 0) -> StepContext:
    return StepContext(jax.random.key(seed), jnp.float32(done), jnp.float32(baseline))


@functools.cache
def compiled(bind: Any, hidden: float = 0.0, **train: Any) -> Any:
    """`hidden`: the share of the states that is dropped."""
    config = Train(dropout=Dropout(output=hidden), **train)

    def of(params: Any, part: Microbatch, moment: StepContext) -> tuple[jax.Array, StepSums]:
        return objective.objective(bind(params), part, moment, config)

    return jax.jit(jax.value_and_grad(of, has_aux=True))


def results(bind: Any, params: Any, part: Microbatch, moment: StepContext | None = None, **options: Any) -> Any:
    """((total, found), gradients) of what a step minimises."""
    return compiled(bind, **options)(params, part, at() if moment is None else moment)


def assert_near(ours: Any, expected: Any, tolerance: float) -> None:
    """Every leaf within `tolerance` of the largest value of all."""
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    assert largest > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 0, tolerance * largest), ours, expected)


def sharp(params: Any) -> Any:
    """Of a model that is surer."""
    return jax.tree.map(lambda x: 3 * x, params)


def largest_difference(a: Any, b: Any) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), a, b)))
