"""Index files of pycm.compat.faiss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_compat_faiss import L2, METRICS, data, ours, theirs

from pycm.gallery import Gallery


@METRICS
def test_files(metric: int, tmp_path: Path) -> None:
    queries, index, path = data(31, 5, 8), ours.IndexFlat(8, metric), tmp_path / "index.pycm"
    for rows in (0, 40):
        index.add(data(32, rows, 8))
        ours.write_index(index, path)
        other = ours.read_index(str(path))
        assert type(other) is (ours.IndexFlatL2 if metric == L2 else ours.IndexFlatIP)
        assert (other.d, other.ntotal, other.metric_type) == (8, rows, metric)
        for found, expected in zip(other.search(queries, 3), index.search(queries, 3), strict=True):
            np.testing.assert_array_equal(found, expected)
        other.add(data(33, 2, 8))
        assert other.ntotal == rows + 2


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    rows, path = data(34, 10, 4), tmp_path / "index"

    def refused(reason: str) -> None:
        with pytest.raises(RuntimeError, match=rf"read_index: {path}: .*{reason}"):
            ours.read_index(path)

    refused("No such file")
    reference = theirs.IndexFlatL2(4)
    reference.add(rows)
    theirs.write_index(reference, str(path))
    refused("")
    for gallery, reason in (
        (Gallery(rows, metric="cosine"), "sqeuclidean or dot, got .*cosine"),
        (Gallery(rows.astype(np.float64), metric="dot"), "float32 rows .* got .*float64"),
        (Gallery(rows, metric="dot", ids=np.arange(10)[::-1]), "its ids must be"),
        (Gallery(rows, metric="dot", ids=list("abcdefghij")), "its ids must be"),
    ):
        gallery.save(path)
        refused(reason)


def test_damaged_files(tmp_path: Path) -> None:
    path, index = tmp_path / "index", ours.IndexFlatL2(4)
    index.add(data(35, 500, 4))
    ours.write_index(index, path)
    whole = path.read_bytes()
    for damaged in (whole[:-7], whole[:100], b"", whole[: len(whole) // 2] + b"\xff" + whole[len(whole) // 2 + 1 :]):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(RuntimeError, match=str(path)):
            ours.read_index(path)
    with pytest.raises(RuntimeError, match=r"write_index: .*nowhere"):
        ours.write_index(index, tmp_path / "nowhere" / "index")
