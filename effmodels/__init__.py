"""effmodels: efficient large models in JAX, from one config language: train, plan, verify, compare, generate."""

__version__ = "0.1.0"
