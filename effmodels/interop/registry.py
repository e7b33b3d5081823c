"""The families by the `model_type` of their config.json. A new one is a file of families/ and a line here."""
import importlib

from effmodels.config import nearest
from effmodels.interop.errors import InteropError

FAMILIES = {
    "llama": "effmodels.interop.families.llama:LLAMA",
    "gpt2": "effmodels.interop.families.gpt2:GPT2",
    "gpt_neox": "effmodels.interop.families.gpt_neox:GPT_NEOX",
    "mistral": "effmodels.interop.families.mistral:MISTRAL",
    "mixtral": "effmodels.interop.families.mixtral:MIXTRAL",
    "qwen2": "effmodels.interop.families.qwen:QWEN2",
    "qwen3": "effmodels.interop.families.qwen:QWEN3",
    "qwen2_moe": "effmodels.interop.families.qwen_moe:QWEN2_MOE",
    "qwen3_moe": "effmodels.interop.families.qwen_moe:QWEN3_MOE",
    "olmoe": "effmodels.interop.families.qwen_moe:OLMOE",
    "deepseek_v2": "effmodels.interop.families.deepseek:DEEPSEEK_V2",
    "deepseek_v3": "effmodels.interop.families.deepseek:DEEPSEEK_V3",
    "gpt_oss": "effmodels.interop.families.gpt_oss:GPT_OSS",
    "minimax": "effmodels.interop.families.minimax:MINIMAX",
    "minimax_text_01": "effmodels.interop.families.minimax:MINIMAX_TEXT_01",
    "minimax_m1": "effmodels.interop.families.minimax:MINIMAX_M1",
    "bailing_moe_linear": "effmodels.interop.families.bailing_linear:BAILING_LINEAR",
    "mamba2": "effmodels.interop.families.mamba2:MAMBA2",
    "qwen3_next": "effmodels.interop.families.qwen3_next:QWEN3_NEXT",
    "lfm2_moe": "effmodels.interop.families.lfm2_moe:LFM2_MOE",
    "retnet": "effmodels.interop.families.retnet:FLA",
    "torchscale_retnet": "effmodels.interop.families.retnet:TORCHSCALE",
}


def get_family(model_type):
    """The Family of a model type; InteropError with the nearest name and all that are supported."""
    if model_type not in FAMILIES:
        raise InteropError(f"model_type {model_type!r} is not supported.{nearest(model_type, FAMILIES)}")
    module, name = FAMILIES[model_type].split(":")
    return getattr(importlib.import_module(module), name)
