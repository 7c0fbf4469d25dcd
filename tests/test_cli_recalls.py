"""What `pycm evaluate` counts where clips have equal texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _package in ("typer", "rich", "torch", "safetensors"):
    pytest.importorskip(_package)

from clip_cases import WORDS  # noqa: E402
from video_text_cases import TEST, TEXTS, TRAIN, make  # noqa: E402

from pycm import VideoTextMatcher  # noqa: E402
from pycm.cli.pairs import Pairs  # noqa: E402
from pycm.cli.recalls import measure  # noqa: E402
from pycm.cli.systems import VIDEO_TEXT  # noqa: E402


def test_equal_texts_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = make().fit(TRAIN, TEXTS, epochs=3, lr=5e-3, batch_size=32)
    for name in ("match", "evaluate"):  # whose clips are encoded already

        def called(self: Any, _: Any, *given: Any, name: str = name, **options: Any) -> Any:
            return getattr(VideoTextMatcher, f"_own_{name}")(self, TEST.take(range(5)), *given, **options)

        monkeypatch.setattr(VideoTextMatcher, f"_own_{name}", getattr(VideoTextMatcher, name), raising=False)
        monkeypatch.setattr(VideoTextMatcher, name, called)
    texts = [[WORDS[0]], [WORDS[1], WORDS[0]], [WORDS[2]], [WORDS[2]], [WORDS[3]]]
    names = [f"{i}.mp4" for i in range(5)]
    measured = measure(matcher, Pairs(VIDEO_TEXT, names, [Path(n) for n in names], texts), ks=[1, 3], skip=False)
    forward, backward = measured.recalls
    assert (forward.queries, forward.gallery) == (5, 4)
    assert (backward.queries, backward.gallery) == (4, 5)
    right = np.array([[word in own for word in measured.results.right] for own in texts])
    np.testing.assert_array_equal(measured.own(5, np.arange(4)), right)
    np.testing.assert_array_equal(measured.own(2, np.arange(4)), right[:2])
    for direction, matrix in (("video_to_text", right), ("text_to_video", right.T)):
        for row in measured.results.rows(direction):
            assert row.correct == matrix[row.query_index, row.match_index]
