"""Additive attention (Bahdanau et al. 2015, arXiv:1409.0473) with a hand-written backward pass.

The energies `[I, C, P, A]`, one array for each token, are the largest arrays of the model. Neither pass keeps them:
the backward pass computes them again. Their tanh would cost the most arithmetic beside the matrix products. With
r = 1 / (1 + exp(2 key) exp(2 query)),

    tanh(key + query) = 1 - 2r,    its derivative = 4 (r - r²),

the exponentials leave the inner loop: those of the keys are computed once an image, those of the queries once a token.
A product, a sum and a division remain for each energy.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Residuals = tuple[jax.Array, ...]

# A bound on keys and queries, so that no product of two exponentials is 0 · ∞. Beyond it tanh of a key or query alone
# is ±1 in float32, and a key and a query of opposite signs no longer cancel.
LARGEST = 40.0


def _exp2(x: jax.Array) -> jax.Array:
    """Returns exp(2x), with x clipped to ±LARGEST."""
    return jnp.exp(2 * jnp.clip(x.astype(jnp.float32), -LARGEST, LARGEST)).astype(x.dtype)


@jax.custom_vjp
def exp_keys(keys_IPA: jax.Array) -> jax.Array:
    """Returns exp(2 key), `exp_keys_IPA`, which only `attend` may read.

    Straight-through: the backward pass of `attend` already returns gradients with respect to the keys.
    """
    return _exp2(keys_IPA)


exp_keys.defvjp(lambda keys_IPA: (_exp2(keys_IPA), None), lambda _, d_keys_IPA: (d_keys_IPA,))


@jax.custom_vjp
def attend(
    exp_keys_IPA: jax.Array, score_A: jax.Array, query_ICA: jax.Array, valid_IP: jax.Array | None = None
) -> jax.Array:
    """Returns attention weights: softmax over the positions of score · tanh(key + query).

    Args:
      exp_keys_IPA: `exp_keys(keys)`.
      score_A: the score vector.
      query_ICA: a query for each caption. The first three arguments have one dtype.
      valid_IP: bool, the positions that an image has; None: all.

    Returns:
      `alpha_ICP`, float32. It sums to one over the positions, and is 0 where `valid_IP` is False.
    """
    # A softmax ignores what all positions have in common, here sum(score).
    scores_ICP = jax.lax.platform_dependent(
        exp_keys_IPA, -2 * score_A, query_ICA, cpu=_scores_on_cpu, default=_scores_by_caption
    )
    if valid_IP is not None:
        scores_ICP = jnp.where(valid_IP[:, None], scores_ICP, -jnp.inf)
    return jax.nn.softmax(scores_ICP)


def _scores_by_caption(exp_keys_IPA: jax.Array, score_A: jax.Array, query_ICA: jax.Array) -> jax.Array:
    """Returns sum_a score · r, `[I, C, P]`, float32."""
    # Batched per image on purpose: as one large matmul, XLA:GPU (jaxlib 0.10) materialises r in memory.
    score_IA = jnp.broadcast_to(score_A, exp_keys_IPA.shape[::2])
    return jnp.stack([_weigh("ipa,ia->ip", r_IPA, score_IA) for r_IPA in _reciprocals(exp_keys_IPA, query_ICA)], 1)


def _scores_on_cpu(exp_keys_IPA: jax.Array, score_A: jax.Array, query_ICA: jax.Array) -> jax.Array:
    """Returns the scores of `_scores_by_caption`. Summed in vectors of 32, XLA:CPU writes no part of r to memory."""
    operands = exp_keys_IPA[:, None], score_A[None, None, None], _exp2(query_ICA)[:, :, None]
    lanes = math.gcd(score_A.size, 32)
    total = jnp.zeros(())  # [I, C, P, lanes]
    for n in range(0, score_A.size, lanes):
        keys, score, query = (x[..., n : n + lanes].astype(jnp.float32) for x in operands)
        total += score / (1 + keys * query)
    # A product with ones: XLA:CPU (jaxlib 0.10) would compute a plain sum's terms in a loop of their own.
    return jnp.einsum("icpa,a->icp", total, jnp.ones(lanes))


def _reciprocals(exp_keys_IPA: jax.Array, query_ICA: jax.Array) -> list[jax.Array]:
    """Returns r `[I, P, A]` for each caption. XLA makes one pass over a caption, but several over a fourth axis."""
    exp_query_ICA = _exp2(query_ICA)
    return [1 / (1 + exp_keys_IPA * exp_query_ICA[:, c, None]) for c in range(exp_query_ICA.shape[1])]


def _weigh(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _forward(
    exp_keys_IPA: jax.Array, score_A: jax.Array, query_ICA: jax.Array, valid_IP: jax.Array | None
) -> tuple[jax.Array, Residuals]:
    alpha_ICP = attend(exp_keys_IPA, score_A, query_ICA, valid_IP)
    return alpha_ICP, (exp_keys_IPA, score_A, query_ICA, alpha_ICP)


def _backward(residuals: Residuals, d_alpha_ICP: jax.Array) -> tuple[jax.Array | None, ...]:
    exp_keys_IPA, score_A, query_ICA, alpha_ICP = residuals
    dtype = exp_keys_IPA.dtype
    d_scores_ICP = alpha_ICP * (d_alpha_ICP - (alpha_ICP * d_alpha_ICP).sum(-1, keepdims=True))

    r_A, slope_ICA, slope_IPA = jax.lax.platform_dependent(
        exp_keys_IPA, query_ICA, d_scores_ICP.astype(dtype), cpu=_sums_on_cpu, default=_sums_by_caption
    )
    score_11A = 4 * score_A[None, None].astype(jnp.float32)
    d_keys_IPA, d_query_ICA = (score_11A * slope_IPA).astype(dtype), (score_11A * slope_ICA).astype(dtype)
    return d_keys_IPA, (-2 * r_A).astype(dtype), d_query_ICA, None


def _sums_by_caption(exp_keys_IPA: jax.Array, query_ICA: jax.Array, d_ICP: jax.Array) -> tuple[jax.Array, ...]:
    """Returns, weighted by d: sum_icp r `[A]`, sum_p (r - r²) `[I, C, A]`, sum_c (r - r²) `[I, P, A]`; all float32."""
    r_IA, slope_IA = [], []
    slope_IPA = jnp.zeros(exp_keys_IPA.shape, jnp.float32)
    for c, r_IPA in enumerate(_reciprocals(exp_keys_IPA, query_ICA)):
        d_IP = d_ICP[:, c]
        slope = r_IPA - r_IPA * r_IPA
        r_IA.append(_weigh("ip,ipa->ia", d_IP, r_IPA))
        slope_IA.append(_weigh("ip,ipa->ia", d_IP, slope))
        slope_IPA += (slope * d_IP[..., None]).astype(jnp.float32)
    # Without the barrier XLA:GPU (jaxlib 0.10) fuses this sum with each image's, and computes r again for it.
    r_ICA = jax.lax.optimization_barrier(jnp.stack(r_IA, 1))
    return r_ICA.sum((0, 1)), jnp.stack(slope_IA, 1), slope_IPA


def _sums_on_cpu(exp_keys_IPA: jax.Array, query_ICA: jax.Array, d_ICP: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the sums of `_sums_by_caption` in three passes. On a CPU dividing again is faster than storing r."""
    shaped = exp_keys_IPA[:, None], _exp2(query_ICA)[:, :, None], d_ICP[..., None]
    operands = [x.astype(jnp.float32) for x in shaped]

    def total_over(axis: int, add: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        """Returns the sum of `add(d, r)` over the captions (axis 1) or the positions (axis 2)."""
        nonlocal operands
        # A barrier before each pass: otherwise XLA:CPU (jaxlib 0.10) sees that r is the same, and stores it.
        operands = jax.lax.optimization_barrier(operands)
        count = operands[-1].shape[axis]
        parts = [jnp.unstack(x, axis=axis) * (count // x.shape[axis]) for x in operands]
        total = jnp.zeros(())
        for exp_key, exp_query, d in zip(*parts, strict=True):
            total += add(d, 1 / (1 + exp_key * exp_query))
        return total

    def slope(d: jax.Array, r: jax.Array) -> jax.Array:
        return d * (r - r * r)

    slope_IPA, slope_ICA, r_IPA = total_over(1, slope), total_over(2, slope), total_over(1, jnp.multiply)
    return jnp.einsum("ip,ipa->a", jnp.ones(r_IPA.shape[:2]), r_IPA), slope_ICA, slope_IPA


attend.defvjp(_forward, _backward)
