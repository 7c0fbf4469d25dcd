"""What `VideoTextMatcher` refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from clip_cases import clip_features
from video_text_cases import SHORT, TEXTS, TRAIN, make

from pycm.spaces import Ridge
from pycm.streams import ClipFeatures, Sequences


def nan_clips() -> ClipFeatures:
    ramp = TRAIN.streams["ramp"]
    values = ramp.values.copy()
    values[ramp.cu_seqlens[17] + 2, 1] = np.nan
    return clip_features({"ramp": Sequences(values, ramp.cu_seqlens, ramp.times, ramp.present)})


@pytest.mark.parametrize(
    ("clips", "texts", "message"),
    [
        (TRAIN, TEXTS[:-1], r"fit: texts must have one entry for each of 240 clips, got 239"),
        (TRAIN.take(range(3)), ["a", [], "b"], r"fit: texts\[1\] is empty: clip 'clip1' has no text"),
        (TRAIN.take([0, 4, 4]), ["a", "b", "c"], r"fit: clips\[1\] and clips\[2\] are both 'clip4'"),
        (nan_clips(), TEXTS, r"fit: the 'ramp' features of clip 'clip17' hold NaN or infinity"),
        (clip_features({"other": TRAIN.streams["ramp"]}), TEXTS, r"fit: clips has no stream 'ramp', it has: other"),
        (TRAIN.take(range(3)), ["a", "b", "c"], r"fit: validation=0\.1 of 3 items leaves fewer than 2 to learn from"),
        (TRAIN.take([]), [], r"fit: clips is empty"),
        (TRAIN.take([0, 1, 2, 3]), ["?", "!", ".", ","], r"none of the 4 training texts has a word"),
    ],
)
def test_data_that_cannot_be_learned_from(clips: ClipFeatures, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().fit(clips, texts, **SHORT)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"cell": "rnn"}, ValueError, r"cell must be one of lstm, gru, None, got 'rnn'"),
        ({"pool": "none"}, ValueError, r"pool must be one of .*, got 'none'"),
        ({"pool": "last", "cell": None}, ValueError, r"pool must be one of mean, .*, got 'last'"),
        ({"loss": "hinge"}, ValueError, r"loss must be one of max_hinge, info_nce, sigmoid, triplet, got 'hinge'"),
        ({"hidden": 0}, ValueError, r"hidden must be a positive int, got 0"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1\.0"),
        ({"input_dropout": -0.1}, ValueError, r"input_dropout must be in \[0, 1\), got -0\.1"),
        ({"space": "ridge"}, TypeError, r"space must be a Ridge or None, got str"),
        ({"space": Ridge()}, ValueError, r'space must be None for text_encoder="words"'),
        ({"space_streams": ["sound"]}, ValueError, r"space_streams must be among ramp, got \['sound'\]"),
        ({"text_encoder": 3}, TypeError, r"text_encoder must be an encoder or the spec of one, got int"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**given)


def test_unknown_and_wrong_arguments_of_fit() -> None:
    with pytest.raises(TypeError, match=r"fit: unknown argument 'epoch'; of the training there are: epochs, lr"):
        make().fit(TRAIN, TEXTS, epoch=3)
    with pytest.raises(TypeError, match=r"fit: checkpoint must be a path or None, got int"):
        make().fit(TRAIN, TEXTS, checkpoint=3)
    with pytest.raises(ValueError, match=r"fit: label_smoothing must be in \[0\.0, 1\.0\], got 1\.5"):
        make(head="labels").fit(TRAIN, TEXTS, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"fit: label_smoothing is for head='labels', got 0\.1"):
        make().fit(TRAIN, TEXTS, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"fit: validation must be a share in \(0, 1\)"):
        make().fit(TRAIN, TEXTS, validation=2.0, **SHORT)
