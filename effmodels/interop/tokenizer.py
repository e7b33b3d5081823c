"""Tokenizers into a Hugging Face folder."""
import json

from effmodels.data.tokenizer import END, PAD, ByteTokenizer, HFTokenizer, SentencePieceTokenizer
from effmodels.interop.errors import InteropError


def save_tokenizer(tokenizer, path):
    """tokenizer.json (or tokenizer.model) and tokenizer_config.json with the special tokens."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        (path / "tokenizer.model").write_bytes(tokenizer.model)
        return
    if isinstance(tokenizer, ByteTokenizer):
        text, names = _byte_level(tokenizer), {"bos_token": END, "eos_token": END, "pad_token": PAD}
    elif isinstance(tokenizer, HFTokenizer):
        text = tokenizer.text
        names = {f"{n}_token": tokenizer.library.id_to_token(getattr(tokenizer, f"{n}_id")) for n in ("bos", "eos", "pad")}
    else:
        raise InteropError(f"a tokenizer of class {type(tokenizer).__name__} has no form in a Hugging Face folder.")
    (path / "tokenizer.json").write_text(text)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _byte_level(tokenizer):
    """The bytes as a byte-level BPE without merges: the same ids in a file that other software reads."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    from effmodels.data.tokenizer import _gpt2_bytes

    library = Library(models.BPE(vocab=dict(_gpt2_bytes()), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END, PAD])
    return library.to_str()
