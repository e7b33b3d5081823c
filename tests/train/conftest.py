"""What several tests of training read."""
import pytest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of small sources; a data cache beside it is shared by the module."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"f{i}.py").write_text("\n".join(f"def f{j}(x):\n    return x * {j} + {i}" for j in range(40)))
    return folder
