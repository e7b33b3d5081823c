"""A Hugging Face folder: config.json, one or several safetensors files, tokenizer files. Nothing of a pickle is ever opened."""
import json
import pathlib

from effmodels.interop.errors import InteropError
from effmodels.interop.safetensors import SafetensorsFile

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


class Folder:
    """The tensors of a folder by name; raises InteropError for what is missing, doubled, unsafe or corrupt."""

    def __init__(self, path):
        self.path = pathlib.Path(path).expanduser()
        if not self.path.is_dir():
            raise InteropError(f"{self.path} is no folder; a Hugging Face folder with {CONFIG} and safetensors files is expected.")
        self.config = read_json(self.path / CONFIG)
        self.files = self._open()

    def names(self):
        """Names of all tensors."""
        return list(self.files)

    def shape(self, name):
        """Shape of a tensor."""
        return self.files[name].shape(name)

    def dtype(self, name):
        """numpy dtype of a tensor."""
        return self.files[name].dtype(name)

    def read(self, name):
        """A tensor as a read-only view of the mapped file."""
        return self.files[name].read(name)

    def _open(self):
        index = self.path / INDEX
        if (self.path / WEIGHTS).exists():
            return self._tensors([self.path / WEIGHTS])
        if index.exists():
            return self._indexed(read_json(index))
        found = sorted(self.path.glob("*.safetensors"))
        if found:
            return self._tensors(found)
        pickles = sorted(p.name for pattern in PICKLES for p in self.path.glob(pattern))
        if pickles:
            raise InteropError(
                f"{self.path} holds its weights as {pickles[0]}: loading a pickle runs whatever code is in it, so it is refused as unsafe. "
                "Convert it to safetensors where you trust it, or take the safetensors files of the same model."
            )
        raise InteropError(f"{self.path} has no {WEIGHTS}, no {INDEX} and no other *.safetensors file.")

    def _indexed(self, index):
        where = index.get("weight_map")
        if not isinstance(where, dict) or not where:
            raise InteropError(f"{self.path / INDEX} has no weight_map; it is corrupt.")
        for file in sorted(set(where.values())):
            if pathlib.PurePath(file).name != file:
                raise InteropError(f"{self.path / INDEX}: {file!r} is not a file name in this folder.")
            if not (self.path / file).exists():
                named = next(n for n, f in where.items() if f == file)
                raise InteropError(f"{self.path} lacks {file}, which its index names for {named}; fetch it again.")
        tensors = self._tensors([self.path / file for file in sorted(set(where.values()))])
        for name, file in where.items():
            if name not in tensors or tensors[name].path.name != file:
                raise InteropError(f"{self.path / INDEX}: {name} should be in {file}, and is not there.")
        unlisted = [n for n in tensors if n not in where]
        if unlisted:
            raise InteropError(f"{tensors[unlisted[0]].path} holds {unlisted[0]}, which {INDEX} does not list.")
        return tensors

    def _tensors(self, paths):
        found = {}
        for path in paths:
            file = SafetensorsFile(path)
            for name in file.names():
                if name in found:
                    raise InteropError(f"tensor {name} is both in {found[name].path} and in {path}.")
                found[name] = file
        return found


def read_json(path):
    """The object of a JSON file; InteropError when it is missing or no object."""
    if not path.exists():
        raise InteropError(f"{path} does not exist; a Hugging Face folder with {CONFIG} and safetensors files is expected.")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise InteropError(f"{path} is no JSON ({error}).") from None
    if not isinstance(value, dict):
        raise InteropError(f"{path} holds no JSON object.")
    return value
