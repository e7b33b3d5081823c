"""Images with captions: preprocessing against Pillow, sources, rows of packed documents, exact resumption, and what a person reads.

Letters: P patches, C channels, B rows, T tokens, I images.
"""
import gzip
import struct

import numpy as np
import pytest

import effmodels.data
from effmodels.config import ConfigError
from effmodels.data import storage
from effmodels.data.images import base, preprocess, registry, shapes
from effmodels.data.images.idx import IdxFashion, read
from effmodels.data.images.rows import image_token
from effmodels.data.options import DataError

SPEC = effmodels.data.ImageSpec(size=8, patch=4, channels=3, mean=(0.5,), std=(0.25,), placeholders=3, images=2)
PHOTO = np.random.default_rng(0).integers(0, 256, (37, 23, 3)).astype(np.uint8)


class Few(base.Source):
    """Ten images of several sizes, grey ones too; captions of several lengths."""

    @classmethod
    def identity(cls, source):
        return ["few", 1]

    @classmethod
    def documents(cls, source, split):
        for n in range(10):
            if (n % 5 == 4) == (split == "validation"):
                image = PHOTO[n : n + 12, n : n + 9 + n]
                yield f"few:{n}", image[..., :1] if n == 2 else image, "ö" * n + "x"


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setitem(registry.IMAGE_SOURCES, "few", Few)


def prepare(folder, spec=SPEC, seq_len=24, **fields):
    lines = []
    config = {"name": "few", "cache_dir": str(folder / "cache"), **fields}
    return effmodels.data.prepare(config, seq_len, images=spec, log=lines.append), lines


@pytest.mark.parametrize("shape, size", [((37, 23), 8), ((23, 37), 16), ((9, 9), 20), ((50, 7), 7), ((8, 8), 8)])
def test_resize_is_that_of_pillow(shape, size):
    """Pillow's bilinear filter, which rounds to bytes between its two passes, and the centre of the longer side."""
    image = pytest.importorskip("PIL.Image")
    given = np.random.default_rng(1).integers(0, 256, (*shape, 3)).astype(np.uint8)
    height, width = (max(size, round(n * size / min(shape))) for n in shape)
    whole = np.asarray(image.fromarray(given).resize((width, height), image.Resampling.BILINEAR)).astype(int)
    top, left = (height - size) // 2, (width - size) // 2
    got = preprocess.resize(given, size)
    assert got.shape == (size, size, 3) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - whole[top : top + size, left : left + size]).max() <= 1
    assert size != shape[0] or shape[0] != shape[1] or np.array_equal(got, given)


def test_patches_are_normalised_pixels_in_their_places():
    got = preprocess.patches(PHOTO[:8, :8], SPEC)
    assert got.shape == (4, 48) and got.dtype == np.float32
    for p in range(4):
        square = PHOTO[:8, :8][4 * (p // 2) :, 4 * (p % 2) :][:4, :4]
        assert np.allclose(got[p], ((square / 255 - 0.5) / 0.25).reshape(-1), atol=1e-6)
    grey = preprocess.square(PHOTO[:8, :8, 0], SPEC)
    assert np.array_equal(grey, np.repeat(PHOTO[:8, :8, :1], 3, axis=2))
    with pytest.raises(DataError, match=r"expected an image of uint8 \[height, width, channels\], got float64 \[4, 4, 3\]"):
        preprocess.resize(np.zeros((4, 4, 3)), 2)
    with pytest.raises(DataError, match="an image has 4 channels and the model's encoder reads 3"):
        preprocess.square(np.zeros((8, 8, 4), np.uint8), SPEC)


def test_shapes_are_always_the_same_and_match_their_captions():
    image, caption = shapes.draw(7)
    again, _ = shapes.draw(7)
    assert np.array_equal(image, again) and image.shape == (32, 32, 3)
    for number in range(20):
        image, caption = shapes.draw(number)
        colour = np.array(shapes.COLOURS[caption.split()[2]])
        inside = np.abs(image.astype(int) - colour).max(axis=2) <= 10
        place = next(p for p in shapes.PLACES if caption.endswith(p))
        centre = (np.argwhere(inside) + 0.5).mean(axis=0) / 32
        assert inside.sum() > 20 and np.abs(centre - shapes.PLACES[place]).max() < 0.12, caption
    names = {s: [n for n, _, _ in shapes.Shapes.documents({"holdout": 0.02}, s)] for s in ("train", "validation")}
    assert len(names["train"]) + len(names["validation"]) == shapes.COUNT and not set(names["train"]) & set(names["validation"])


def test_a_row_holds_whole_documents_and_no_loss_on_images(tmp_path, few):
    prepared, lines = prepare(tmp_path)
    tokenizer, rows = prepared.tokenizer, prepared.train
    place = image_token(tokenizer)
    documents = {name: caption.encode() for name, _, caption in Few.documents({}, "train")}
    images = {name: image for name, image, _ in Few.documents({}, "train")}
    seen = []
    for w in range(len(rows)):
        row = rows[w]
        for i, (name, _, size) in enumerate(effmodels.data.trace(row, prepared)):
            here = np.flatnonzero(row["segment_ids"] == i + 1)
            ids, targets, caption = row["tokens"][here], row["targets"][here], documents[name]
            assert ids.tolist() == [tokenizer.bos_id, *[place] * 3, *caption] and targets.tolist() == [*ids[1:], tokenizer.eos_id]
            assert row["weights"][here].tolist() == [0.0] * 3 + [1.0] * (len(caption) + 1) and size == len(caption)
            assert row["positions"][here].tolist() == list(range(len(here)))
            assert row["source_index"][i] == here[1] and row["source_segment_ids"][i] == i + 1
            assert np.array_equal(row["source_patches"][i], preprocess.patches(images[name], SPEC))
            seen.append(name)
        assert row["target_bytes"] == row["source_bytes"][row["source_id"] >= 0].sum() and len(seen) > 0
        assert not row["weights"][row["segment_ids"] == 0].any() and not row["source_segment_ids"][np.sum(row["source_id"] >= 0) :].any()
    assert sorted(seen) == sorted(documents), "every image once in an epoch"
    assert "rows of 24 with 8 images" in lines[-1]
    assert not any("images of" in line for line in prepare(tmp_path)[1]), "a warm start reads no source"
    base_rates = effmodels.data.baselines(prepared)
    assert all(np.isfinite(v) for v in base_rates.values())


def test_resuming_gives_the_same_batches_on_any_number_of_processes(tmp_path, few):
    prepared, _ = prepare(tmp_path)
    straight = [next(it) for it in [effmodels.data.batches(prepared, batch_size=4, seed=1)] for _ in range(6)]
    state, got = None, []
    for count in (2, 1, 4):
        parts = [effmodels.data.batches(prepared, batch_size=4, seed=1, process_index=p, process_count=count) for p in range(count)]
        for part in parts:
            if state is not None:
                part.restore(state)
        got += [[next(part) for part in parts] for _ in range(2)]
        state = parts[0].state()
    for want, parts in zip(straight, got):
        for key, value in want.items():
            assert np.array_equal(value, np.concatenate([p[key] for p in parts])), key
    assert not np.array_equal(straight[0]["window"], straight[1]["window"])


def test_damage_is_seen_and_mended(tmp_path, few):
    prepared, _ = prepare(tmp_path)
    path = prepared.train.folders[0].folder / "train_pixels.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(storage.DamagedError, match="train_pixels.bin is damaged"):
        storage.ArrayFolder(path.parent)
    again, lines = prepare(tmp_path)
    assert any("Rebuilding it now" in line for line in lines) and len(again.train) == len(prepared.train)


def write_idx(path, array):
    data = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_idx_files(tmp_path):
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    for split, suffix in (("train", ".gz"), ("t10k", "")):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", pixels)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", np.array([4, 9], np.uint8))
    source = {"name": "idx_fashion", "paths": (str(tmp_path),)}
    for split in ("train", "validation"):
        names, images, captions = zip(*IdxFashion.documents(source, split))
        assert np.array_equal(images, pixels) and captions == ("a picture of a coat", "a picture of an ankle boot")
    assert IdxFashion.identity(source) == IdxFashion.identity(source)
    broken = tmp_path / "t10k-images-idx3-ubyte"
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte is not a whole IDX file of bytes"):
        read(broken)
    broken.unlink()
    with pytest.raises(DataError, match=r"config.data.name='idx_fashion': no t10k-images-idx3-ubyte or .*\.gz in paths="):
        list(IdxFashion.documents(source, "validation"))


def test_digits_of_scikit_learn():
    pytest.importorskip("sklearn")
    documents = list(registry.get_source("digits").documents({"holdout": 0.1}, "validation"))
    assert 100 < len(documents) < 260 and documents[0][1].shape == (8, 8) and documents[0][1].max() > 200


@pytest.mark.parametrize("fields, images, message", [
    ({"name": "shapes"}, False, "config.data.name='shapes' is a source of images, but the model reads none; set model.media"),
    ({}, True, "model.media is set, but config.data.name='local' has no images; use one of digits, idx_digits, idx_fashion, shapes"),
    ({"name": "shapes", "paths": ("a",)}, True, r"config.data.name='shapes' reads no files, but paths=\('a',\) is given"),
    ({"mixture": ({"name": "shapes"}, {})}, True, "config.data.mixture: 'shapes' is a source of images, which is read alone"),
])  # fmt: skip
def test_mistakes_in_the_fields(fields, images, message):
    with pytest.raises(DataError, match=message):
        effmodels.data.check(fields, images=images)


def test_what_does_not_fit_says_so(tmp_path, few, monkeypatch):
    with pytest.raises(DataError, match="an image with its caption takes 21 tokens and seq_len is 16; set seq_len to at least that"):
        prepare(tmp_path, seq_len=16)
    with pytest.raises(ConfigError, match="unknown source of images 'shape'. Did you mean 'shapes'"):
        registry.get_source("shape")
    monkeypatch.setattr(Few, "documents", classmethod(lambda cls, source, split: iter([("a", PHOTO, "x")] * (split == "train"))))
    with pytest.raises(DataError, match="no image falls into the validation split; change config.data.holdout"):
        prepare(tmp_path / "other")
