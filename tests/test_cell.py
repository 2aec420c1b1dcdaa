"""`unroll`, whose large kernels get their gradients after the scan, is the cell called once a token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxcap import attention
from flaxcap.cell import Carry, Cell, Memory, unroll
from flaxcap.config import Model

I, C, P, E, A, H = 2, 3, 5, 6, 7, 8
CASES = [
    pytest.param(cell, gate, tokens, id=f"{cell}-{'gate' if gate else 'plain'}-{tokens}")
    for cell, gate, tokens in (
        ("gru", False, 4),
        ("gru", True, 4),
        ("gru", False, 1),
        ("lstm", False, 4),
        ("lstm", True, 4),
        ("lstm", True, 1),
    )
]


def make(cell: str, gate: bool, tokens: int, dtype: str = "float32") -> tuple[Any, list]:
    """The cell's graph, and all that it can be differentiated by: weights, keys, values, carry, words_TICG."""
    config = Model(image_dim=E, attention_dim=A, hidden_dim=H, cell=cell, attention_gate=gate)
    graph, state = nnx.split(nnx.eval_shape(lambda: Cell(config, jnp.dtype(dtype), rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    weights = jax.tree.map(lambda x: 0.5 * normal(*x.shape).astype(jnp.float32), nnx.to_pure_dict(state))
    carry = Carry(normal(I, C, H), normal(I, C, H) if cell == "lstm" else None)
    words_TICG = normal(tokens, I, C, {"gru": 3, "lstm": 4}[cell] * H)
    return graph, [weights, normal(I, P, A), normal(I, P, E), carry, words_TICG]


def fast(graph: Any, weights: Any, keys_IPA: Any, values_IPE: Any, carry: Carry, words_TICG: Any) -> tuple:
    """Hidden states [T, I, C, H] and attention weights [T, I, C, P]."""
    cell = nnx.merge(graph, nnx.State(weights))
    return unroll(cell, Memory(values_IPE, attention.grow(keys_IPA)), carry, words_TICG)


def stepwise(graph: Any, weights: Any, keys_IPA: Any, values_IPE: Any, carry: Carry, words_TICG: Any) -> tuple:
    """The same by a loop."""
    cell = nnx.merge(graph, nnx.State(weights))
    hidden, alpha = [], []
    for word_ICG in words_TICG:
        carry, alpha_ICP, _ = cell(Memory(values_IPE, attention.grow(keys_IPA)), carry, word_ICG)
        hidden.append(carry.hidden_ICH)
        alpha.append(alpha_ICP)
    return jnp.stack(hidden), jnp.stack(alpha)


def gradients(run: Any, graph: Any, arguments: list) -> Any:
    """Of a random weighing of all hidden states and attention weights."""

    def total(*arguments: Any) -> jax.Array:
        rng = np.random.default_rng(1)
        hidden, alpha = ((x * rng.standard_normal(x.shape).astype(np.float32)).sum() for x in run(graph, *arguments))
        return hidden + alpha

    return jax.jit(jax.grad(total, (0, 1, 2, 3, 4)))(*arguments)


def assert_near(ours: Any, expected: Any, tolerance: float) -> None:
    """Every leaf within `tolerance` of its largest value, and of the same type."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, 0, tolerance * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("cell", "gate", "tokens"), CASES)
def test_states_and_weights_are_those_of_the_cell_called_once_a_token(cell, gate, tokens):
    graph, arguments = make(cell, gate, tokens)
    hidden_TICH, alpha_TICP = fast(graph, *arguments)
    assert (hidden_TICH.shape, alpha_TICP.shape) == ((tokens, I, C, H), (tokens, I, C, P))
    assert_near((hidden_TICH, alpha_TICP), stepwise(graph, *arguments), 1e-6)


@pytest.mark.parametrize(("cell", "gate", "tokens"), CASES)
def test_gradients_are_those_of_the_loop(cell, gate, tokens):
    """By every weight, the keys and values, the first state and the words; attention weights take part in the loss."""
    graph, arguments = make(cell, gate, tokens)
    assert_near(gradients(fast, graph, arguments), gradients(stepwise, graph, arguments), 5e-6)


def test_the_forward_pass_is_the_same_whether_gradients_are_taken_or_not():
    graph, arguments = make("lstm", True, 4)
    found, _ = jax.vjp(lambda *args: fast(graph, *args), *arguments)
    assert_near(found, fast(graph, *arguments), 1e-6)


def test_in_bfloat16_the_large_kernels_gradients_are_float32_and_near_the_loops():
    """Within 3% of the float32 loop's; all else has gradients of its own type."""
    half_graph, half = make("gru", True, 4, "bfloat16")
    graph, _ = make("gru", True, 4)
    ours = gradients(fast, half_graph, half)
    expected = gradients(stepwise, graph, [half[0], *jax.tree.map(lambda x: x.astype(jnp.float32), half[1:])])
    assert {x.dtype for x in jax.tree.leaves(ours[0])} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(ours[1:])} == {jnp.dtype("bfloat16")}
    for name in ("recurrent", "context"):
        assert_near(ours[0][name]["kernel"], expected[0][name]["kernel"], 0.03)


def test_no_gradient_of_a_large_kernel_is_summed_inside_a_scan():
    """What they are deferred for. A scan that sums one carries it, and returns an array of the kernel's shape."""
    graph, arguments = make("gru", False, 4)
    kernels = {arguments[0][name]["kernel"].shape for name in ("recurrent", "context")}

    def returned_by_scans(run: Any) -> set:
        text = jax.make_jaxpr(lambda *args: jax.grad(lambda *a: run(graph, *a)[0].sum())(*args))(*arguments)
        return {v.aval.shape for eqn in _equations(text.jaxpr) if eqn.primitive.name == "scan" for v in eqn.outvars}

    def scanned(graph, weights, keys_IPA, values_IPE, carry, words_TICG):
        """The loop as a scan that JAX differentiates."""
        memory = Memory(values_IPE, attention.grow(keys_IPA))

        def body(carry, word_ICG):
            carry, alpha_ICP, _ = nnx.merge(graph, nnx.State(weights))(memory, carry, word_ICG)
            return carry, (carry.hidden_ICH, alpha_ICP)

        return jax.lax.scan(body, carry, words_TICG)[1]

    assert returned_by_scans(scanned) >= kernels
    assert not returned_by_scans(fast) & kernels


def _equations(jaxpr: Any) -> list:
    """All of a jaxpr, inner ones included."""
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += _equations(inner)
    return found
