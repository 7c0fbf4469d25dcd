"""`VideoTextMatcher` on little data: linear start, folds, pairs that nobody labelled, another domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from clip_cases import WORDS, LetterEncoder, clip_features, sequences
from video_text_cases import FIT, KINDS, SHORT, TEST, TEXTS, TRAIN, accuracy, make

from pycm import VideoTextMatcher, evaluate
from pycm.matchers.learning import Pairs
from pycm.spaces import Ridge
from pycm.streams import ClipFeatures, Sequences


def letter_clips(count: int = 60, seed: int = 4, noise: float = 1.5) -> tuple[ClipFeatures, list[str]]:
    """Clips whose mean step says, through a linear map, which letters their text has."""
    draw = np.random.default_rng(seed)
    texts = ["".join(draw.choice(list("eilmnorstv"), 12)) for _ in range(count)]
    mix = np.random.default_rng(9).normal(size=(10, 16))
    clips = [row @ mix + draw.normal(0, noise, (5, 16)) for row in LetterEncoder().encode(texts)]
    return clip_features({"ramp": sequences(clips)}), texts


class TestLinearStart:
    def test_it_begins_where_ridge_on_the_mean_step_is(self) -> None:
        clips, texts = letter_clips()
        train, test = np.arange(40), np.arange(40, 60)
        matcher = make(text_encoder=LetterEncoder(), space=Ridge())
        matcher.fit(clips.take(train), [texts[i] for i in train], epochs=0)
        means = np.stack([np.mean(values, axis=0) for values in np.split(clips.streams["ramp"].values, 60)])
        ridge = Ridge().fit(means[train], LetterEncoder().encode([texts[i] for i in train]))
        rows = ridge.transform_images(means[test]), ridge.transform_texts(LetterEncoder().encode(texts[40:]))
        expected = evaluate.retrieval_metrics((*rows, "cosine"), np.arange(20))
        found = matcher.evaluate(clips.take(test), texts[40:])
        np.testing.assert_array_equal(found.video_to_text.ranks, expected.ranks)
        assert expected.recall_at_k[5] > 0.5  # there is something to begin with

    def test_the_network_learns_from_what_the_map_says_of_clips_it_was_not_fitted_to(self) -> None:
        from pycm.matchers.linear_start import fit_start

        clips, texts = letter_clips()
        x = clips.streams["ramp"].means().astype(np.float64)
        y = LetterEncoder().encode(texts).astype(np.float64)
        pairs = np.stack([np.arange(60)] * 2, 1)
        space = Ridge(alpha=1.0)
        outside = fit_start(space, x, y, pairs, seed=0)
        fold = np.random.default_rng(0).permutation(60) % 10
        held = fold == 3
        other = Ridge(alpha=1.0, center=False).fit(x[~held], y[~held])
        mean = (y / np.linalg.norm(y, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(outside[held], other.transform_images(x[held]) - mean, atol=1e-5)

    def test_the_network_adds_what_order_tells(self) -> None:
        matcher = make(text_encoder=LetterEncoder(), space=Ridge()).fit(TRAIN, TEXTS, **FIT)
        assert matcher.history_[0]["recall@1"] < 0.5  # the mean step tells nothing
        assert accuracy(matcher) >= 0.9


class TestFolds:
    def test_they_choose_the_number_of_epochs_for_all_of_the_data(self, tmp_path: Path) -> None:
        clips, texts = letter_clips(40)
        options = {"text_encoder": LetterEncoder(), "space": Ridge()}
        fit: dict[str, Any] = {"epochs": 3, "lr": 2e-2, "batch_size": 16}
        matcher = make(**options).fit(clips, texts, validation=4, checkpoint=tmp_path, log=tmp_path / "log.csv", **fit)
        fold_of = np.random.default_rng([0, 1]).permutation(40) % 4
        curves = []
        for fold in range(4):
            mine, theirs = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            held = (clips.take(theirs), [texts[i] for i in theirs])
            one = make(**options).fit(clips.take(mine), [texts[i] for i in mine], validation=held, patience=None, **fit)
            curves.append([record["mrr"] for record in one.history_])
        mean = [record["mrr"] for record in matcher.history_]
        assert len(mean) == 4
        assert abs(mean[0] - np.mean(curves, axis=0)[0]) < 0.1
        best = int(np.argmax(mean))
        whole = make(**options).fit(clips, texts, validation=None, **(fit | {"epochs": 3}))
        same = np.array_equal(whole.embed_clips(clips), matcher.embed_clips(clips))
        assert same == (best == 3)
        assert sorted(path.name for path in tmp_path.glob("**/training.pt")) == ["training.pt"] * 5
        lines = (tmp_path / "log.csv").read_text().splitlines()[1:]
        assert [line.partition(",")[0] for line in lines] == [*"0000111122223333", *[""] * 4]  # the folds, their means
        again = make(**options).fit(clips, texts, validation=4, checkpoint=tmp_path, **fit)
        np.testing.assert_array_equal(again.embed_clips(clips), matcher.embed_clips(clips))

    @pytest.mark.parametrize("folds", [1, 21])
    def test_their_number(self, folds: int) -> None:
        clips, texts = letter_clips(40)
        with pytest.raises(ValueError, match=rf"fit: validation must be in \[2, 20\] folds for 40 items, got {folds}"):
            make().fit(clips, texts, validation=folds)

    def test_labels(self, tmp_path: Path) -> None:
        log = tmp_path / "run" / "log.csv"  # its folder is made
        matcher = make(head="labels").fit(TRAIN.take(range(40)), KINDS[:40], validation=2, log=log, **SHORT)
        assert [record["epoch"] for record in matcher.history_] == [0, 1, 2]
        folds = [line.partition(",")[0] for line in log.read_text().splitlines()[1:]]
        assert folds == [*"000111", *[""] * 3]

    def test_a_log_that_cannot_be_written_is_told_before_the_training(self, tmp_path: Path) -> None:
        matcher, log = make(head="labels"), tmp_path / "log.csv"
        log.mkdir()
        with pytest.raises(OSError, match=r"log\.csv"):
            matcher.fit(TRAIN, KINDS, validation=2, checkpoint=tmp_path / "run", log=log, **SHORT)
        assert not (tmp_path / "run").exists()


class TestLearningWithLess:
    def mrr(self, matcher: VideoTextMatcher, clips: ClipFeatures, texts: list[str]) -> float:
        return matcher.evaluate(clips, texts).video_to_text.mrr

    def test_pairs_that_nobody_labelled(self) -> None:
        clips, texts = letter_clips(200, noise=4.0)
        known, rest, test = np.arange(15), np.arange(15, 140), np.arange(140, 200)
        wanted = clips.take(test), [texts[i] for i in test]
        fit: dict[str, Any] = {"epochs": 0, "validation": None}
        alone = make(text_encoder=LetterEncoder(), space=Ridge()).fit(clips.take(known), texts[:15], **fit)
        shuffled = [texts[i] for i in np.random.default_rng(0).permutation(rest)]
        both = make(text_encoder=LetterEncoder(), space=Ridge())
        both.fit(clips.take(known), texts[:15], unlabelled=(clips.take(rest), shuffled), threshold=0.5, **fit)
        assert self.mrr(both, *wanted) > self.mrr(alone, *wanted) + 0.05
        none = make(text_encoder=LetterEncoder(), space=Ridge())
        none.fit(clips.take(known), texts[:15], unlabelled=(clips.take(rest), shuffled), threshold=1.0, **fit)
        np.testing.assert_array_equal(none.embed_clips(wanted[0]), alone.embed_clips(wanted[0]))

    def test_what_is_known_already_is_no_item_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        learn = VideoTextMatcher._learn

        def recorded(self: Any, function: Any, first: Any, second: Any, pairs: Any, *given: Any, **more: Any) -> None:
            seen.append((len(first), len(second), pairs.tolist(), more.get("extra", 0)))
            learn(self, function, first, second, pairs, *given, **more)

        monkeypatch.setattr(VideoTextMatcher, "_learn", recorded)
        clips, texts = letter_clips(60, noise=0.1)
        fit: dict[str, Any] = {"epochs": 0, "validation": None, "threshold": -1.0}
        # Clips 38 and 39 are known; 40 says nearly what the known text 0 does.
        values = clips.streams["ramp"].values.copy()
        values[200:205] = values[:5]
        ramp = clips.streams["ramp"]
        clips = clip_features({"ramp": Sequences(values, ramp.cu_seqlens, ramp.times, ramp.present)})
        matcher = make(text_encoder=LetterEncoder(), space=Ridge())
        matcher.fit(
            clips.take(range(40)), texts[:40], unlabelled=(clips.take([38, 39, 40]), [texts[0], *texts[38:40]]), **fit
        )
        given = [[i, i] for i in range(40)]
        assert seen == [(40, 40, given, 0), (41, 40, [*given, [40, 0]], 1)]

    def test_a_name_that_is_a_place_tells_nothing(self) -> None:
        from pycm.matchers.adaptation import extended
        from pycm.matchers.encoded import Encoded
        from pycm.matchers.inputs import Rows

        rows = pytest.importorskip("torch").arange(3.0)[:, None]
        more = Encoded(Rows(rows + 10), ["clips[0]", "b", "c"], np.arange(3), [], {})
        both, where = extended(Rows(rows), ["clips[0]", "b", "a"], more, np.array([2, 1, 0]))
        assert both.values[:, 0].tolist() == [0, 1, 2, 12, 10]  # type: ignore[union-attr]
        assert where.tolist() == [3, 1, 4]

    def test_they_are_not_validated_on(self) -> None:
        from pycm.matchers.inputs import Inputs, Rows

        rows = pytest.importorskip("torch").arange(10.0)[:, None]
        pairs = np.repeat(np.arange(10)[:, None], 2, 1)
        problem = Pairs(Inputs(Rows(rows)), Inputs(Rows(rows)), pairs, extra=4)
        assert problem.items == 6
        assert problem.learned(np.array([0, 2])).first.features.values[:, 0].tolist() == [0, 2, 6, 7, 8, 9]
        assert problem.take(np.array([0, 2])).first.features.values[:, 0].tolist() == [0, 2]

    def test_another_domain(self) -> None:
        clips, texts = letter_clips(160, noise=0.6)
        draw = np.random.default_rng(1)
        ramp = clips.streams["ramp"]
        other = ramp.values @ (np.eye(16) + draw.normal(0, 0.25, (16, 16))).astype(np.float32) + 3
        source = clip_features({"ramp": Sequences(other, ramp.cu_seqlens, ramp.times, ramp.present)})
        train, test = np.arange(80), np.arange(80, 160)
        wanted = clips.take(test), [texts[i] for i in test]
        fit: dict[str, Any] = {"epochs": 0, "validation": None}
        plain = make(text_encoder=LetterEncoder(), space=Ridge()).fit(source.take(train), texts[:80], **fit)
        moved = make(text_encoder=LetterEncoder(), space=Ridge())
        moved.fit(source.take(train), texts[:80], target_clips=clips.take(test), **fit)
        assert self.mrr(moved, *wanted) > self.mrr(plain, *wanted) + 0.1

    def test_what_does_not_go_together(self) -> None:
        with pytest.raises(ValueError, match="unlabelled and threshold go together"):
            make().fit(TRAIN, TEXTS, threshold=0.5)
        with pytest.raises(ValueError, match="unlabelled must be None with head='labels'"):
            make(head="labels").fit(TRAIN, KINDS, unlabelled=(TEST, WORDS), threshold=0.5)
