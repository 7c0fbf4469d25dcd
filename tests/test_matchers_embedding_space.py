"""Spaces that are fitted to a network's embeddings: the correction of hubs, and codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from clip_cases import WORDS
from tuning_cases import CLIPS, HUES, KINDS, grey
from tuning_cases import make as make_tuned
from video_text_cases import SHORT, TEST, TEXTS, TRAIN, TRUTH, make

from pycm import Gallery, ImageVideoMatcher, VideoTextMatcher, evaluate, matchers, similarity
from pycm.spaces import CCA, ITQ, HubnessCorrection, Identity, Ridge, pack_codes
from pycm.streams import Appearance

SPACES: dict[str, Any] = {
    "hubness": lambda: HubnessCorrection(Identity(), k=3),
    "codes": lambda: ITQ(Identity(), bits=16),
    "another": lambda: CCA(),
}
DISTINCT = list(dict.fromkeys(TEXTS))


def fitted(space: Any, **options: Any) -> VideoTextMatcher:
    return make(embedding_space=space, **options).fit(TRAIN, TEXTS, validation=None, **SHORT)


@pytest.mark.parametrize("kind", SPACES)
def test_it_is_the_space_of_the_embeddings(kind: str, tmp_path: Path) -> None:
    plain, matcher = fitted(None), fitted(SPACES[kind]())
    pairs = np.stack([np.arange(len(TEXTS)), [DISTINCT.index(text) for text in TEXTS]], 1)
    space = SPACES[kind]().fit(plain.embed_clips(TRAIN), plain.embed_texts(DISTINCT), pairs)
    clips, texts = space.transform_images(plain.embed_clips(TEST)), space.transform_texts(plain.embed_texts(WORDS))
    np.testing.assert_array_equal(matcher.embed_clips(TEST), clips)
    np.testing.assert_array_equal(matcher.embed_texts(WORDS), texts)
    scores = similarity(clips, texts, "cosine")
    np.testing.assert_array_equal(matcher.scores(TEST, WORDS), scores)
    found = matcher.match(TEST, WORDS, k=(2, 7))
    np.testing.assert_array_equal(found.video_to_text.indices, np.argsort(-scores, 1, kind="stable")[:, :2])
    np.testing.assert_array_equal(found.text_to_video.indices, np.argsort(-scores.T, 1, kind="stable")[:, :7])
    right = [WORDS[kind] for kind in TRUTH]
    there = matcher.evaluate(TEST, right).video_to_text
    np.testing.assert_array_equal(there.ranks, evaluate.retrieval_metrics(scores, TRUTH).ranks)
    assert not matcher.embedding_space.fitted  # the one that was given stays as it was
    assert matcher.history_ == plain.history_  # and learning knows nothing of it

    matcher.save(tmp_path)
    loaded = matchers.load(tmp_path, progress=False)
    np.testing.assert_array_equal(loaded.scores(TEST, WORDS), scores)
    assert repr(loaded.embedding_space) == repr(matcher.embedding_space)
    loaded.fit(TRAIN.take(range(60)), TEXTS[:60], validation=None, **SHORT)
    again = make(embedding_space=SPACES[kind]()).fit(TRAIN.take(range(60)), TEXTS[:60], validation=None, **SHORT)
    np.testing.assert_array_equal(loaded.embed_clips(TEST), again.embed_clips(TEST))


def test_codes_of_clips_are_searched_by_hamming_distance() -> None:
    matcher = fitted(ITQ(Identity(), bits=12))
    codes, queries = matcher.embed_clips(TEST), matcher.embed_texts(WORDS)
    assert set(np.unique(codes)) == {-1.0, 1.0}
    apart = np.unpackbits(pack_codes(queries)[:, None] ^ pack_codes(codes), axis=2).sum(2)
    found = Gallery(codes, metric="dot").topk(queries, 10)
    np.testing.assert_array_equal(found.indices, np.argsort(apart, 1, kind="stable")[:, :10])
    there = matcher.match(TEST, WORDS, k=(1, 10)).text_to_video
    np.testing.assert_array_equal(there.indices, found.indices)
    np.testing.assert_array_equal(np.round((1 - there.scores) * 6), np.take_along_axis(apart, found.indices, 1))


def test_a_hub_loses_what_makes_it_one() -> None:
    """Of rows on one side of the origin, the one in their middle is nearest to nearly all."""
    draw = np.random.default_rng(0)
    centre = np.eye(8)[0] * 0.5
    images = centre + draw.normal(0, 0.3, (60, 8))
    texts = np.concatenate([images[:40] + draw.normal(0, 0.3, (40, 8)), np.tile(centre, (20, 1))])
    space = HubnessCorrection(Identity(), k=5).fit(images, texts)
    plain = similarity(images.astype(np.float32), texts.astype(np.float32), "cosine")
    less = similarity(space.transform_images(images), space.transform_texts(texts), "cosine")
    taken = [np.isin(scores[:40].argmax(1), np.arange(40, 60)).mean() for scores in (plain, less)]
    assert taken[1] < 0.6 * taken[0]


def test_the_linear_start_of_what_it_is_fitted_to_is_that_of_new_items() -> None:
    """Images that Ridge was fitted to would come to lie on their clips, where no new image does."""
    draw = np.random.default_rng(0)
    from clip_cases import clip_features, sequences

    rows = draw.normal(size=(30, 24)).astype(np.float32)
    clips = clip_features({"ramp": sequences([row[None] for row in rows])})
    texts = [f"number{i} {'ab'[i % 2]}" for i in range(30)]
    matcher = make(
        embedding_space=HubnessCorrection(Identity(), k=3), space=Ridge(alpha=1e-6), text_encoder="bag-of-words",
        cell=None, pool="mean",
    ).fit(clips, texts, validation=None, epochs=0)  # fmt: skip
    bank = matcher.embedding_space_._arrays
    own = np.diag(bank["images"] @ bank["texts"].T)
    plain = make(space=Ridge(alpha=1e-6), text_encoder="bag-of-words", cell=None, pool="mean")
    plain.fit(clips, texts, validation=None, epochs=0)
    known = np.diag(similarity(plain.embed_clips(clips), plain.embed_texts(texts), "cosine"))
    assert known.mean() > own.mean() + 0.3


def test_of_trained_encoders_it_has_the_trained_rows() -> None:
    """What the space is fitted to is what `embed_clips` gives afterwards, by the trained encoder."""
    names = [HUES[kind] for kind in KINDS[:24]]
    given: dict[str, Any] = {"epochs": 3, "lr": 1e-2, "encoder_lr": 3e-2, "batch_size": 8, "validation": None}
    rows = []
    for space in (None, HubnessCorrection(Identity(), k=2)):
        matcher = make_tuned(Appearance(grey()), embedding_space=space)
        matcher.fit(CLIPS[:24], names, fine_tune="appearance", **given)
        rows.append(matcher.embed_clips(CLIPS[:24]))
    bank = matcher.embedding_space_._arrays["images"]
    unit = rows[0] / np.linalg.norm(rows[0], axis=1, keepdims=True)
    np.testing.assert_allclose(bank, unit, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows[1][:, : unit.shape[1]], unit, rtol=1e-4, atol=1e-5)
    untrained = make_tuned(Appearance(grey())).fit(CLIPS[:24], names, **{**given, "epochs": 0}).embed_clips(CLIPS[:24])
    assert np.abs(untrained / np.linalg.norm(untrained, axis=1, keepdims=True) - unit).max() > 0.05


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embedding_space": "itq"}, TypeError, "embedding_space must be a space of pycm.spaces or None, got str"),
        ({"embedding_space": CCA(), "head": "pairs"}, ValueError, "embedding_space must be None for head='pairs'"),
        ({"embedding_space": CCA(), "head": "labels"}, ValueError, "embedding_space must be None for head='labels'"),
        ({"embedding_space": CCA(), "metric": "pearson"}, ValueError, "'pearson' does not keep the order"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_what_the_space_refuses_is_told_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("it trained")

    monkeypatch.setattr("pycm.matchers.trained.learn", never)
    for space, message in (
        (ITQ(Identity(), bits=33), "bits must be at most the space's 32 dimensions, got 33"),
        (HubnessCorrection(Identity(), k=99), "k must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            make(embedding_space=space).fit(TRAIN, TEXTS, **SHORT)


def test_images_and_clips_take_it_too() -> None:
    matcher = ImageVideoMatcher(head="ranking", embedding_space=ITQ(Identity(), 8))
    assert matcher.get_params()["embedding_space"].bits == 8
    assert "embedding_space=ITQ(space=Identity(), bits=8," in repr(matcher)
    assert "embedding_space" not in repr(ImageVideoMatcher())
    with pytest.raises(ValueError, match="embedding_space must be None for head='pairs'"):
        ImageVideoMatcher(embedding_space=ITQ(Identity(), 8))


class TestIdentity:
    def test_rows_stay_as_they_are(self, tmp_path: Path) -> None:
        draw = np.random.default_rng(0)
        rows = draw.normal(size=(5, 3))
        space = Identity().fit(rows, rows)
        np.testing.assert_array_equal(space.transform_images(rows), rows.astype(np.float32))
        space.save(tmp_path)
        loaded = Identity.load(tmp_path)
        np.testing.assert_array_equal(loaded.transform_texts(rows[:2]), rows[:2].astype(np.float32))

    def test_errors(self) -> None:
        rows = np.ones((4, 3))
        with pytest.raises(ValueError, match=r"Identity.fit: .* must be of one size, got 3 and 2"):
            Identity().fit(rows, rows[:, :2])
        with pytest.raises(RuntimeError, match=r"Identity.transform_images: not fitted"):
            Identity().transform_images(rows)
        with pytest.raises(ValueError, match="3"):
            Identity().fit(rows, rows).transform_texts(rows[:, :2])
