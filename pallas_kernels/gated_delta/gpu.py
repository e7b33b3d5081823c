"""No GPU kernel here: `xla` is matrix products of chunks."""


def unsupported(q_BTNH, k_BTNH, v_BTNP, log_decay_BTN, beta_BTN, initial_state, segment_ids, chunk_size, scale):
    """Why this kernel cannot run these inputs: always a sentence."""
    return "there is no GPU kernel of this op; 'xla' is matrix products of chunks"
