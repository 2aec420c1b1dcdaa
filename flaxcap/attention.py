"""Additive attention (Bahdanau et al. 2015, arXiv:1409.0473) with a backward of its own.

Its energies [I, C, P, A], one for each token, are by far the largest arrays of the model. Neither pass keeps them:
backward computes them once more, and from them all the gradients. And their tanh would be its most costly
arithmetic beside the matrix products; with r = 1 / (1 + exp(2 key) exp(2 query)),

    tanh(key + query) = 1 - 2r,    its derivative = 4 (r - r²),

and the exponentials stand outside: the keys' once an image, the queries' once a token. What is left for each energy
is a product, a sum and a division.
"""

import jax
import jax.numpy as jnp

Residuals = tuple[jax.Array, ...]

# Beyond it tanh is 1 in float32; within it no product of two exponentials is 0 · ∞.
LARGEST = 40.0


def _grown(x: jax.Array) -> jax.Array:
    return jnp.exp(2 * jnp.clip(x.astype(jnp.float32), -LARGEST, LARGEST)).astype(x.dtype)


@jax.custom_vjp
def grow(keys_IPA: jax.Array) -> jax.Array:
    """The keys as `attend` takes them: exp(2 key). Gradients pass as they are: `attend` gives those of the keys."""
    return _grown(keys_IPA)


grow.defvjp(lambda keys_IPA: (_grown(keys_IPA), None), lambda _, d_keys_IPA: (d_keys_IPA,))


@jax.custom_vjp
def attend(
    grown_IPA: jax.Array, values_IPE: jax.Array, score_A: jax.Array, query_ICA: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Context [I, C, E] and weights alpha [I, C, P], float32, which add up to one over the positions.

    alpha = softmax_p(score · tanh(key_p + query)), context = sum_p alpha_p value_p; `grown_IPA` is `grow(keys)`.
    All arguments are of one dtype.
    """
    # A softmax does not see what all positions have in common, here sum(score).
    scores_ICP = _reciprocal(grown_IPA, query_ICA) @ (-2 * score_A)
    alpha_ICP = jax.nn.softmax(scores_ICP.astype(jnp.float32))
    return jnp.einsum("icp,ipe->ice", alpha_ICP.astype(values_IPE.dtype), values_IPE), alpha_ICP


def _reciprocal(grown_IPA: jax.Array, query_ICA: jax.Array) -> jax.Array:
    """r [I, C, P, A]."""
    return 1 / (1 + grown_IPA[:, None] * _grown(query_ICA)[:, :, None])


def _forward(
    grown_IPA: jax.Array, values_IPE: jax.Array, score_A: jax.Array, query_ICA: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    context_ICE, alpha_ICP = attend(grown_IPA, values_IPE, score_A, query_ICA)
    return (context_ICE, alpha_ICP), (grown_IPA, values_IPE, score_A, query_ICA, alpha_ICP)


def _backward(residuals: Residuals, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    grown_IPA, values_IPE, score_A, query_ICA, alpha_ICP = residuals
    d_context_ICE, d_alpha_ICP = given
    dtype = grown_IPA.dtype
    d_values_IPE = jnp.einsum("icp,ice->ipe", alpha_ICP.astype(dtype), d_context_ICE)
    d_alpha_ICP = d_alpha_ICP + jnp.einsum("ice,ipe->icp", d_context_ICE, values_IPE).astype(jnp.float32)
    d_scores_ICP = alpha_ICP * (d_alpha_ICP - (alpha_ICP * d_alpha_ICP).sum(-1, keepdims=True))
    d_scores_ICP = d_scores_ICP.astype(dtype)

    r_ICPA = _reciprocal(grown_IPA, query_ICA)
    d_score_A = -2 * jnp.einsum("icp,icpa->ica", d_scores_ICP, r_ICPA).sum((0, 1))
    # How these two sums are written decides how many passes over the energies a CPU makes.
    slope_ICA = jax.lax.map(lambda x: jnp.einsum("cp,cpa->ca", x[0], x[1] - x[1] * x[1]), (d_scores_ICP, r_ICPA))
    slope_IPA = sum((r - r * r) * d[..., None] for r, d in zip(*map(_by_caption, (r_ICPA, d_scores_ICP)), strict=True))
    score_11A = 4 * score_A[None, None]
    return score_11A * slope_IPA, d_values_IPE, d_score_A, score_11A * slope_ICA


def _by_caption(x: jax.Array) -> list[jax.Array]:
    return [x[:, c] for c in range(x.shape[1])]


attend.defvjp(_forward, _backward)
