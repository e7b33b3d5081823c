"""The contract of a source of images with captions."""


class Source:
    """`documents(source, split)` yields (name, image uint8 [H, W] or [H, W, C], caption) of "train" or "validation", always the same.

    source: the fields of `config.data` that say where from (`options.SOURCE_FIELDS`).
    """

    reads_paths = False  # whether `source["paths"]` says where the files are

    @classmethod
    def identity(cls, source):
        """What the documents depend on, as a JSON-able value; raises DataError when something is missing."""
        raise NotImplementedError

    @classmethod
    def documents(cls, source, split):
        raise NotImplementedError
