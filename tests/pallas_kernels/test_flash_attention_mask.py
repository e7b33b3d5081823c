"""Which keys are the first of their segment: blocks compared with each other against a count over all pairs, for any ids and positions."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import mask


def first_by_pairs(segment_BS, position_BS, count):
    """The definition, a pair at a time: of the same segment, not empty, and before in (position, place)."""
    place = np.arange(segment_BS.shape[1])
    real = (position_BS >= 0) & (segment_BS != 0)
    same = (segment_BS[:, :, None] == segment_BS[:, None]) & real[:, None]
    position = position_BS[:, :, None], position_BS[:, None]
    before = (position[1] < position[0]) | ((position[1] == position[0]) & (place < place[:, None]))
    return real & ((same & before).sum(-1) < count)


def segments(kind, B, S, draw):
    """Ids as data has them: in order, coming back after others, with gaps of padding, in any order."""
    runs = np.stack([np.repeat(np.arange(S), draw.integers(1, 40, S))[:S] for _ in range(B)])
    return {"in order": runs + 1, "one": np.ones((B, S), int), "coming back": runs % 5, "negative": runs % 7 - 3,
            "any order": draw.integers(-2, 4, (B, S))}[kind]


def positions(kind, B, S, draw):
    """Order indices: none given, permuted, two far chunks of a longer row, some equal and some empty."""
    return {"none": np.broadcast_to(np.arange(S), (B, S)), "permuted": np.stack([draw.permutation(S) for _ in range(B)]),
            "zigzag": np.broadcast_to(np.where(np.arange(S) < S // 2, 0, 3 * S) + np.arange(S), (B, S)),
            "equal and empty": draw.integers(-1, S // 3 + 1, (B, S))}[kind]


@pytest.mark.parametrize("order", ["none", "permuted", "zigzag", "equal and empty"])
@pytest.mark.parametrize("S, block", [(200, 16), (131, 512), (1, 512)])
def test_first_of_a_segment(S, block, order, monkeypatch):
    """Also where a segment lies in many blocks, or fewer keys come first than a block holds, or more."""
    monkeypatch.setattr(mask, "_BLOCK", block)
    draw = np.random.default_rng(S)
    for count in (1, 3, 40):
        first = jax.jit(lambda segment, position: mask._first_in_segment(mask.Index(None, segment, None, position), position, count))  # noqa: B023
        for kind in ("in order", "one", "coming back", "negative", "any order"):
            segment, position = segments(kind, 3, S, draw), positions(order, 3, S, draw)
            got = first(jnp.asarray(segment, jnp.int32), jnp.asarray(position, jnp.int32))
            np.testing.assert_array_equal(got, first_by_pairs(segment, position, count), err_msg=f"{kind}, first {count}")


def test_blocks_that_hold_nothing_earlier_are_not_compared(monkeypatch):
    """Documents in order need two rounds of comparisons, whatever their number and length."""
    monkeypatch.setattr(mask, "_BLOCK", 16)
    rounds = []
    monkeypatch.setattr(jax.lax, "while_loop", lambda test, body, carry: _counted(test, body, carry, rounds))
    segment = jnp.asarray(np.repeat([1, 2, 3, 4], [100, 7, 3, 146])[None], jnp.int32)
    mask._first_in_segment(mask.Index(None, segment), jnp.arange(256, dtype=jnp.int32), 4)
    assert rounds == [2]


def _counted(test, body, carry, rounds):
    n = 0
    while test(carry):
        carry, n = body(carry), n + 1
    rounds.append(n)
    return carry


@pytest.mark.parametrize("T, S", [(7, 7), (12, 5), (5, 12)])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window, global_tokens", [(None, 0), (0, 0), (3, 0), (3, 2), (1, 20)])
def test_visible_pairs_are_counted_as_the_mask_shows_them(T, S, is_causal, window, global_tokens):
    spec = mask.Spec(is_causal, window, global_tokens, None, 1.0)
    assert mask.visible_pairs(T, S, spec) == int(mask.visible(*mask.sides(mask.Index(), T, S, spec), spec).sum())
