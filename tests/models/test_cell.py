"""`unroll`, whose large kernels get their gradients after the scan, is the cell called once a token, noise and all."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxcap.config import Model
from flaxcap.models import attention
from flaxcap.models.cell import NO_NOISE, Carry, Cell, Memory, Noise, Seen, place, unroll

I, C, P, E, A, H = 2, 3, 5, 6, 7, 8
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
        ("gru", False, 4, "places"),
        ("lstm", True, 4, "both"),
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


def noise_of(drawn: str, tokens: int) -> Noise:
    """Masks of the state and of the attention weights, places that one of the images looks at, both or neither."""
    rng = np.random.default_rng(2)

    def mask(*shape: int) -> jax.Array:
        return jnp.asarray(2.0 * rng.integers(0, 2, shape), jnp.float32)

    found = NO_NOISE
    if drawn in ("masks", "both"):
        found = found._replace(hidden_ICH=mask(I, C, H), alpha_TICP=mask(tokens, I, C, P))
    if drawn in ("places", "both"):
        gumbel_TICP = jnp.asarray(rng.gumbel(size=(tokens, I, C, P)), jnp.float32)
        found = found._replace(gumbel_TICP=gumbel_TICP, hard_I=jnp.arange(I) == 1)
    return found


def fast(
    graph: Any,
    weights: Any,
    keys_IPA: Any,
    values_IPE: Any,
    carry: Carry,
    words_TICG: Any,
    noise: Noise = NO_NOISE,
) -> Seen:
    """Hidden states [T, I, C, H], attention weights [T, I, C, P] and what was seen [T, I, C, E]."""
    cell = nnx.merge(graph, nnx.State(weights))
    return unroll(cell, Memory(values_IPE, attention.exp_keys(keys_IPA)), carry, words_TICG, noise)


def stepwise(
    graph: Any,
    weights: Any,
    keys_IPA: Any,
    values_IPE: Any,
    carry: Carry,
    words_TICG: Any,
    noise: Noise = NO_NOISE,
) -> Seen:
    """The same by a loop."""
    cell = nnx.merge(graph, nnx.State(weights))
    found = []
    for t, word_ICG in enumerate(words_TICG):
        drawn = jax.tree.map(lambda x, t=t: x[t], (noise.alpha_TICP, noise.gumbel_TICP))
        memory = Memory(values_IPE, attention.exp_keys(keys_IPA))
        carry, alpha_ICP, context_ICE = cell(memory, carry, word_ICG, noise.at(drawn))
        found.append(Seen(carry.hidden_ICH, alpha_ICP, context_ICE))
    return jax.tree.map(lambda *x: jnp.stack(x), *found)


def gradients(run: Any, graph: Any, arguments: list, noise: Noise = NO_NOISE) -> Any:
    """Of a random weighing of all hidden states, attention weights and what was seen."""

    def total(*arguments: Any) -> jax.Array:
        rng = np.random.default_rng(1)
        found = run(graph, *arguments, noise=noise)
        return jnp.stack([(x * rng.standard_normal(x.shape).astype(np.float32)).sum() for x in found]).sum()

    return jax.jit(jax.grad(total, (0, 1, 2, 3, 4)))(*arguments)


def assert_near(ours: Any, expected: Any, tolerance: float) -> None:
    """Every leaf within `tolerance` of its largest value, and of the same type."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, 0, tolerance * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("cell", "gate", "tokens", "drawn"), CASES)
def test_states_and_weights_are_those_of_the_cell_called_once_a_token(cell, gate, tokens, drawn):
    graph, arguments = make(cell, gate, tokens)
    noise = noise_of(drawn, tokens)
    seen = fast(graph, *arguments, noise=noise)
    assert [x.shape for x in seen] == [(tokens, I, C, H), (tokens, I, C, P), (tokens, I, C, E)]
    assert_near(seen, stepwise(graph, *arguments, noise=noise), 1e-6)
    if drawn != "nothing":
        assert np.abs(seen.hidden_TICH - fast(graph, *arguments).hidden_TICH).max() > 0.1


@pytest.mark.parametrize(("cell", "gate", "tokens", "drawn"), CASES)
def test_gradients_are_those_of_the_loop(cell, gate, tokens, drawn):
    """By every weight, the keys and values, the first state and the words; attention weights take part in the loss."""
    graph, arguments = make(cell, gate, tokens)
    noise = noise_of(drawn, tokens)
    assert_near(gradients(fast, graph, arguments, noise), gradients(stepwise, graph, arguments, noise), 5e-6)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_noise_that_hides_nothing_changes_nothing(cell):
    graph, arguments = make(cell, True, 4)
    kept = Noise(
        jnp.ones((I, C, H)), jnp.ones((4, I, C, P)), noise_of("places", 4).gumbel_TICP, hard_I=jnp.zeros(I, bool)
    )
    assert_near(fast(graph, *arguments, noise=kept), fast(graph, *arguments), 1e-7)


def test_the_mask_of_the_state_hides_it_from_the_recurrent_product_alone():
    """With nothing of it left, what stands in the recurrent kernel does not matter; the state is still carried on."""
    graph, (weights, keys_IPA, values_IPE, carry, words_TICG) = make("gru", False, 4)
    noise = Noise(hidden_ICH=jnp.zeros((I, C, H)))
    recurrent = weights["recurrent"] | {"kernel": jnp.zeros_like(weights["recurrent"]["kernel"])}
    arguments = [keys_IPA, values_IPE, carry, words_TICG]
    seen = fast(graph, weights, *arguments, noise=noise)
    assert_near(seen, fast(graph, weights | {"recurrent": recurrent}, *arguments), 1e-6)
    arguments[2] = carry._replace(hidden_ICH=carry.hidden_ICH + 1)
    other = fast(graph, weights, *arguments, noise=noise)
    assert np.abs(other.hidden_TICH - seen.hidden_TICH).max() > 0.01


def test_a_hard_image_sees_one_place_and_a_soft_one_all():
    """The place that is looked at is `place`'s, of the weights that are returned; the others keep the weighted sum."""
    graph, arguments = make("gru", False, 4)
    noise = noise_of("places", 4)
    seen = fast(graph, *arguments, noise=noise)
    values_IPE = arguments[2]
    sums_TICE = jnp.einsum("ticp,ipe->tice", seen.alpha_TICP, values_IPE)
    np.testing.assert_allclose(seen.context_TICE[:, 0], sums_TICE[:, 0], atol=1e-5)
    assert noise.gumbel_TICP is not None
    best_TCP = np.asarray(place(seen.alpha_TICP, noise.gumbel_TICP))[:, 1]
    assert (best_TCP.sum(-1) == 1).all()
    assert len(set(best_TCP.argmax(-1).ravel())) > 2
    np.testing.assert_array_equal(seen.context_TICE[:, 1], values_IPE[1][best_TCP.argmax(-1)])


def test_places_are_drawn_with_the_weights_as_probabilities():
    alpha_P = jnp.array([0.5, 0.3, 0.15, 0.05, 0.0])
    gumbel_NP = jax.random.gumbel(jax.random.key(0), (20_000, 5))
    found = place(jnp.broadcast_to(alpha_P, gumbel_NP.shape), gumbel_NP)
    np.testing.assert_allclose(found.mean(0), alpha_P, atol=0.01)
    assert found[:, 4].sum() == 0


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
        memory = Memory(values_IPE, attention.exp_keys(keys_IPA))

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
