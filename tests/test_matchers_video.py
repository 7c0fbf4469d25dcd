"""`VideoTextMatcher`: what only the order of steps tells, heads, use, saving."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch
from clip_cases import WORDS, LetterEncoder, clip_features, ramps, sequences
from video_text_cases import FIT, KINDS, SHORT, TEST, TEXTS, TRAIN, TRUTH, accuracy, make

from pycm import VideoTextMatcher, evaluate, losses, matchers
from pycm.matchers.inputs import Steps
from pycm.matchers.learning import Pairs
from pycm.matchers.towers import StreamPool
from pycm.spaces import Ridge
from pycm.streams import Sequences


@pytest.fixture(scope="module")
def fitted() -> VideoTextMatcher:
    return make().fit(TRAIN, TEXTS, **FIT)


class TestOrder:
    def test_a_recurrent_matcher_learns_it(self, fitted: VideoTextMatcher) -> None:
        assert accuracy(fitted) >= 0.9
        assert [record["epoch"] for record in fitted.history_] == list(range(len(fitted.history_)))

    @pytest.mark.parametrize("loss", ["info_nce", losses.SigmoidLoss()])
    def test_with_other_losses_and_cells(self, loss: Any) -> None:
        assert accuracy(make(loss=loss, cell="lstm").fit(TRAIN, TEXTS, **FIT)) >= 0.9

    @pytest.mark.parametrize("pool", ["mean", "attention", "gpo"])
    def test_without_a_cell_it_is_at_chance(self, pool: str) -> None:
        assert accuracy(make(cell=None, pool=pool).fit(TRAIN, TEXTS, **(FIT | {"epochs": 8}))) < 0.45

    def test_distances_rank_as_well(self) -> None:
        matcher = make(metric="euclidean").fit(TRAIN, TEXTS, **FIT)
        assert accuracy(matcher) >= 0.9
        np.testing.assert_allclose(np.linalg.norm(matcher.embed_clips(TEST), axis=1), 1, rtol=1e-5)


class TestHeads:
    def test_pairs(self) -> None:
        matcher = make(head="pairs").fit(TRAIN, TEXTS, **FIT)
        right = [WORDS[kind] for kind in TRUTH]
        wrong = [WORDS[(kind + 1) % 4] for kind in TRUTH]
        assert matcher.predict(TEST, right).mean() >= 0.85
        assert matcher.predict(TEST, wrong).mean() <= 0.15
        assert accuracy(matcher) >= 0.9
        scores = matcher.scores(TEST, WORDS)
        found = matcher.match(TEST, WORDS, k=2)
        assert found.metric == "logit"
        np.testing.assert_array_equal(found.video_to_text.indices, np.argsort(-scores, axis=1, kind="stable")[:, :2])
        np.testing.assert_array_equal(found.text_to_video.scores, -np.sort(-scores.T, axis=1)[:, :2])
        probabilities = matcher.predict_proba(TEST, right)
        np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-scores[np.arange(100), TRUTH])), rtol=1e-4)
        # Of two proposed by the embeddings, the classifier's order.
        matcher.candidates = 2
        rows, texts = matcher.embed_clips(TEST), matcher.embed_texts(WORDS)
        cosine = (rows / np.linalg.norm(rows, axis=1)[:, None]) @ (texts / np.linalg.norm(texts, axis=1)[:, None]).T
        near = np.argsort(-cosine, axis=1, kind="stable")[:, :2]
        best = np.take_along_axis(near, np.take_along_axis(scores, near, 1).argmax(1)[:, None], 1)
        np.testing.assert_array_equal(matcher.match(TEST, WORDS, k=1).video_to_text.indices, best)

    def test_labels(self, tmp_path: Path) -> None:
        names = np.array(["left", "right", "grow", "shrink"])
        matcher = make(head="labels").fit(TRAIN, names[KINDS], **FIT)
        assert matcher.score(TEST, names[TRUTH]) >= 0.9
        assert matcher.labels_ == sorted(names)
        probabilities = matcher.predict_proba(TEST)
        assert probabilities.shape == (100, 4)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
        matcher.save(tmp_path)
        np.testing.assert_array_equal(matchers.load(tmp_path, progress=False).predict(TEST), matcher.predict(TEST))
        with pytest.raises(ValueError, match=r"match: needs head='ranking' or 'pairs', this matcher has 'labels'"):
            matcher.match(TEST, WORDS)
        with pytest.raises(ValueError, match="label 'up' is not among the training labels"):
            make(head="labels").fit(TRAIN, names[KINDS], validation=(TEST, ["up"] * 100), **SHORT)

    def test_smoothed_labels_leave_the_others_their_share(self) -> None:
        """A fitted network says 1 - 3/4 s of the label and s/4 of each of the three others."""
        names = np.array(["left", "right", "grow", "shrink"])
        matcher = make(head="labels", dropout=0.0).fit(TRAIN, names[KINDS], **FIT, label_smoothing=0.4)
        right = np.sort(matcher.predict_proba(TRAIN), axis=1)
        np.testing.assert_allclose(np.median(right, axis=0), [0.1, 0.1, 0.1, 0.7], atol=0.03)

    def test_input_dropout_is_of_the_features_and_in_training_alone(self) -> None:
        pool = StreamPool(6, 8, None, "mean", 0.0, bidirectional=False, input_dropout=0.5)
        read: list[Any] = []
        pool.project.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        steps = Steps(torch.full((400, 6), 3.0), torch.tensor([0, 400]), torch.ones(1, dtype=torch.bool))
        pool(steps)
        pool.eval()(steps)
        assert sorted(read[0].unique().tolist()) == [0.0, 6.0]
        assert 0.4 < float((read[0] == 0).double().mean()) < 0.6
        assert read[1].unique().tolist() == [3.0]

    def test_input_dropout_reaches_each_stream(self) -> None:
        matcher = make(input_dropout=0.3).fit(TRAIN, TEXTS, **(FIT | {"epochs": 0}))
        rates = [module.p for module in matcher._network.modules() if isinstance(module, torch.nn.Dropout)]
        assert rates.count(0.3) == 1


class TestUse:
    def test_match_is_the_best_of_scores(self, fitted: VideoTextMatcher) -> None:
        scores = fitted.scores(TEST, WORDS)
        found = fitted.match(TEST, WORDS, k=(2, 7))
        np.testing.assert_array_equal(found.video_to_text.indices, np.argsort(-scores, 1, kind="stable")[:, :2])
        np.testing.assert_array_equal(found.text_to_video.indices, np.argsort(-scores.T, 1, kind="stable")[:, :7])
        assert found.clips == TEST.names
        assert found.texts == WORDS
        assert found.metric == "cosine"
        assert set(found.seconds) == {"encode texts", "score"}

    def test_evaluate_is_retrieval_metrics_of_scores(self, fitted: VideoTextMatcher) -> None:
        some = TEST.take([0, 1, 2])
        texts = [["it grows", "it moves left"], "it shrinks", ["it moves right"]]
        scores = fitted.scores(some, ["it grows", "it moves left", "it shrinks", "it moves right"])
        found = fitted.evaluate(some, texts, ks=(1, 2))
        there = evaluate.retrieval_metrics(scores, [[0, 1], [2], [3]], (1, 2))
        back = evaluate.retrieval_metrics(scores.T.copy(), [0, 0, 1, 2], (1, 2))
        np.testing.assert_array_equal(found.video_to_text.ranks, there.ranks)
        np.testing.assert_array_equal(found.text_to_video.ranks, back.ranks)

    def test_a_clip_s_row_does_not_depend_on_the_others(self, fitted: VideoTextMatcher) -> None:
        np.testing.assert_allclose(
            fitted.embed_clips(TEST.take([7])), fitted.embed_clips(TEST)[7:8], rtol=1e-4, atol=1e-6
        )

    def test_contributions_name_the_stream_that_matters(self) -> None:
        draw = np.random.default_rng(0)
        noise = [sequences([draw.normal(size=(4, 3)) for _ in range(n)]) for n in (240, 100)]
        train = clip_features({**TRAIN.streams, "noise": noise[0]})
        test = clip_features({**TEST.streams, "noise": noise[1]})
        matcher = make()
        matcher = VideoTextMatcher(
            ["noise", "ramp"], **{k: v for k, v in matcher.get_params().items() if k != "streams"}
        )
        found = matcher.fit(train, TEXTS, **FIT).contributions(
            test.take(range(20)), [WORDS[k] for k in TRUTH[:20]], k=1
        )
        assert found["ramp"] > 0.2
        assert abs(found["noise"]) < found["ramp"] / 2

    def test_a_stream_that_a_clip_lacks_counts_for_nothing(self) -> None:
        given = TRAIN.streams["ramp"]
        present = np.arange(240) % 3 > 0
        values = [
            np.where(there, x, 99.0)
            for x, there in zip(np.split(given.values, given.cu_seqlens[1:-1]), present, strict=True)
        ]
        marked = sequences(values)
        features = []
        for filler in (1.0, 99.0):
            filled = np.where(np.repeat(present, np.diff(marked.cu_seqlens))[:, None], marked.values, filler)
            part = Sequences(filled.astype(np.float32), marked.cu_seqlens, marked.times, present)
            features.append(clip_features({"ramp": given, "part": part}))
        options = {k: v for k, v in make().get_params().items() if k != "streams"}
        rows = [VideoTextMatcher(["ramp", "part"], **options).fit(f, TEXTS, **SHORT).embed_clips(f) for f in features]
        np.testing.assert_array_equal(*rows)

    def test_the_loss_is_told_what_is_right(self) -> None:
        seen: list[tuple[int, int]] = []

        class Recorder(losses.InfoNCE):
            def forward(self, queries: Any, gallery: Any, groups: Any = None, ignored: Any = None) -> Any:
                seen.append((len(queries), len(ignored)))
                return super().forward(queries, gallery, ignored=ignored)

        texts = [["it grows", "it shrinks"], "it shrinks", "it moves left", "it moves right"]
        make(loss=Recorder()).fit(TRAIN.take(range(4)), texts, validation=None, epochs=2)
        # Five pairs. Of "it grows" and "it shrinks", both of the first clip, each is none of the other's; "it shrinks"
        # stands twice, and is right of both clips; but "it grows" is wrong of the second.
        assert seen == [(5, 5)] * 2

    def test_a_text_of_all_clips_leaves_their_others_to_learn_from(self) -> None:
        draw = np.random.default_rng(0)
        clips = clip_features({"ramp": sequences([draw.normal(size=(4, 16)) for _ in range(40)])})
        own = [f"number{i}" for i in range(40)]
        options: dict[str, Any] = {"epochs": 40, "lr": 5e-3, "batch_size": 40}
        right = []
        for texts in ([[text] for text in own], [[text, "it is shown"] for text in own]):
            matcher = make(cell=None, pool="mean", dropout=0.0)
            matcher.fit(clips, texts, validation=(clips, texts), **options)
            assert matcher.history_[1]["loss"] > 1
            assert matcher.history_[0]["recall@1"] < 0.6
            right.append((matcher.scores(clips, own).argmax(1) == np.arange(40)).mean())
            best = max(matcher.history_, key=lambda record: record["mrr"])
            there, back = matcher.evaluate(clips, texts, (1, 5))
            for k in (1, 5):
                assert best[f"recall@{k}"] == (there.recall_at_k[k] + back.recall_at_k[k]) / 2
        assert right[0] >= 0.9
        assert right[1] >= right[0] - 0.1

    def test_equal_texts_are_one_that_belongs_to_all_their_clips(self, fitted: VideoTextMatcher) -> None:
        clips, texts = TEST.take(range(6)), ["it grows", ["it shrinks", "it grows"], "it grows", "it moves left"]
        texts += [["it moves left", "it moves left"], "it moves right"]
        different = ["it grows", "it shrinks", "it moves left", "it moves right"]
        right = np.array([[text in ([given] if isinstance(given, str) else given) for text in different]
                          for given in texts])  # fmt: skip
        scores = fitted.scores(clips, different)
        found = fitted.evaluate(clips, texts)
        for metrics, s, own in ((found.video_to_text, scores, right), (found.text_to_video, scores.T, right.T)):
            best = np.where(own, s, -np.inf).max(1, keepdims=True)
            np.testing.assert_array_equal(metrics.ranks, (s > best).sum(1))

    def test_the_log_has_each_fold_and_then_the_means(self, tmp_path: Path) -> None:
        matcher = make().fit(TRAIN.take(range(12)), TEXTS[:12], validation=2, log=tmp_path / "log.csv", **SHORT)
        rows = list(csv.DictReader((tmp_path / "log.csv").open()))
        assert [(row["fold"], row["epoch"]) for row in rows] == [(f, e) for f in ("0", "1", "") for e in "012"]
        for i, record in enumerate(matcher.history_):
            mrr = [float(row["mrr"]) for row in rows[i::3]]
            np.testing.assert_allclose([mrr[2], np.mean(mrr[:2])], record["mrr"], rtol=1e-7)

    def test_an_encoder_that_has_to_be_fitted_is(self, tmp_path: Path) -> None:
        pytest.importorskip("sklearn")
        matcher = make(text_encoder="tfidf").fit(TRAIN, TEXTS, **SHORT)
        matcher.save(tmp_path)
        loaded = VideoTextMatcher.load(tmp_path)
        np.testing.assert_array_equal(loaded.scores(TEST, WORDS), matcher.scores(TEST, WORDS))
        others = [text.replace("it", "something").upper() + " here" for text in TEXTS]
        again = loaded.fit(TRAIN, others, **SHORT).embed_texts(others[:8])  # and to the texts of a later fit
        fresh = make(text_encoder="tfidf").fit(TRAIN, others, **SHORT)
        np.testing.assert_array_equal(again, fresh.embed_texts(others[:8]))

    def test_given_validation_clips_are_used(self) -> None:
        matcher = make().fit(TRAIN, TEXTS, validation=(TEST, [WORDS[k] for k in TRUTH]), **SHORT)
        metrics = matcher.history_[-1]
        assert metrics["recall@5"] >= metrics["recall@1"]
        none = make().fit(TRAIN, TEXTS, validation=None, **SHORT)
        assert list(none.history_[0]) == ["epoch", "loss", "lr"]


class TestSaving:
    def test_it_comes_back_bit_for_bit(self, fitted: VideoTextMatcher, tmp_path: Path) -> None:
        fitted.save(tmp_path / "saved")
        loaded = matchers.load(tmp_path / "saved", progress=False)
        assert isinstance(loaded, VideoTextMatcher)
        np.testing.assert_array_equal(loaded.scores(TEST, WORDS), fitted.scores(TEST, WORDS))
        loaded.save(tmp_path / "again")
        documents = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "again")]
        folders = [
            tmp_path / name / document.pop("parts")
            for name, document in zip(("saved", "again"), documents, strict=True)
        ]
        assert documents[0] == documents[1]
        assert len({(folder / "network.safetensors").read_bytes() for folder in folders}) == 1
        with pytest.raises(ValueError, match="not a saved matcher"):
            matchers.ImageTextMatcher.load(tmp_path / "saved")

    def test_with_a_linear_start_and_an_encoder_of_one_s_own(self, tmp_path: Path) -> None:
        matcher = make(text_encoder=LetterEncoder(), space=Ridge(), space_streams=["ramp"])
        matcher.fit(TRAIN, TEXTS, **SHORT).save(tmp_path)
        with pytest.raises(ValueError, match=r"'letters' in .* pass it: load\(folder, text_encoder=\.\.\.\)"):
            VideoTextMatcher.load(tmp_path)
        loaded = VideoTextMatcher.load(tmp_path, text_encoder=LetterEncoder())
        np.testing.assert_array_equal(loaded.scores(TEST, WORDS), matcher.scores(TEST, WORDS))
        other = LetterEncoder()
        other.fingerprint = "letters-2"
        with pytest.raises(ValueError, match="text_encoder 'letters' is not the one"):
            VideoTextMatcher.load(tmp_path, text_encoder=other)
        VideoTextMatcher.load(tmp_path, text_encoder=other, strict=False)
        with pytest.raises(TypeError, match="unknown argument 'text_model'"):
            VideoTextMatcher.load(tmp_path, text_model="x")
        for name in ("hidden", "metric", "space", "image_encoder"):  # the network's, or another class's
            with pytest.raises(TypeError, match=f"unknown argument '{name}'; there are: streams, text_encoder, cache"):
                VideoTextMatcher.load(tmp_path, text_encoder=LetterEncoder(), **{name: None})

    def test_what_is_not_fitted_or_saved_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"VideoTextMatcher\.save: not fitted"):
            make().save(tmp_path)
        with pytest.raises(RuntimeError, match=r"VideoTextMatcher\.match: not fitted"):
            make().match(TEST, WORDS)
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "config.json").write_text('{"class": "Ridge"}')
        with pytest.raises(ValueError, match="names an unknown matcher 'Ridge'"):
            matchers.load(tmp_path)

    def test_an_interrupted_fit_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = make().fit(TRAIN, TEXTS, **(FIT | {"epochs": 5}))
        epochs: list[int] = []
        original = Pairs.validate

        def validate(self: Any, *arguments: Any) -> Any:
            epochs.append(len(epochs))
            if len(epochs) == 3:
                signal.raise_signal(signal.SIGINT)
            return original(self, *arguments)

        monkeypatch.setattr(Pairs, "validate", validate)
        matcher = make()
        with pytest.raises(KeyboardInterrupt):
            matcher.fit(TRAIN, TEXTS, checkpoint=tmp_path, **(FIT | {"epochs": 5}))
        assert not matcher.fitted
        assert len(epochs) == 3
        matcher.fit(TRAIN, TEXTS, checkpoint=tmp_path, **(FIT | {"epochs": 5}))
        assert len(epochs) == 6
        np.testing.assert_array_equal(matcher.scores(TEST, WORDS), whole.scores(TEST, WORDS))
        with pytest.raises(ValueError, match="of a training on other data or with other options"):
            make(seed=1).fit(TRAIN, TEXTS, checkpoint=tmp_path, **(FIT | {"epochs": 5}))
        with pytest.raises(ValueError, match="of a training on other data or with other options"):
            make().fit(TRAIN, TEXTS[::-1], checkpoint=tmp_path, **(FIT | {"epochs": 5}))


def test_features_of_another_size_are_refused(fitted: VideoTextMatcher) -> None:
    wide, _ = ramps(5, 2, noise=3)
    with pytest.raises(ValueError, match=r"match: fitted to clip features .*4.*, got .*5"):
        fitted.match(wide, WORDS)
