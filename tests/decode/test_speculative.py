"""Self-speculative decoding gives what decoding token by token gives; its drafts are those of the training form; states roll back."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effmodels.config import ConfigError
from effmodels.decode import generate, speculate
from effmodels.decode.speculative import accepted, stream
from effmodels.layers.context import Ctx
from effmodels.mixers.registry import get_mixer
from effmodels.models import Decoder, ModelConfig
from effmodels.models import state as model_state
from tests.contract.cases import MIXERS, decode_ctx, draw, fill, jit, make

V, NEW, DEPTH = 5, 11, 2
CONFIG = ModelConfig(
    vocab_size=V, d_model=16, num_layers=2, pattern=("retention", "local"), channel=("mlp", "moe"),
    mixers={"retention": {"num_heads": 2, "chunk": 4}, "local": {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "window": 4}},
    channels={"mlp": {"hidden": 16}, "moe": {"num_experts": 3, "top_k": 2, "hidden": 8}}, mtp={"depth": DEPTH},
    implementation="reference",
)  # fmt: skip
FULL = {"pattern": ("attention",), "channel": ("mlp",), "mixers": {"attention": {"num_heads": 2}}, "channels": {"mlp": {"hidden": 16}}}
CONFIGS = {
    "recurrent": CONFIG,  # its states cannot give a token back
    "cached": dataclasses.replace(CONFIG, **FULL),
    "parallel": dataclasses.replace(CONFIG, **FULL, mtp={"depth": DEPTH, "form": "parallel"}),
}
LENGTHS = np.array([6, 1])
PROMPTS = np.random.default_rng(0).integers(1, V, (2, 6)).astype(np.int32) * (np.arange(6) < LENGTHS[:, None])


def model_of(config, seed=1):
    graphdef, *arrays = fill(lambda: Decoder(config, rngs=nnx.Rngs(0)), seed)
    return model_state.merge(graphdef, *jax.tree.map(jnp.asarray, arrays))


def drafts_of(model):
    """A function (tokens [L], number of certain ones) -> drafts [DEPTH], by whole rows in the training form."""
    graphdef, *arrays = model_state.split(model)

    @jit
    def drafts(params, buffers, tokens_L, certain):
        model = model_state.merge(graphdef, params, buffers)
        last, found = certain - 2, []  # the last token whose output is there when the next one is known
        main, _ = model.hidden(tokens_L[None], mode="eval")
        hidden = main
        for k, module in enumerate(model.mtp, start=1):
            hidden, _ = module(hidden if module.sequential else main, model.embedded(jnp.roll(tokens_L, -k)[None]), Ctx(mode="eval"))
            found.append(jnp.argmax(model.logits(hidden)[0, last]))
            tokens_L = tokens_L.at[certain - 1 + k].set(found[-1])
        return jnp.stack(found)

    return lambda tokens_L, certain: np.asarray(drafts(*arrays, tokens_L, certain))


# Seeds of models that guess some of their own tokens right and some wrong.
@pytest.mark.parametrize(
    "name, seed", [("parallel", 1), *(pytest.param(*c, marks=pytest.mark.slow) for c in (("recurrent", 1), ("cached", 2)))]
)
def test_greedy_tokens_and_drafts(name, seed):
    model = model_of(CONFIGS[name], seed)
    want = np.asarray(generate(model, PROMPTS, NEW, lengths_B=LENGTHS))
    got, report = speculate(model, PROMPTS, NEW, lengths_B=LENGTHS)
    assert np.array_equal(got, want)
    assert 0 < report.accepted < report.drafted, "all or none of the drafts were right: proves little"
    drafts, counts = drafts_of(model), [[] for _ in LENGTHS]
    for _, count_B in stream(model, PROMPTS, NEW, lengths_B=LENGTHS):
        for row, count in enumerate(count_B):
            counts[row] += [int(count)] if count else []
    for row, length in enumerate(LENGTHS):
        certain, expected = length + 1, [1]
        while (left := length + NEW - certain) > 0:
            tokens = np.pad(np.where(np.arange(6 + NEW) < certain, want[row], 0), (0, DEPTH))
            right = drafts(tokens, certain) == np.pad(want[row], (0, DEPTH))[certain : certain + DEPTH]
            expected.append(min(int(np.cumprod(right).sum()) + 1, left))
            certain += expected[-1]
        assert counts[row] == expected, (row, counts[row], expected)


def test_stops_at_eos_and_draws_at_low_temperature():
    model = model_of(CONFIGS["parallel"])
    plain = np.asarray(generate(model, PROMPTS, NEW, lengths_B=LENGTHS))
    eos = int(plain[0, LENGTHS[0] + 3])
    want = np.asarray(generate(model, PROMPTS, NEW, lengths_B=LENGTHS, eos_id=eos))
    assert np.array_equal(speculate(model, PROMPTS, NEW, lengths_B=LENGTHS, eos_id=eos)[0], want)
    cold, report = speculate(model, PROMPTS, NEW, lengths_B=LENGTHS, temperature=1e-4, top_k=3, key=jax.random.key(0))
    assert np.array_equal(cold, plain) and report.accepted


def test_accepted_tokens_have_the_distribution_of_the_model():
    """Exactly, whatever drafts; after the first draw the next tokens are the model's given that the earlier drafts stayed."""
    draws, V, K = 40_000, 4, 2
    rng = np.random.default_rng(0)
    p, q = 1.5 * rng.normal(size=(K + 1, V)), 1.5 * rng.normal(size=(K, V))
    p[1, 2] = q[0, 1] = -np.inf

    @jit
    def run(keys):
        def one(key):
            drafts = jax.random.categorical(jax.random.fold_in(key, 7), q, axis=-1)[None]
            tokens, count = accepted(drafts, jnp.asarray(q)[None], jnp.asarray(p)[None], key)
            return tokens[0], count[0]

        return jax.vmap(one)(keys)

    tokens, count = jax.device_get(run(jax.random.split(jax.random.key(1), draws)))
    for place in range(K + 1):
        reached = tokens[count > place, place]
        shares, want = np.bincount(reached, minlength=V) / reached.size, np.asarray(jax.nn.softmax(p[place]))
        assert np.all(np.abs(shares - want) < 5 * np.sqrt(want * (1 - want) / reached.size) + 1e-9), (place, shares, want)
    kept = np.minimum(jax.nn.softmax(p[0]), jax.nn.softmax(q[0])).sum()
    assert abs(np.mean(count > 1) - kept) < 0.02


@pytest.mark.parametrize("kind", [kind for kind in MIXERS if get_mixer(kind).rolls_back(get_mixer(kind).Config())])
def test_tokens_counted_out_leave_no_trace(kind, x64):
    graphdef, params, _ = make(kind, {})
    mixer, x = model_state.merge(graphdef, params, {}), draw(2, 8, 32)
    state = mixer.init_state(2, 8, jnp.float64)

    @jit
    def both(state, x):
        ones = jnp.ones((2, 3), bool)
        _, state = mixer.prefill(x[:, :3], decode_ctx(ones), state, ones)
        _, further = mixer.prefill(x[:, 3:6], decode_ctx(ones, 3), state, ones)
        again = ones[:, :2]
        return [mixer.prefill(x[:, 6:], decode_ctx(again, 3), s, again)[0] for s in (state, further)]

    never, counted_out = both(state, x)
    assert np.array_equal(never, counted_out)


def test_states_that_forget_say_so():
    for kind, fields in (("attention", {"window": 4}), ("retention", {}), ("local_global", {}), ("gated_delta", {}), ("ssd", {})):
        cls = get_mixer(kind)
        assert not cls.rolls_back(cls.Config(**fields)), kind


def test_a_model_without_modules_is_refused():
    with pytest.raises(ConfigError, match=r"no modules that predict further tokens \(model.mtp\); use `generate`"):
        speculate(model_of(dataclasses.replace(CONFIG, mtp={})), PROMPTS, 2)
    with pytest.raises(ValueError, match="temperature > 0 draws at random"):
        speculate(model_of(CONFIGS["cached"]), PROMPTS, 2, temperature=1.0)
