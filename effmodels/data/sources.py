"""From paths to documents: which files are meant, and the text of each document in them.

A document is (name, offset, text): a path relative to what was given (with ":<line>" for records), the byte where the text starts
in that source, and UTF-8 bytes.
"""
import dataclasses
import difflib
import glob
import gzip
import hashlib
import json
import os
import pathlib
import sysconfig
import zlib

from effmodels.data.options import DataError

# Generated tables, foreign packages and tests of the standard library: not prose or code that a person wrote to be read.
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data", "lib2to3"}
FOLDER_SKIP = {"__pycache__", "node_modules"}
RECORDS = (".jsonl", ".jsonl.gz", ".parquet")


@dataclasses.dataclass(frozen=True)
class File:
    name: str  # relative to the path that was given
    path: pathlib.Path
    size: int
    mtime_ns: int
    named: bool  # given itself, rather than found in a folder: then a binary file is an error, not skipped


@dataclasses.dataclass
class Notes:
    """What was passed over or changed while reading, for one line in the log and the manifest."""

    binary: int = 0
    empty: int = 0
    not_utf8: int = 0

    def sentence(self):
        parts = [(self.binary, "binary files skipped"), (self.empty, "empty documents skipped"),
                 (self.not_utf8, "documents that are not UTF-8 (bad bytes replaced by U+FFFD)")]
        return ", ".join(f"{n} {what}" for n, what in parts if n)


def find(paths):
    """All files meant by `paths` in a fixed order; no paths: the standard library. Names are unique."""
    if not paths:
        return stdlib()
    files, taken = [], {}
    for given in paths:
        for file in _expand(os.path.expanduser(os.path.expandvars(os.fspath(given)))):
            real = file.path.resolve()
            if taken.get(file.name) == real:
                continue  # the same file through two paths
            if file.name in taken:
                file = dataclasses.replace(file, name=file.path.absolute().as_posix().lstrip("/"))
                if file.name in taken:
                    continue
            taken[file.name] = real
            files.append(file)
    return files


def stdlib():
    """The .py files of the running Python's standard library, without tests, tables and installed packages (about 9.7 MB)."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    # Files that differ between two builds of one Python version would make the corpus hash mean nothing.
    local = {"sitecustomize.py", "usercustomize.py", "python-config.py"}
    files = [f for f in _walk(root, STDLIB_SKIP) if f.name.endswith(".py") and f.path.name not in local and "_sysconfigdata" not in f.name]
    if len(files) < 100:
        raise DataError(f"The default corpus is Python's standard library, but {root} holds only {len(files)} source files. "
                        "Set config.data.paths to a file, folder or glob with text.")
    return files


def documents(file, column, notes):
    """Yields (name, offset, text bytes) of one file; every fault is a sentence that names the file and the line."""
    try:
        if file.name.endswith(".parquet"):
            yield from _parquet(file, column, notes)
        elif file.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl(file, column, notes)
        else:
            yield from _text(file, notes)
    except OSError as e:
        raise DataError(f"{file.path} cannot be read: {e.strerror or e}. Check that it is complete and that you may read it.") from e


def file_sha256(file):
    try:
        with open(file.path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"{file.path} cannot be read: {e.strerror or e}. Check that it exists and that you may read it.") from e


def held_out(name, fraction):
    """True for a fixed fraction of all names: a document stays on its side whatever else is added to the corpus."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64


def _expand(given):
    path = pathlib.Path(given)
    if path.is_dir():
        files = list(_walk(path, FOLDER_SKIP))
        if not files:
            raise DataError(f"The folder {path} holds no files (hidden files are not read). Give a folder, file or glob with text.")
        return files
    if path.is_file():
        return [_file(path, path.name, named=True)]
    if glob.has_magic(given):
        matches = [pathlib.Path(p) for p in sorted(glob.glob(given, recursive=True)) if os.path.isfile(p)]
        if not matches:
            raise DataError(f"The pattern {given!r} matches no file (looked from {pathlib.Path.cwd()}).")
        anchor = pathlib.Path(given[: min(given.index(c) for c in "*?[" if c in given)] + "x").parent
        return [_file(p, p.relative_to(anchor).as_posix(), named=True) for p in matches]
    raise DataError(f"config.data.paths: {given!r} does not exist (looked from {pathlib.Path.cwd()}){_hint(given, path)}")


def _hint(given, path):
    if "," in given:
        return f". Several paths are written --config.data.paths=\"{tuple(given.split(','))!r}\"."
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else "."


def _walk(root, skip):
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        for name in sorted(names):
            path = pathlib.Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield _file(path, path.relative_to(root).as_posix(), named=False)


def _file(path, name, named):
    stat = path.stat()
    return File(name, path, stat.st_size, stat.st_mtime_ns, named)


def _open(file):
    return gzip.open(file.path, "rb") if file.name.endswith(".gz") else open(file.path, "rb")


def _text(file, notes):
    try:
        with _open(file) as f:
            data = f.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{file.path} is truncated or damaged: {e}. Fetch it again.") from e
    if b"\0" in data[:8192]:
        if file.named:
            raise DataError(f"{file.path} is not text (it holds zero bytes). Give UTF-8 text, .jsonl, .jsonl.gz or .parquet.")
        notes.binary += 1
        return
    yield from _document(file.name, data, notes)


def _document(name, data, notes):
    if not data.strip():
        notes.empty += 1
        return
    try:
        data.decode()
    except UnicodeDecodeError:
        notes.not_utf8 += 1
        data = data.decode(errors="replace").encode()
    yield name, 0, data


def _jsonl(file, column, notes):
    line = 0
    try:
        with _open(file) as f:
            for line, raw in enumerate(f, start=1):
                if raw.strip():
                    yield from _document(f"{file.name}:{line}", _record(file, line, raw, column), notes)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{file.path} is truncated or damaged after line {line}: {e}. Fetch it again.") from e


def _record(file, line, raw, column):
    where = f"{file.path}, line {line}"
    try:
        record = json.loads(raw)
    except ValueError as e:
        raise DataError(f"{where}: not valid JSON ({e}). Each line must be one object such as {{\"{column}\": \"...\"}}.") from e
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON object is expected, this is a {type(record).__name__}.")
    if column not in record:
        raise DataError(f"{where}: no field {column!r}; it has: {', '.join(map(str, record)) or 'none'}. Set config.data.column.")
    if not isinstance(record[column], str):
        raise DataError(f"{where}: field {column!r} must be text, it is {type(record[column]).__name__}.")
    return record[column].encode("utf-8", "replace")


def _parquet(file, column, notes):
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        names = table.schema_arrow.names
        if column not in names:
            raise DataError(f"{file.path} has no column {column!r}; its columns: {', '.join(names)}. Set config.data.column.")
        kind = table.schema_arrow.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{file.path}: column {column!r} holds {kind}, text is expected. "
                            f"Set config.data.column; columns: {', '.join(names)}.")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                yield from _document(f"{file.name}:{row}", (text or "").encode("utf-8", "replace"), notes)
                row += 1
    except pyarrow.ArrowException as e:
        raise DataError(f"{file.path} is not a complete parquet file: {e}. Fetch it again.") from e
