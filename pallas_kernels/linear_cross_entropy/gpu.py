"""No GPU kernel here: `xla` computes the logits of one chunk of tokens at a time with cuBLAS matmuls, most of the work."""


def unsupported(x_TD, w, labels_T, soft_cap, w_layout):
    """Why this kernel cannot run these inputs: always a sentence."""
    return "there is no GPU kernel of this op; the chunks of 'xla' are cuBLAS matmuls and keep the logits out of memory too"
