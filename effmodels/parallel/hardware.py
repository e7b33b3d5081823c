"""What the layers may ask about the hardware that the program being traced is for."""
from pallas_kernels.target import target


def on_tpu():
    """Whether it is a TPU: of a mesh, its devices, else the default backend."""
    return target().platform == "tpu"
