"""What a model remembers of the folder it came from, so that it is written as it was read."""
import dataclasses
import json


@dataclasses.dataclass(frozen=True)
class Record:
    """The model type and config.json of a folder; dtypes of tensors that are not our array's; whether names had the family's prefix;
    the name of a head stored beside the embedding that it is tied to; other tensors that repeat one, by name."""

    model_type: str
    config: dict
    dtypes: dict = dataclasses.field(default_factory=dict)
    prefixed: bool = True
    duplicate: str | None = None
    copies: dict = dataclasses.field(default_factory=dict)

    def to_json(self):
        """Text, which a module may carry as a static attribute."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def of(model):
    """The Record of a model that `load_pretrained` made, or None."""
    text = getattr(model, "pretrained", None)
    return None if text is None else Record(**json.loads(text))
