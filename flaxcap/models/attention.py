"""Additive attention (Bahdanau et al. 2015, arXiv:1409.0473) with a backward of its own.

Its energies [I, C, P, A], one for each token, are by far the largest arrays of the model. Neither pass keeps them:
backward computes them once more, and from them all the gradients. And their tanh would be its most costly
arithmetic beside the matrix products; with r = 1 / (1 + exp(2 key) exp(2 query)),

    tanh(key + query) = 1 - 2r,    its derivative = 4 (r - r²),

and the exponentials stand outside: the keys' once an image, the queries' once a token. What is left for each energy
is a product, a sum and a division.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Residuals = tuple[jax.Array, ...]

# Within it no product of two exponentials is 0 · ∞. Beyond it, where tanh of a key or query alone is ±1 in float32, a
# key and a query of opposite signs no longer cancel as they would in the formula.
LARGEST = 40.0


def _grown(x: jax.Array) -> jax.Array:
    return jnp.exp(2 * jnp.clip(x.astype(jnp.float32), -LARGEST, LARGEST)).astype(x.dtype)


@jax.custom_vjp
def grow(keys_IPA: jax.Array) -> jax.Array:
    """The keys as `attend` takes them: exp(2 key). Gradients pass as they are: `attend` gives those of the keys."""
    return _grown(keys_IPA)


grow.defvjp(lambda keys_IPA: (_grown(keys_IPA), None), lambda _, d_keys_IPA: (d_keys_IPA,))


@jax.custom_vjp
def attend(grown_IPA: jax.Array, score_A: jax.Array, query_ICA: jax.Array) -> jax.Array:
    """Weights alpha [I, C, P], float32, which add up to one over the positions.

    alpha = softmax_p(score · tanh(key_p + query)); `grown_IPA` is `grow(keys)`. All arguments are of one dtype.
    """
    # A softmax does not see what all positions have in common, here sum(score).
    scores_ICP = jax.lax.platform_dependent(
        grown_IPA, -2 * score_A, query_ICA, cpu=_scores_on_a_cpu, default=_scores_by_caption
    )
    return jax.nn.softmax(scores_ICP)


def _scores_by_caption(grown_IPA: jax.Array, score_A: jax.Array, query_ICA: jax.Array) -> jax.Array:
    """sum_a score · r, [I, C, P], float32."""
    # The product is one for each image, as if their scores differed: as a single matrix product, a GPU's compiler would
    # write all of r to memory for it.
    score_IA = jnp.broadcast_to(score_A, grown_IPA.shape[::2])
    return jnp.stack([_weigh("ipa,ia->ip", r_IPA, score_IA) for r_IPA in _reciprocals(grown_IPA, query_ICA)], 1)


def _scores_on_a_cpu(grown_IPA: jax.Array, score_A: jax.Array, query_ICA: jax.Array) -> jax.Array:
    """The same: here nothing of r is written, if the sum begins with whole vectors."""
    given = grown_IPA[:, None], score_A[None, None, None], _grown(query_ICA)[:, :, None]
    lanes = math.gcd(score_A.size, 32)
    total_ICPA = jnp.zeros(())
    for n in range(0, score_A.size, lanes):
        keys, score, query = (x[..., n : n + lanes].astype(jnp.float32) for x in given)
        total_ICPA += score / (1 + keys * query)
    # As a product with ones: XLA would take a sum's terms apart from each other.
    return jnp.einsum("icpa,a->icp", total_ICPA, jnp.ones(lanes))


def _reciprocals(grown_IPA: jax.Array, query_ICA: jax.Array) -> list[jax.Array]:
    """r [I, P, A] of each caption: compilers make one pass of a caption, and several of a fourth axis."""
    grown_ICA = _grown(query_ICA)
    return [1 / (1 + grown_IPA * grown_ICA[:, c, None]) for c in range(grown_ICA.shape[1])]


def _weigh(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _forward(grown_IPA: jax.Array, score_A: jax.Array, query_ICA: jax.Array) -> tuple[jax.Array, Residuals]:
    alpha_ICP = attend(grown_IPA, score_A, query_ICA)
    return alpha_ICP, (grown_IPA, score_A, query_ICA, alpha_ICP)


def _backward(residuals: Residuals, d_alpha_ICP: jax.Array) -> tuple[jax.Array, ...]:
    grown_IPA, score_A, query_ICA, alpha_ICP = residuals
    dtype = grown_IPA.dtype
    d_scores_ICP = alpha_ICP * (d_alpha_ICP - (alpha_ICP * d_alpha_ICP).sum(-1, keepdims=True))

    sums = jax.lax.platform_dependent(
        grown_IPA, query_ICA, d_scores_ICP.astype(dtype), cpu=_sums_on_a_cpu, default=_sums_by_caption
    )
    r_A, slope_ICA, slope_IPA = sums
    score_11A = 4 * score_A[None, None].astype(jnp.float32)
    d_keys_IPA, d_query_ICA = (score_11A * slope_IPA).astype(dtype), (score_11A * slope_ICA).astype(dtype)
    return d_keys_IPA, (-2 * r_A).astype(dtype), d_query_ICA


def _sums_by_caption(grown_IPA: jax.Array, query_ICA: jax.Array, d_ICP: jax.Array) -> tuple[jax.Array, ...]:
    """Weighted by d: sum_icp r [A], sum_p (r - r²) [I, C, A] and sum_c (r - r²) [I, P, A]; all float32."""
    r_IA, slope_IA = [], []
    slope_IPA = jnp.zeros(grown_IPA.shape, jnp.float32)
    for c, r_IPA in enumerate(_reciprocals(grown_IPA, query_ICA)):
        d_IP = d_ICP[:, c]
        slope = r_IPA - r_IPA * r_IPA
        r_IA.append(_weigh("ip,ipa->ia", d_IP, r_IPA))
        slope_IA.append(_weigh("ip,ipa->ia", d_IP, slope))
        slope_IPA += (slope * d_IP[..., None]).astype(jnp.float32)
    # A GPU's compiler would join this sum with those of each image, apart from the others, and make r once more.
    r_ICA = jax.lax.optimization_barrier(jnp.stack(r_IA, 1))
    return r_ICA.sum((0, 1)), jnp.stack(slope_IA, 1), slope_IPA


def _sums_on_a_cpu(grown_IPA: jax.Array, query_ICA: jax.Array, d_ICP: jax.Array) -> tuple[jax.Array, ...]:
    """The same in three passes, loops over whole vectors: to divide again is quicker than to write r and read it."""
    shaped = grown_IPA[:, None], _grown(query_ICA)[:, :, None], d_ICP[..., None]
    given = [x.astype(jnp.float32) for x in shaped]

    def again(add: Callable[[jax.Array, jax.Array], jax.Array], axis: int) -> jax.Array:
        """Sum of `add(d, r)` over the captions, axis 1, or the positions, axis 2."""
        nonlocal given
        # Each pass has a barrier more: the compiler would see that r is the same, and keep it.
        given = jax.lax.optimization_barrier(given)
        count = given[-1].shape[axis]
        parts = [jnp.unstack(x, axis=axis) * (count // x.shape[axis]) for x in given]
        total = jnp.zeros(())
        for grown, query, d in zip(*parts, strict=True):
            total += add(d, 1 / (1 + grown * query))
        return total

    def slope(d: jax.Array, r: jax.Array) -> jax.Array:
        return d * (r - r * r)

    slope_IPA, slope_ICA, r_IPA = again(slope, 1), again(slope, 2), again(jnp.multiply, 1)
    return jnp.einsum("ip,ipa->a", jnp.ones(r_IPA.shape[:2]), r_IPA), slope_ICA, slope_IPA


attend.defvjp(_forward, _backward)
