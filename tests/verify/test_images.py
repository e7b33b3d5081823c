"""Batches with images: drawn for random documents, moved along when a document stands alone, gone with their rows."""
import numpy as np

from effmodels.verify import draw

SOURCES = {"source_patches": ((3, 4, 6), np.float32), "source_index": ((3,), np.int32), "source_segment_ids": ((3,), np.int32)}


def test_images_stay_with_their_documents():
    text = draw.packed_batch(4, 32, 50, 0)
    assert draw.with_images(text, {}, 0) is text
    batch = draw.with_images(text, SOURCES, 0)
    batches, places = draw.alone(batch)
    count = 0
    for (b, start, stop), (i, row) in zip(draw.documents(batch), places):
        there, mine = batches[i], batch["source_segment_ids"][b] == batch["segment_ids"][b, start]
        assert np.array_equal(there["source_segment_ids"][row], mine)
        assert np.array_equal(there["source_index"][row][mine], batch["source_index"][b][mine] - start)
        assert np.all(there["source_index"][row][mine] < stop - start)
        assert np.array_equal(there["source_patches"][row][mine], batch["source_patches"][b][mine])
        assert np.array_equal(there["tokens"][row, : stop - start], batch["tokens"][b, start:stop])
        count += mine.sum()
    assert count == np.sum(batch["source_segment_ids"] > 0) > 4
    left = draw.without_rows(batch, [True, False, False, True])["source_segment_ids"]
    assert not left[[0, 3]].any() and np.array_equal(left[[1, 2]], batch["source_segment_ids"][[1, 2]])
