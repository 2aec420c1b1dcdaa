"""`unroll` equals the cell called once a token: all outputs and all gradients, with and without noise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxcap.config import Model
from flaxcap.models import attention, hard_attention
from flaxcap.models.cell import NO_CELL_NOISE, Carry, Cell, CellNoise, CellOutputs, Memory, StepNoise, unroll

I, C, P, D, A, H = 2, 3, 5, 6, 7, 8
CASES = [
    pytest.param(cell, gate, tokens, drawn, id=f"{cell}-{'gate' if gate else 'plain'}-{tokens}-{drawn}")
    for cell, gate, tokens, drawn in (
        ("gru", False, 4, "nothing"),
        ("gru", True, 4, "nothing"),
        ("gru", False, 1, "nothing"),
        ("lstm", False, 4, "nothing"),
        ("lstm", True, 4, "nothing"),
        ("lstm", True, 1, "nothing"),
        ("gru", True, 4, "masks"),
        ("lstm", False, 4, "masks"),
        ("gru", False, 4, "positions"),
        ("lstm", True, 4, "both"),
    )
]


def make(cell: str, gate: bool, tokens: int, dtype: str = "float32") -> tuple[Any, list]:
    """Returns the cell's graph, and everything that has gradients: weights, keys, values, carry and words_TICG."""
    config = Model(image_dim=D, attention_dim=A, hidden_dim=H, cell=cell, attention_gate=gate)
    graph, state = nnx.split(nnx.eval_shape(lambda: Cell(config, jnp.dtype(dtype), rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    weights = jax.tree.map(lambda x: 0.5 * normal(*x.shape).astype(jnp.float32), nnx.to_pure_dict(state))
    carry = Carry(normal(I, C, H), normal(I, C, H) if cell == "lstm" else None)
    words_TICG = normal(tokens, I, C, {"gru": 3, "lstm": 4}[cell] * H)
    return graph, [weights, normal(I, P, A), normal(I, P, D), carry, words_TICG]


def noise_of(drawn: str, tokens: int) -> CellNoise:
    """Returns dropout masks, hard attention for the second image, both, or nothing."""
    rng = np.random.default_rng(2)

    def mask(*shape: int) -> jax.Array:
        return jnp.asarray(2.0 * rng.integers(0, 2, shape), jnp.float32)

    noise = NO_CELL_NOISE
    if drawn in ("masks", "both"):
        noise = noise._replace(hidden_ICH=mask(I, C, H), alpha_TICP=mask(tokens, I, C, P))
    if drawn in ("positions", "both"):
        gumbel_TICP = jnp.asarray(rng.gumbel(size=(tokens, I, C, P)), jnp.float32)
        noise = noise._replace(gumbel_TICP=gumbel_TICP, hard_I=jnp.arange(I) == 1)
    return noise


def fast(
    graph: Any,
    weights: Any,
    keys_IPA: Any,
    values_IPD: Any,
    carry: Carry,
    words_TICG: Any,
    noise: CellNoise = NO_CELL_NOISE,
) -> CellOutputs:
    """Runs `unroll`."""
    cell = nnx.merge(graph, nnx.State(weights))
    return unroll(cell, Memory(values_IPD, attention.exp_keys(keys_IPA)), carry, words_TICG, noise)


def stepwise(
    graph: Any,
    weights: Any,
    keys_IPA: Any,
    values_IPD: Any,
    carry: Carry,
    words_TICG: Any,
    noise: CellNoise = NO_CELL_NOISE,
) -> CellOutputs:
    """Calls the cell in a Python loop over the tokens."""
    cell = nnx.merge(graph, nnx.State(weights))
    found = []
    for t, words_ICG in enumerate(words_TICG):
        alpha_ICP, gumbel_ICP = jax.tree.map(lambda x, t=t: x[t], (noise.alpha_TICP, noise.gumbel_TICP))
        memory = Memory(values_IPD, attention.exp_keys(keys_IPA))
        of_token = StepNoise(noise.hidden_ICH, alpha_ICP, gumbel_ICP, noise.hard_I)
        carry, alpha_ICP, context_ICD = cell(memory, carry, cell.split(words_ICG), of_token)
        found.append(CellOutputs(carry.hidden_ICH, alpha_ICP, context_ICD))
    return jax.tree.map(lambda *x: jnp.stack(x), *found)


def gradients(run: Any, graph: Any, arguments: list, noise: CellNoise = NO_CELL_NOISE) -> Any:
    """Returns the gradients of a random linear function of hidden states, attention weights and contexts."""

    def total(*arguments: Any) -> jax.Array:
        rng = np.random.default_rng(1)
        outputs = run(graph, *arguments, noise=noise)
        return jnp.stack([(x * rng.standard_normal(x.shape).astype(np.float32)).sum() for x in outputs]).sum()

    return jax.jit(jax.grad(total, (0, 1, 2, 3, 4)))(*arguments)


def assert_near(ours: Any, expected: Any, tolerance: float) -> None:
    """Asserts that every leaf has the expected dtype, and is near its expected value.

    No number differs by more than `tolerance` times the largest number of its leaf.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, 0, tolerance * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("cell", "gate", "tokens", "drawn"), CASES)
def test_outputs_equal_those_of_the_loop(cell, gate, tokens, drawn):
    graph, arguments = make(cell, gate, tokens)
    noise = noise_of(drawn, tokens)
    outputs = fast(graph, *arguments, noise=noise)
    assert [x.shape for x in outputs] == [(tokens, I, C, H), (tokens, I, C, P), (tokens, I, C, D)]
    assert_near(outputs, stepwise(graph, *arguments, noise=noise), 1e-6)
    if drawn != "nothing":
        assert np.abs(outputs.hidden_TICH - fast(graph, *arguments).hidden_TICH).max() > 0.1


@pytest.mark.parametrize(("cell", "gate", "tokens", "drawn"), CASES)
def test_gradients_equal_those_of_the_loop(cell, gate, tokens, drawn):
    """Of every weight, the keys, the values, the first state and the words. The loss depends on all outputs."""
    graph, arguments = make(cell, gate, tokens)
    noise = noise_of(drawn, tokens)
    assert_near(gradients(fast, graph, arguments, noise), gradients(stepwise, graph, arguments, noise), 5e-6)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_masks_of_ones_and_no_hard_image_change_nothing(cell):
    graph, arguments = make(cell, True, 4)
    kept = CellNoise(
        jnp.ones((I, C, H)), jnp.ones((4, I, C, P)), noise_of("positions", 4).gumbel_TICP, hard_I=jnp.zeros(I, bool)
    )
    assert_near(fast(graph, *arguments, noise=kept), fast(graph, *arguments), 1e-7)


def test_the_mask_of_the_state_applies_to_the_recurrent_product_alone():
    """With a mask of zeros the recurrent kernel has no effect. The state itself still reaches the next token."""
    graph, (weights, keys_IPA, values_IPD, carry, words_TICG) = make("gru", False, 4)
    noise = CellNoise(hidden_ICH=jnp.zeros((I, C, H)))
    recurrent = weights["recurrent"] | {"kernel": jnp.zeros_like(weights["recurrent"]["kernel"])}
    arguments = [keys_IPA, values_IPD, carry, words_TICG]
    outputs = fast(graph, weights, *arguments, noise=noise)
    assert_near(outputs, fast(graph, weights | {"recurrent": recurrent}, *arguments), 1e-6)
    arguments[2] = carry._replace(hidden_ICH=carry.hidden_ICH + 1)
    other = fast(graph, weights, *arguments, noise=noise)
    assert np.abs(other.hidden_TICH - outputs.hidden_TICH).max() > 0.01


def test_a_hard_image_uses_one_position_and_a_soft_image_the_weighted_sum():
    """`choose` draws the position from the attention weights that the cell returns."""
    graph, arguments = make("gru", False, 4)
    noise = noise_of("positions", 4)
    outputs = fast(graph, *arguments, noise=noise)
    values_IPD = arguments[2]
    sums_TICD = jnp.einsum("ticp,ipd->ticd", outputs.alpha_TICP, values_IPD)
    np.testing.assert_allclose(outputs.context_TICD[:, 0], sums_TICD[:, 0], atol=1e-5)
    assert noise.gumbel_TICP is not None
    chosen_TCP = np.asarray(hard_attention.choose(outputs.alpha_TICP, noise.gumbel_TICP))[:, 1]
    assert (chosen_TCP.sum(-1) == 1).all()
    assert len(set(chosen_TCP.argmax(-1).ravel())) > 2
    np.testing.assert_array_equal(outputs.context_TICD[:, 1], values_IPD[1][chosen_TCP.argmax(-1)])


def test_positions_are_drawn_with_the_weights_as_probabilities():
    alpha_P = jnp.array([0.5, 0.3, 0.15, 0.05, 0.0])
    gumbel = jax.random.gumbel(jax.random.key(0), (20_000, 5))
    chosen = hard_attention.choose(jnp.broadcast_to(alpha_P, gumbel.shape), gumbel)
    np.testing.assert_allclose(chosen.mean(0), alpha_P, atol=0.01)
    assert chosen[:, 4].sum() == 0


def test_the_forward_pass_is_the_same_with_and_without_gradients():
    graph, arguments = make("lstm", True, 4)
    outputs, _ = jax.vjp(lambda *args: fast(graph, *args), *arguments)
    assert_near(outputs, fast(graph, *arguments), 1e-6)


def test_in_bfloat16_the_large_kernels_gradients_are_float32_and_near_the_loops():
    """They are within 3% of the float32 loop's. Every other argument's gradient has the dtype of the argument."""
    half_graph, half = make("gru", True, 4, "bfloat16")
    graph, _ = make("gru", True, 4)
    ours = gradients(fast, half_graph, half)
    expected = gradients(stepwise, graph, [half[0], *jax.tree.map(lambda x: x.astype(jnp.float32), half[1:])])
    assert {x.dtype for x in jax.tree.leaves(ours[0])} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(ours[1:])} == {jnp.dtype("bfloat16")}
    for name in ("recurrent", "context"):
        assert_near(ours[0][name]["kernel"], expected[0][name]["kernel"], 0.03)


def test_no_gradient_of_a_large_kernel_is_summed_inside_a_scan():
    """A scan that sums a gradient carries it, and returns an array of the kernel's shape."""
    graph, arguments = make("gru", False, 4)
    kernels = {arguments[0][name]["kernel"].shape for name in ("recurrent", "context")}

    def returned_by_scans(run: Any) -> set:
        text = jax.make_jaxpr(lambda *args: jax.grad(lambda *a: run(graph, *a)[0].sum())(*args))(*arguments)
        return {v.aval.shape for eqn in _equations(text.jaxpr) if eqn.primitive.name == "scan" for v in eqn.outvars}

    def scanned(graph, weights, keys_IPA, values_IPD, carry, words_TICG):
        """Runs the cell in a scan that JAX differentiates."""
        memory = Memory(values_IPD, attention.exp_keys(keys_IPA))

        def body(carry, words_ICG):
            cell = nnx.merge(graph, nnx.State(weights))
            carry, alpha_ICP, _ = cell(memory, carry, cell.split(words_ICG))
            return carry, (carry.hidden_ICH, alpha_ICP)

        return jax.lax.scan(body, carry, words_TICG)[1]

    assert returned_by_scans(scanned) >= kernels
    assert not returned_by_scans(fast) & kernels


def _equations(jaxpr: Any) -> list:
    """Returns the equations of a jaxpr and of the jaxprs inside it."""
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += _equations(inner)
    return found
