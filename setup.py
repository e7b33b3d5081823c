"""Packaging of effmodels: `pip install -e .`; the extras are listed at the bottom."""
import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

# One line of pins serves both version columns: Python 3.11 resolves to jax 0.10 + flax 0.12.8,
# Python 3.12 and newer to jax 0.12 + flax 0.12.12.
BASE = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "chex>=0.1.92,<0.2",
    "ml-collections>=1.1,<2",
    "tensorflow-datasets>=4.9.10,<5",
    "importlib_resources>=6",  # tensorflow-datasets imports it without declaring it
    "grain>=0.2.18,<0.3",
    "array_record>=0.8.3",
    "tokenizers>=0.22,<0.24",
    "rich>=14",
]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100,<7", "ruff>=0.8", "jupytext>=1.16", "nbclient>=0.10",
        "nbformat>=5", "ipykernel>=6", "matplotlib>=3.8", "tensorboard>=2.20,<3", "sentencepiece>=0.2.1,<0.3"]

setup(
    name="effmodels",
    version="0.1.0",
    description="Efficient large models in JAX: retention, linear attention, MoE; trained, planned and verified from one config.",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["effmodels*", "pallas_kernels*", "experiments*", "configs*"]),
    install_requires=BASE,
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.13", "gcsfs>=2024"],  # gcsfs: a gs:// workdir
        "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
        # The TPU compiler on a machine without a TPU; each jax names the libtpu that it was released with.
        "plan": ["jax[tpu]>=0.10.2,<0.13"],
        "tensorboard": ["tensorboard>=2.20,<3"],
        "sentencepiece": ["sentencepiece>=0.2.1,<0.3"],
        "notebook": ["matplotlib>=3.8"],
        "test": TEST,
        "dev": TEST,
    },
)
