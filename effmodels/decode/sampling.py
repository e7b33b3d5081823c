"""From logits to the next token. Letters: B batch, V vocab."""
import jax
import jax.numpy as jnp


def sample(logits_BV, key=None, *, temperature=0.0, top_k=None, top_p=None, vocab_size=None):
    """int32 tokens [B]. temperature 0: the most likely one (no key needed); else a draw from softmax(logits / temperature).

    top_k: among the k most likely. top_p: among the fewest whose probabilities sum to at least p (arXiv:1904.09751), after top_k.
    vocab_size: only ids below it (a model's table may be larger than its tokenizer's). Raises ValueError for values out of range.
    """
    check(temperature, top_k, top_p)
    logits_BV = adjusted(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, vocab_size=vocab_size)
    if temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def adjusted(logits_BV, *, temperature=0.0, top_k=None, top_p=None, vocab_size=None):
    """Logits [..., V] whose softmax `sample` draws from (temperature 0: whose largest it takes); what is excluded is -inf."""
    if vocab_size is not None and vocab_size < logits_BV.shape[-1]:
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)
    if temperature == 0.0:
        return logits_BV
    logits_BV = logits_BV / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][..., -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if top_p is not None and top_p < 1.0:
        logits_BV = _nucleus(logits_BV, top_p)
    return logits_BV


def _nucleus(logits_BV, top_p):
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    probabilities_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    # A token stays if those before it do not yet reach p: the first always stays.
    keep_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV < top_p
    keep_BV = jnp.take_along_axis(keep_BV, jnp.argsort(order_BV, axis=-1), axis=-1)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def check(temperature, top_k, top_p):
    """Raises ValueError, naming the value, when a sampling option is out of range."""
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: expected 0 (most likely token) or a positive number.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: expected at least 1, or None for all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: expected a number in (0, 1], or None.")
