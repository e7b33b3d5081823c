"""Weights from and to the outside: Hugging Face folders in, Hugging Face folders out."""
from effmodels.interop.errors import InteropError
from effmodels.interop.load import load_pretrained, pretrained_config
from effmodels.interop.save import save_pretrained

__all__ = ["InteropError", "load_pretrained", "pretrained_config", "save_pretrained"]
