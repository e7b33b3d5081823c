"""Caches in a stack, written where they lie: the same bits as caches that are cut out and put back, without the copies."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.mixers.attention import KVCache
from effmodels.mixers.caches import Layer, layer_of, put, stacked, whole
from effmodels.mixers.retention import RetentionState
from effmodels.models import Decoder, ModelConfig, blocks
from effmodels.models import state as model_state
from effmodels.parallel import stack
from tests.contract.cases import all_kinds_config, draw, fill, jit

R, B, S = 3, 2, 5


def bits(tree):
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


@pytest.mark.parametrize("slots", [[[1], [4]], [[0, 2, S], [S, 1, 3]]])  # one token, and three of which a row drops one
def test_a_layer_of_a_stack_is_written_as_it_would_be_alone(slots):
    cache, new = draw(R, B, S, 3, dtype=np.float32), draw(B, len(slots[0]), 3, seed=1)
    for layer in range(R):
        written = jax.jit(lambda c, r: put(Layer(c, r), np.array(slots), new).stack)(cache, layer)
        want = cache.copy()
        for b, row in enumerate(slots):
            for t, slot in enumerate(row):
                if slot < S:
                    want[layer, b, slot] = new[b, t]
        assert bits(written) == bits(want)
        assert bits(put(jnp.asarray(cache[layer]), np.array(slots), new)) == bits(want[layer]) == bits(whole(Layer(written, layer)))
        assert (Layer(cache, layer).shape, Layer(cache, layer).dtype) == ((B, S, 3), np.float32)


def test_only_caches_stay_in_their_stack():
    """A recurrent state is read and written whole; other layers keep theirs."""
    caches = KVCache(*(jnp.asarray(draw(R, B, S, 1, 2, seed=i)) for i in range(2)), jnp.zeros((R, B, S), jnp.int32))
    states = caches, RetentionState(jnp.asarray(draw(R, B, 4)))
    cache, recurrent = layer_of(states, 1)
    assert isinstance(cache.k_BSKH, Layer) and bits(recurrent) == bits(states[1].s_BNHP[1])
    new = KVCache(put(cache.k_BSKH, np.array([[0], [1]]), np.ones((B, 1, 1, 2))), cache.v_BSKH, whole(cache.index_BS) + 7)
    k, v, index, s = jax.tree.leaves(stacked(states, (new, RetentionState(2 * recurrent.s_BNHP)), 1))
    assert bits(v) == bits(caches.v_BSKH) and bits(k[::2]) == bits(caches.k_BSKH[::2]) and (k[1, 1, 1] == 1).all()
    assert np.array_equal(index, [[[0] * S] * B, [[7] * S] * B, [[0] * S] * B])
    assert bits(s[1]) == bits(2 * states[1].s_BNHP[1]) and bits(s[::2]) == bits(states[1].s_BNHP[::2])


def cut_out(self, x, ctx, states, call, shared):
    """`Segment.decode` with every layer's state as a slice that goes into the loop and comes out of it: the slow twin."""

    def body(blocks_, x, xs, shared):
        first_layer, old = xs
        new = []
        for p, block in enumerate(blocks._bound(blocks_, self.sources, shared)):
            x, state = call(block, x, ctx.at_layer(first_layer + p), old[p])
            new.append(state)
        return x, tuple(new)

    return stack.scan(body, blocks.Period(self.blocks), x, (self._first_layers(), states), shared=shared)


def step_of(config, batch, slots):
    """(jitted step that gives its state back, its arguments as shapes)."""
    graphdef, *arrays = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda: model_state.merge(graphdef, *arrays).init_state(batch, slots))

    def run(params, buffers, tokens_B, state):
        logits_BV, state = model_state.merge(graphdef, params, buffers).step(tokens_B, state)
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), state

    return jax.jit(run, donate_argnums=3), (*arrays, jax.ShapeDtypeStruct((batch,), jnp.int32), state)


KINDS = {
    "some": (("attention", "latent", "retention"), {"attention": {"num_heads": 2, "window": 3}, "latent": {"num_heads": 2}}),
    "all": (None, {}),
}


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_in_place_is_the_same_as_cut_out(which, monkeypatch):
    """Logits and states of a padded prompt in two calls and of two steps, in one of which a row rests."""
    pattern, mixers = KINDS[which]
    fields = {} if pattern is None else {"pattern": pattern, "num_layers": 2 * len(pattern), "mixers": mixers, "channel": ("mlp",)}
    config = all_kinds_config(repeats=2, **fields, param_dtype="float32", compute_dtype="float32")
    graphdef, *arrays = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (2, 7)).astype(np.int32)
    valid = np.arange(7) < np.array([[7], [4]])

    def run(params, buffers):
        model = model_state.merge(graphdef, params, buffers)
        assert model.segments[0].repeats == 2
        one, state = model.prefill(tokens, model.init_state(2, 16), valid)
        two, state = model.prefill(tokens[:, :3], state)
        three, state = model.step(tokens[:, 0], state)
        four, state = model.step(tokens[:, 1], state, np.array([True, False]))
        return one[valid], two, three, four, state

    got = jit(run)(*arrays)
    monkeypatch.setattr(blocks.Segment, "decode", cut_out)
    want = jit(lambda *arrays: run(*arrays))(*arrays)
    assert bits(got) == bits(want)


def test_a_step_needs_no_second_cache(monkeypatch):
    """By the CPU compiler's report: temporaries stay below half of the stacked caches, of which a loop that returns slices keeps two."""
    config = ModelConfig(
        vocab_size=32, d_model=16, num_layers=16, pattern=("attention",), mixers={"attention": {"num_heads": 2}}, implementation="reference"
    )  # fmt: skip
    temporary = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(blocks.Segment, "decode", cut_out)
        step, arguments = step_of(config, 2, 4096)
        temporary.append(step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes)
    caches = 16 * 2 * 4096 * 2 * 16 * 4
    assert temporary[0] < 0.5 * caches < caches <= temporary[1]
