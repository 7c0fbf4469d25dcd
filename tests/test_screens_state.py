"""The state of an encoded gallery: kept, restored from a memory map, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import assert_same
from test_screens import METRIC, PARTS, SCREEN, assert_all_same, copied, data, encoded, everything

import pycm
from pycm import _C


@SCREEN
@METRIC
def test_restored_from_a_memory_map(metric: str, screen: str, tmp_path: Path) -> None:
    q, g = data(9, 333, 47)
    gallery = encoded(g[:100], metric, screen)
    gallery.extend(g)  # now its columns have room to grow
    for name, part in copied(gallery).items():
        np.save(tmp_path / f"{name}.npy", part)
    state = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in PARTS}
    again = _C.EncodedGallery(metric, screen)
    again.restore(g, state)
    del state
    want = everything(_C, (g,), q, metric, len(g), ("float32",))
    assert_all_same([want, everything(again, (), q, metric, len(g), ())])
    more = np.concatenate([g, g[::-1]])
    again.extend(more)
    assert_all_same([everything(_C, (more,), q, metric, 666, ("float32",)), everything(again, (), q, metric, 666, ())])


def test_a_state_keeps_what_it_shows() -> None:
    g = data(1, 500, 32)[1]
    gallery = encoded(g[:64], "cosine", "int8")
    state = gallery.state()
    before = {name: part.copy() for name, part in state.items()}
    gallery.extend(g)
    del gallery
    for name in PARTS:
        np.testing.assert_array_equal(state[name], before[name], name)


def spoil(state: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    return state | {name: value}


@SCREEN
def test_restore_refuses(screen: str) -> None:
    g = data(1, 100, 32)[1]
    state = copied(encoded(g, "cosine", screen))
    info = state["info"]

    def altered(place: int, value: int) -> dict[str, Any]:
        changed = info.copy()
        changed[place] = value
        return spoil(state, "info", changed)

    cases: list[tuple[np.ndarray, dict[str, Any], type[Exception], str]] = [
        (g[:99], state, ValueError, "rows"),
        (g[:, :31].copy(), state, ValueError, "rows"),
        (g.astype(np.float64), state, (ValueError, TypeError), "dtype"),
        (g.astype(np.float16), state, (ValueError, TypeError), "dtype"),
        (g[0], state, ValueError, "rows"),
        (g, altered(0, 99), ValueError, "version"),
        (g, altered(4, 9), ValueError, "screen"),
        (g, altered(4, -1), ValueError, "screen"),
        (g, altered(3, int(info[3]) + 1), ValueError, "words"),
        (g, altered(5, 3), ValueError, "rotation|words"),
        (g, altered(7, (int(info[7]) + 1) % 5), ValueError, "metric"),
        (g, spoil(state, "info", info[:6]), ValueError, "info"),
        (g, spoil(state, "info", info.astype(np.int32)), TypeError, "info"),
        (g, spoil(state, "stats", state["stats"][:-1]), ValueError, "stats"),
        (g, spoil(state, "stats", state["stats"].astype(np.float32)), TypeError, "stats"),
        (g, spoil(state, "columns", np.zeros((4, 5), np.float32)), ValueError, "columns"),
        (g, spoil(state, "panels", np.zeros(7, np.uint32)), ValueError, "panels"),
        (g, spoil(state, "panels", state["panels"].astype(np.int64)), TypeError, "panels"),
        (g, spoil(state, "centre", np.zeros(5)), ValueError, "centre"),
        (g, {name: part for name, part in state.items() if name != "centre"}, ValueError, "centre"),
    ]
    used = encoded(g[:10].copy(), "cosine", screen)
    before = used.topk(g[:3], 4)
    for rows, parts, error, words in cases:
        for gallery in (_C.EncodedGallery("cosine", screen), used):
            with pytest.raises(error, match=words):
                gallery.restore(rows, parts)
    assert len(used) == 10
    assert_same(used.topk(g[:3], 4), before)


def test_extend_refuses() -> None:
    g = data(1, 100, 32)[1]
    gallery = encoded(g, "cosine", "int8")
    for rows in (g[:50], g[:, :16].copy(), g[0]):
        with pytest.raises(ValueError, match="rows"):
            gallery.extend(rows)
    with pytest.raises(TypeError, match="dtype float32, got float64"):
        gallery.extend(g.astype(np.float64))
    with pytest.raises(ValueError, match="queries"):
        gallery.topk(g[:, :16].copy(), 1)
    with pytest.raises(TypeError, match="dtype"):
        gallery.topk(g.astype(np.float64), 1)
    with pytest.raises(ValueError, match="at least one row"):
        _C.EncodedGallery("cosine").topk(g, 1)
    with pytest.raises(ValueError, match="feature"):
        _C.EncodedGallery("cosine").extend(np.zeros((3, 0), np.float32))


@pytest.mark.parametrize("name", ["fp32", "INT8", "", "float64"])
def test_unknown_screen(name: str) -> None:
    x = np.ones((3, 4), np.float32)
    expected = f"screen must be auto, float32, bfloat16 or int8, got '{name}'"
    with pytest.raises(ValueError, match=f"topk: {expected}"):
        pycm.topk(x, x, 1, screen=name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"rank: {expected}"):
        _C.rank(x, x, np.zeros(3, int), np.arange(4), "dot", None, None, None, name)
    with pytest.raises(ValueError, match=f"join: {expected}"):
        _C.join(x, x, 0.5, "dot", -1, 9, name)
    with pytest.raises(ValueError, match=f"EncodedGallery: {expected}"):
        _C.EncodedGallery("dot", name)
