"""Finding and reading text: what is taken, what is skipped, and the sentence for each fault."""
import gzip
import json
import sysconfig

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effmodels.data import sources
from effmodels.data.options import DataError


def read(paths, column="text"):
    notes = sources.Notes()
    documents = [d for f in sources.find(tuple(map(str, paths))) for d in sources.documents(f, column, notes)]
    return documents, notes


def test_folders_files_and_globs_have_relative_names_in_a_fixed_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.py", "a.md", "sub/c.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    assert [f.name for f in sources.find((str(tmp_path),))] == ["a.md", "b.py", "sub/c.txt"]
    assert [f.name for f in sources.find((str(tmp_path / "b.py"),))] == ["b.py"]
    assert [f.name for f in sources.find((str(tmp_path / "**/*.txt"),))] == ["sub/c.txt"]
    assert [f.name for f in sources.find((str(tmp_path), str(tmp_path / "b.py")))] == ["a.md", "b.py", "sub/c.txt"]


def test_two_files_of_one_name_stay_two_documents(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(folder)
    names = [f.name for f in sources.find((str(tmp_path / "x"), str(tmp_path / "y")))]
    assert len(set(names)) == 2 and names[0] == "same.txt" and names[1].endswith("y/same.txt")


def test_every_format_gives_its_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes("größe\r\n".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n{"text": ""}\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    pq.write_table(pa.table({"text": ["four", None, "five"], "n": [1, 2, 3]}), tmp_path / "e.parquet")
    documents, notes = read([tmp_path])
    assert documents == [("a.txt", 0, "größe\r\n".encode()), ("b.txt.gz", 0, b"zipped"), ("c.jsonl:1", 0, b"one"), ("c.jsonl:3", 0, b"two"),
                         ("d.jsonl.gz:1", 0, b"three"), ("e.parquet:0", 0, b"four"), ("e.parquet:2", 0, b"five")]
    assert notes.empty == 2


def test_binary_and_foreign_bytes_are_counted_and_said(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    documents, notes = read([tmp_path])
    assert documents == [("b.txt", 0, "caf\ufffd".encode())]
    assert "1 binary files skipped" in notes.sentence() and "1 documents that are not UTF-8" in notes.sentence()
    with pytest.raises(DataError, match="a.bin is not text"):
        read([tmp_path / "a.bin"])


def test_holdout_by_name_is_a_fixed_fraction():
    held = [sources.held_out(f"file{i}.py", 0.1) for i in range(5000)]
    assert 400 < sum(held) < 600  # binomial: mean 500, standard deviation 21
    assert held == [sources.held_out(f"file{i}.py", 0.1) for i in range(5000)]


def test_default_corpus_is_the_standard_library_without_tests_and_packages():
    names = [f.name for f in sources.find(())]
    assert 350 < len(names) < 900 and "ast.py" in names and "json/decoder.py" in names
    assert not [n for n in names if {"site-packages", "test", "tests", "encodings", "pydoc_data", "lib2to3"} & set(n.split("/"))]


def test_missing_path_names_the_nearest_one(tmp_path):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError, match=r"'.*corpsu' does not exist .*did you mean '.*corpus'"):
        sources.find((str(tmp_path / "corpsu"),))
    with pytest.raises(DataError, match=r"Several paths are written --config.data.paths=\"\('a', 'b'\)\""):
        sources.find(("a,b",))
    with pytest.raises(DataError, match="holds no files"):
        sources.find((str(tmp_path / "corpus"),))
    with pytest.raises(DataError, match="matches no file"):
        sources.find((str(tmp_path / "*.none"),))


def test_an_installation_without_sources_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="standard library, but .* holds only 0 source files"):
        sources.find(())


def test_truncated_gzip(tmp_path):
    lines = "".join(json.dumps({"text": f"{i:09d}" * 50}) + "\n" for i in range(2000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-3000])
    with pytest.raises(DataError, match=r"a.jsonl.gz is truncated or damaged after line \d+"):
        read([tmp_path])
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="truncated or damaged"):
        read([tmp_path])


@pytest.mark.parametrize("line, match", [
    ('{"text": "a"', r"a.jsonl, line 2: not valid JSON"),
    ('["a"]', r"line 2: a JSON object is expected, this is a list"),
    ('{"body": "a", "id": 1}', r"line 2: no field 'text'; it has: body, id. Set config.data.column"),
    ('{"text": 3}', r"line 2: field 'text' must be text, it is int"),
])
def test_broken_record(tmp_path, line, match):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=match):
        read([tmp_path])


def test_parquet_faults(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    with pytest.raises(DataError, match="no column 'text'; its columns: body, n"):
        read([path])
    with pytest.raises(DataError, match="column 'n' holds int64, text is expected"):
        read([path], column="n")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="a.parquet is not a complete parquet file"):
        read([path])


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    files = sources.find((str(tmp_path),))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "_open", refuse)
    with pytest.raises(DataError, match="a.txt cannot be read: Permission denied"):
        list(sources.documents(files[0], "text", sources.Notes()))
