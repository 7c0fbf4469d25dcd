"""Encoders that are trained on pairs which the matcher found itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")

from tuning_cases import CLIPS, HUES, KINDS, TEST, grey, lengths, make, picture  # noqa: E402

from pycm import ImageVideoMatcher, VideoTextMatcher  # noqa: E402
from pycm.encoders import ModuleEncoder  # noqa: E402
from pycm.streams import Appearance, FeatureDifferences  # noqa: E402

N = 16
DRAW = np.random.default_rng(0)
NAMES = [HUES[kind] + "".join(DRAW.choice(list("xyz"), 2)) for kind in KINDS[:40]]
KNOWN, MORE = (CLIPS[:N], NAMES[:N]), (CLIPS[N:40], [*NAMES[N:38], NAMES[0], "z" * 6])
IMAGES = [picture(kind, DRAW) for kind in KINDS[:40]]
FIT: dict[str, Any] = {"epochs": 6, "lr": 1e-2, "encoder_lr": 3e-2, "batch_size": 8, "validation": None}
ANY = {"unlabelled": MORE, "threshold": -1.0}


def seeing() -> ModuleEncoder:
    """An encoder that tells hues from the start."""
    encoder = grey()
    with torch.no_grad():
        encoder.module.conv.weight.copy_(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2)) / 60)
    return encoder


def reading() -> ModuleEncoder:
    """An encoder that tells letters from the start."""
    encoder = lengths()
    with torch.no_grad():
        encoder.module.embed.weight.copy_(torch.randn(256, 12, generator=torch.Generator().manual_seed(2)))
    return encoder


def clips_and_texts() -> VideoTextMatcher:
    encoder = seeing()
    return make(Appearance(encoder), FeatureDifferences(encoder), text_encoder=reading())


def images_and_clips() -> ImageVideoMatcher:
    options: dict[str, Any] = {"hidden": 16, "dim": 16, "head": "ranking", "loss": "info_nce", "progress": False}
    return ImageVideoMatcher(seeing(), [Appearance(seeing())], dropout=0.0, **options)


def found(first: Any, second: Any) -> tuple[Any, Any]:
    """Rows that are each other's nearest."""
    unit = [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float64) for x in (first, second)]
    scores = unit[0] @ unit[1].T
    there, back = scores.argmax(1), scores.argmax(0)
    rows = np.flatnonzero(back[there] == np.arange(len(scores)))
    return rows, there[rows]


def test_it_is_the_training_on_what_the_untrained_encoders_paired() -> None:
    alone = clips_and_texts().fit(*KNOWN, **FIT)
    i, j = found(alone.embed_clips(MORE[0]), alone.embed_texts(MORE[1]))
    clips = [*KNOWN[0], *(MORE[0][n] for n in i)]
    texts = [*KNOWN[1], *(MORE[1][n] for n in j)]
    assert len(i) >= 3
    expected = clips_and_texts().fit(clips, texts, fine_tune="all", **FIT)
    matcher = clips_and_texts().fit(*KNOWN, fine_tune="all", **ANY, **FIT)
    assert matcher.pseudo_pairs_ == len(i)
    np.testing.assert_array_equal(matcher.embed_clips(TEST), expected.embed_clips(TEST))
    np.testing.assert_array_equal(matcher.embed_texts(NAMES), expected.embed_texts(NAMES))
    for name in ("appearance", "text"):
        assert matcher.encoders[name].fingerprint != alone.encoders[name].fingerprint
    assert matcher.encoders["appearance"].encoder is matcher.encoders["differences"].source.encoder


def test_images_and_clips() -> None:
    given = IMAGES[:N], CLIPS[:N]
    more = IMAGES[N:], [CLIPS[n] for n in np.random.default_rng(1).permutation(np.arange(N, 40))]
    alone = images_and_clips().fit(*given, **FIT)
    i, j = found(alone.embed_images(more[0]), alone.embed_clips(more[1]))
    images, clips = [*given[0], *(more[0][n] for n in i)], [*given[1], *(more[1][n] for n in j)]
    expected = images_and_clips().fit(images, clips, fine_tune="all", **FIT)
    matcher = images_and_clips().fit(*given, fine_tune="all", unlabelled=more, threshold=-1.0, **FIT)
    assert matcher.pseudo_pairs_ == len(i) >= 3
    np.testing.assert_array_equal(matcher.scores(IMAGES[:9], TEST), expected.scores(IMAGES[:9], TEST))
    assert np.abs(matcher.scores(IMAGES[:9], TEST) - alone.scores(IMAGES[:9], TEST)).max() > 1e-3


def test_where_nothing_is_found_the_known_pairs_train_the_encoders() -> None:
    expected = clips_and_texts().fit(*KNOWN, fine_tune="appearance", **FIT)
    matcher = clips_and_texts().fit(*KNOWN, fine_tune="appearance", **(ANY | {"threshold": 1.5}), **FIT)
    assert matcher.pseudo_pairs_ == 0
    np.testing.assert_array_equal(matcher.embed_clips(TEST), expected.embed_clips(TEST))


def test_streams_of_one_encoder_share_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = FIT | {"epochs": 1}
    alone = clips_and_texts().fit(*KNOWN, **fit)
    i, _ = found(alone.embed_clips(MORE[0]), alone.embed_texts(MORE[1]))
    passes: list[int] = []
    forward = ModuleEncoder._forward
    monkeypatch.setattr(
        ModuleEncoder, "_forward",
        lambda self, x: (passes.append(len(x) if self.modality == "image" else 0), forward(self, x))[1],
    )  # fmt: skip
    clips_and_texts().fit(*KNOWN, fine_tune="differences", **ANY, **fit)
    frames = [len(clip.frames) for clip in CLIPS[:40]]
    assert sum(passes) == sum(frames) + sum(frames[:N]) + sum(frames[N + n] for n in i)  # before, and in training


def test_a_checkpoint_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    fit = FIT | {"epochs": 1, "checkpoint": tmp_path, "fine_tune": "appearance"}
    first = clips_and_texts().fit(*KNOWN, **ANY, **fit)
    again = clips_and_texts().fit(*KNOWN, **ANY, **fit)
    np.testing.assert_array_equal(again.embed_clips(TEST), first.embed_clips(TEST))
    changed = [type(clip).from_frames(255 - clip.frames, name=clip.name) for clip in MORE[0]]
    with pytest.raises(ValueError, match="of a training on other data or with other options"):
        clips_and_texts().fit(*KNOWN, **(ANY | {"unlabelled": (changed, MORE[1])}), **fit)
