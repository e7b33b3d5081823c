"""What goes wrong with weights of the outside."""
from effmodels.config import ConfigError


class InteropError(ConfigError):
    """A folder of weights that cannot be read, or a model that cannot be written as one; the message names the tensor, file or field."""
