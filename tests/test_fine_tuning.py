"""Encoders that are trained with a matcher: what they learn, what stays as it was, and what is refused."""

from __future__ import annotations

import pickle
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")

from clip_cases import clip_features, sequences  # noqa: E402
from tuning_cases import (  # noqa: E402
    CLIPS,
    FIT,
    KINDS,
    SHORT,
    TEST,
    TEXTS,
    TRUTH,
    WORDS,
    appearance,
    grey,
    lengths,
    make,
    picture,
)  # fmt: skip

from pycm import ImageVideoMatcher, VideoTextMatcher, matchers  # noqa: E402
from pycm.encoders import FeatureCache, ModuleEncoder  # noqa: E402
from pycm.matchers.learning import Pairs  # noqa: E402
from pycm.matchers.training import Validation  # noqa: E402
from pycm.streams import Appearance, FeatureDifferences, PixelDifferences, encode_clips  # noqa: E402


def accuracy(matcher: VideoTextMatcher, clips: Any = TEST, truth: Any = TRUTH) -> float:
    found = matcher.match(clips, WORDS, k=1).video_to_text.indices[:, 0]
    return float((found == truth).mean())


def weights(encoder: Any) -> dict[str, np.ndarray]:
    return {name: weight.numpy().copy() for name, weight in encoder.module.state_dict().items()}


def changed(a: Any, b: Any) -> list[str]:
    return [name for name, weight in weights(a).items() if not np.array_equal(weight, weights(b)[name])]


@pytest.fixture(scope="module")
def tuned() -> VideoTextMatcher:
    return make().fit(CLIPS, TEXTS, fine_tune="appearance", **FIT)


class TestLearning:
    def test_it_sees_what_the_frozen_encoder_is_blind_to(self, tuned: VideoTextMatcher) -> None:
        frozen = make().fit(CLIPS, TEXTS, **FIT)
        assert accuracy(frozen) <= 0.45
        assert accuracy(tuned) >= 0.9
        assert tuned.history_[-1]["loss"] < 0.5 * frozen.history_[-1]["loss"]

    def test_a_copy_is_trained_and_batch_norm_keeps_its_statistics(self, tuned: VideoTextMatcher) -> None:
        given, copy = tuned.streams[0].encoder, tuned.encoders["appearance"].encoder
        assert changed(given, grey()) == []
        assert changed(copy, grey()) == [name for name, _ in grey().module.named_parameters()]
        assert copy.fingerprint not in (given.fingerprint, grey().fingerprint)
        assert given.fingerprint == grey().fingerprint
        other = make(seed=1).fit(CLIPS, TEXTS, fine_tune="appearance", **(SHORT | {"validation": None}))
        assert other.encoders["appearance"].fingerprint != tuned.encoders["appearance"].fingerprint

    def test_texts(self) -> None:
        draw = np.random.default_rng(0)
        told = [np.eye(4)[kind] + draw.normal(0, 0.2, (3, 4)) for kind in KINDS]
        features = clip_features({"told": sequences(told)})
        texts = [f"{WORDS[kind]}, {'x' * draw.integers(1, 9)}" for kind in KINDS]
        last = []
        for fine_tune in (None, "text"):
            matcher = make("told", text_encoder=lengths())
            matcher.fit(features, texts, fine_tune=fine_tune, **(FIT | {"validation": None}))
            rows = matcher.embed_texts(WORDS)
            last.append((matcher.history_[-1]["loss"], np.ptp(rows, axis=0).max()))
        assert last[0][1] < 1e-5  # to the frozen encoder all texts are one
        assert last[1][0] < 0.5 * last[0][0]
        assert last[1][1] > 0.1

    def test_labels_and_folds(self) -> None:
        matcher = make(head="labels").fit(CLIPS, KINDS, fine_tune="all", **FIT)
        assert matcher.score(TEST, TRUTH) >= 0.9
        folds = make().fit(CLIPS[:24], TEXTS[:24], fine_tune="appearance", **(SHORT | {"validation": 2}))
        assert len(folds.history_) == 3
        assert folds.history_[-1]["loss"] > 0

    def test_streams_of_one_encoder_share_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = grey()
        streams = [Appearance(encoder), FeatureDifferences(encoder), PixelDifferences(4)]
        passes: list[int] = []
        forward = ModuleEncoder._forward
        monkeypatch.setattr(ModuleEncoder, "_forward", lambda self, x: (passes.append(len(x)), forward(self, x))[1])
        matcher = make(*streams).fit(CLIPS, TEXTS, fine_tune="differences", **(SHORT | {"epochs": 1}))
        made = matcher.encoders
        assert made["appearance"].encoder is made["differences"].source.encoder
        assert made["appearance"].encoder is not encoder
        assert made["pixel-differences"] is streams[2]
        # Once each for both: encoded before, learned from, validated on before and after.
        frames = [len(clip.frames) for clip in CLIPS]
        held = np.random.default_rng([0, 1]).permutation(80)[:16]
        assert sum(passes) == 2 * sum(frames) + sum(frames[i] for i in held)

    def test_images_and_clips(self, tmp_path: Path) -> None:
        draw = np.random.default_rng(5)
        images = [[picture(kind, draw) for _ in range(2)] for kind in KINDS]
        options: dict[str, Any] = {"hidden": 16, "dim": 16, "head": "ranking", "loss": "info_nce", "progress": False}
        options |= {"dropout": 0.0}
        matcher = ImageVideoMatcher(grey(), [appearance()], **options).fit(
            images, CLIPS, fine_tune=["image", "appearance"], **(FIT | {"validation": None})
        )
        assert changed(matcher.encoders["image"], matcher.encoders["appearance"].encoder)
        tests = [[picture(kind, draw)] for kind in range(4)]
        scores = matcher.scores(tests, TEST)
        assert (scores.argmax(0) == TRUTH).mean() >= 0.9
        encoder = grey()
        shared = ImageVideoMatcher(encoder, [Appearance(encoder)], **(options | {"head": "pairs"}))
        shared.fit(images[:20], CLIPS[:20], fine_tune="image", **SHORT)
        assert shared.encoders["image"] is shared.encoders["appearance"].encoder
        assert shared.encoders["image"] is not encoder
        shared.save(tmp_path)
        assert len(list(tmp_path.glob("*/encoder-*"))) == 1
        loaded = matchers.load(tmp_path, image_encoder=grey(), streams=[appearance()], progress=False)
        np.testing.assert_array_equal(loaded.scores(images[:9], TEST), shared.scores(images[:9], TEST))


class TestExactness:
    def test_the_best_encoder_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[dict[str, np.ndarray]] = []
        figures = iter([0.0, 1.0, 3.0, 2.0])

        def validate(self: Any, network: Any, recipe: Any) -> Validation:
            frame = next(iter(self.first.features.parts.values())).values
            seen.append({"frame": frame.numpy().copy()})
            return Validation((next(figures),), {"mrr": 0.0})

        monkeypatch.setattr(Pairs, "validate", validate)
        held = (CLIPS[:6], TEXTS[:6])
        matcher = make().fit(CLIPS, TEXTS, fine_tune="appearance", **(FIT | {"epochs": 3, "validation": held}))
        rows = encode_clips([matcher.encoders["appearance"]], held[0], progress=False).streams["appearance"].values
        np.testing.assert_allclose(rows, seen[2]["frame"], rtol=1e-5, atol=1e-6)
        assert np.abs(seen[3]["frame"] - seen[2]["frame"]).max() > 1e-3

    @pytest.mark.parametrize("at", [3, 9])
    def test_an_interrupted_fit_goes_on_to_the_same_bits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
    ) -> None:
        def run(step: int | None, **options: Any) -> tuple[VideoTextMatcher, int]:
            count = 0
            original = Pairs.loss

            def loss(self: Any, *arguments: Any) -> Any:
                nonlocal count
                count += 1
                if count == step:
                    signal.raise_signal(signal.SIGINT)
                return original(self, *arguments)

            with monkeypatch.context() as patch:
                patch.setattr(Pairs, "loss", loss)
                matcher = make(appearance(dropout=0.3))  # the encoder's dropout is drawn from the same generator
                fit = FIT | {"epochs": 3, "batch_size": 16}
                matcher.fit(CLIPS, TEXTS, fine_tune="appearance", **fit, **options)
            return matcher, count

        whole, steps = run(None)
        with pytest.raises(KeyboardInterrupt):
            run(at, checkpoint=tmp_path)
        rest, more = run(None, checkpoint=tmp_path)
        assert at + more == steps == 12
        np.testing.assert_array_equal(rest.embed_clips(TEST), whole.embed_clips(TEST))
        assert rest.encoders["appearance"].fingerprint == whole.encoders["appearance"].fingerprint
        assert rest.history_[1:] == whole.history_[1:]
        fit = FIT | {"epochs": 3, "batch_size": 16, "checkpoint": tmp_path}
        refused = "of a training on other data or with other options"
        with pytest.raises(ValueError, match=refused):
            make(appearance(dropout=0.3)).fit(CLIPS, TEXTS, **fit)
        # Clips that the encoder cannot tell from the others, before it is trained, are other clips.
        other = [*CLIPS[:79], type(CLIPS[79]).from_frames(CLIPS[79].frames[..., ::-1].copy(), name=CLIPS[79].name)]
        with pytest.raises(ValueError, match=refused):
            make(appearance(dropout=0.3)).fit(other, TEXTS, fine_tune="appearance", **fit)
        make(appearance(dropout=0.3)).fit(CLIPS, TEXTS, fine_tune="appearance", **fit)

    def test_passes_of_a_batch_do_not_change_the_gradient(self) -> None:
        from pycm.matchers.inputs import Live, Rows
        from pycm.matchers.tuning import FineTuned, Source, Tuning, as_steps

        frames = [list(clip.frames) for clip in CLIPS[:5]]
        sums, norms = [], []
        for batch_size in (100, 3):
            with Tuning(frozenset(["x"]), 0, None, batch_size) as tuning:
                source = Source(tuning, grey(), "encode", frames.__getitem__, lambda i: b"", 5)
                whole = FineTuned(torch.nn.Linear(1, 1), tuning).train()
                live = Live(torch.tensor([4, 0, 2]), source, Rows(torch.zeros(5, 6)), as_steps)
                steps = whole.encoded(live)
                assert steps.cu_seqlens.diff().tolist() == [len(frames[i]) for i in (4, 0, 2)]
                steps.values.square().sum().backward()
                sums.append(steps.values.detach().numpy())
                norms.append([p.grad.numpy() for p in whole.encoders.parameters()])
                given = grey().encode([frame for i in (4, 0, 2) for frame in frames[i]])
                np.testing.assert_allclose(sums[-1], given, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(sums[0], sums[1], rtol=1e-4, atol=1e-5)
        for a, b in zip(*norms, strict=True):
            assert np.abs(a).max() > 0
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)

    def test_a_pass_that_is_computed_again_drops_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from pycm.matchers import tuning
        from pycm.matchers.inputs import Live, Rows

        frames = [list(clip.frames) for clip in CLIPS[:5]]
        grads = []
        for _ in range(2):
            with tuning.Tuning(frozenset(["x"]), 0, None, 3) as plan:
                source = tuning.Source(plan, grey(dropout=0.5), "encode", frames.__getitem__, lambda i: b"", 5)
                whole = tuning.FineTuned(torch.nn.Linear(1, 1), plan).train()
                torch.manual_seed(3)
                live = Live(torch.arange(5), source, Rows(torch.zeros(5, 6)), tuning.as_steps)
                whole.encoded(live).values.square().sum().backward()
                grads.append([p.grad.numpy() for p in whole.encoders.parameters()])
            monkeypatch.setattr(tuning, "checkpoint", lambda function, *given, **options: function(*given))
        for a, b in zip(*grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    def test_differences_are_those_of_the_stream(self) -> None:
        from pycm.matchers.tuning import as_differences

        encoder = grey()
        expected = FeatureDifferences(encoder).extract(CLIPS[:3])
        rows = Appearance(encoder).extract(CLIPS[:3])
        found = as_differences(torch.from_numpy(rows.values), torch.from_numpy(rows.lengths), torch.arange(3))
        np.testing.assert_array_equal(found.values.numpy(), expected.values)
        np.testing.assert_array_equal(found.cu_seqlens.numpy(), expected.cu_seqlens)

    def test_learning_rates_and_decay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[Any] = []
        original = torch.optim.AdamW

        def recorded(groups: Any, **options: Any) -> Any:
            made.append(original(groups, **options))
            return made[-1]

        monkeypatch.setattr(torch.optim, "AdamW", recorded)
        fit = FIT | {"epochs": 1, "encoder_lr": 3e-4, "weight_decay": 0.2, "warmup": 0.0, "batch_size": 80}
        make().fit(CLIPS, TEXTS, fine_tune="appearance", **(fit | {"validation": None}))
        groups = [(g["lr"], g["weight_decay"], [p.ndim for p in g["params"]]) for g in made[0].param_groups]
        assert [(lr, decay) for lr, decay, _ in groups] == [(1e-2, 0.2), (1e-2, 0.0), (3e-4, 0.2), (3e-4, 0.0)]
        assert groups[2][2] == [4, 2]  # convolution, linear
        assert groups[3][2] == [1, 1, 1, 1]  # their biases; batch norm's scale and shift

    def test_a_part_that_is_frozen_stays(self) -> None:
        encoder = grey()
        encoder.module.out.requires_grad_(False)
        matcher = make(Appearance(encoder))
        matcher.fit(CLIPS, TEXTS, fine_tune="appearance", **(SHORT | {"validation": None}))
        assert changed(matcher.encoders["appearance"].encoder, encoder) == [
            "conv.weight", "conv.bias", "norm.weight", "norm.bias",
        ]  # fmt: skip

    def test_bfloat16(self) -> None:
        matcher = make().fit(CLIPS, TEXTS, fine_tune="appearance", precision="bfloat16", **FIT)
        assert accuracy(matcher) >= 0.9
        assert {w.dtype for w in weights(matcher.encoders["appearance"].encoder).values()} >= {np.dtype(np.float32)}


class TestFiles:
    def test_saved_weights_come_back_bit_for_bit(self, tuned: VideoTextMatcher, tmp_path: Path) -> None:
        from safetensors.numpy import load_file

        tuned.save(tmp_path)
        (file,) = tmp_path.glob("*/encoder-*.safetensors")
        assert sorted(load_file(file)) == sorted(changed(tuned.encoders["appearance"].encoder, grey()))
        loaded = matchers.load(tmp_path, streams=[appearance()], progress=False)
        np.testing.assert_array_equal(loaded.embed_clips(TEST), tuned.embed_clips(TEST))
        assert loaded.encoders["appearance"].fingerprint == tuned.encoders["appearance"].fingerprint
        loaded.save(tmp_path / "again")
        again = matchers.load(tmp_path / "again", streams=[appearance()], progress=False)
        np.testing.assert_array_equal(again.embed_clips(TEST), tuned.embed_clips(TEST))
        other = grey()
        with torch.no_grad():
            other.module.out.weight += 1
        with pytest.raises(ValueError, match="stream 'appearance' is not the one"):
            matchers.load(tmp_path, streams=[Appearance(other)])
        wide = Appearance(ModuleEncoder(torch.nn.Flatten(), lambda image: torch.zeros(6), name="flat", dim=6))
        with pytest.raises(ValueError, match=r"the encoder of 'appearance' has no '\w+\.\w+', which was saved"):
            matchers.load(tmp_path, streams=[wide], strict=False)

    def test_a_pickled_matcher_keeps_them(self, tuned: VideoTextMatcher, tmp_path: Path) -> None:
        copied = pickle.loads(pickle.dumps(tuned))
        copied.save(tmp_path)
        loaded = matchers.load(tmp_path, streams=[appearance()], progress=False)
        for matcher in (copied, loaded):
            np.testing.assert_array_equal(matcher.embed_clips(TEST), tuned.embed_clips(TEST))

    def test_frozen_encoders_are_not_saved(self, tmp_path: Path) -> None:
        make().fit(CLIPS, TEXTS, **SHORT).save(tmp_path)
        assert [path.name for path in tmp_path.glob("*/*")] == ["network.safetensors"]

    def test_the_cache_tells_a_tuned_encoder_from_what_it_was(self, tmp_path: Path) -> None:
        cache = FeatureCache(tmp_path)
        plain = make().fit(CLIPS, TEXTS, fine_tune="appearance", **SHORT)
        cached = make(cache=cache).fit(CLIPS, TEXTS, fine_tune="appearance", **SHORT)
        for _ in range(2):  # computed, then read
            np.testing.assert_array_equal(cached.embed_clips(CLIPS), plain.embed_clips(CLIPS))
        before = encode_clips([appearance()], CLIPS, cache=cache, progress=False)
        np.testing.assert_array_equal(
            before.streams["appearance"].values, encode_clips([appearance()], CLIPS).streams["appearance"].values
        )
        with pytest.raises(ValueError, match="clips has 'appearance' features of another encoder than the fine-tuned"):
            cached.embed_clips(before)
        own = encode_clips([cached.encoders["appearance"]], CLIPS, progress=False)
        np.testing.assert_array_equal(cached.embed_clips(own.take(range(9))), plain.embed_clips(CLIPS[:9]))
        again = cached.fit(CLIPS, TEXTS, **SHORT)  # from the encoder as it was given
        assert again.encoders["appearance"] is cached.streams[0]
        np.testing.assert_array_equal(again.embed_clips(TEST), make().fit(CLIPS, TEXTS, **SHORT).embed_clips(TEST))

    def test_clips_are_read_ahead_and_what_does_not_fit_in_memory_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("av")
        from pycm.matchers import sides
        from pycm.video import write_clip

        paths = []
        for i, clip in enumerate(CLIPS[:16]):
            paths.append(tmp_path / f"{i}.mp4")
            write_clip(paths[-1], clip.frames)
        threads: list[str] = []
        told: list[bool] = []
        read, ahead = sides.read_clip, Pairs.read_ahead

        def recorded(*given: Any, **options: Any) -> Any:
            threads.append(threading.current_thread().name)
            return read(*given, **options)

        def read_ahead(self: Any, rows: Any) -> None:
            ahead(self, rows)
            source = self.first.features.parts["appearance"].source
            told.append(set(self.pairs[rows, 0].tolist()) <= source._coming.keys() | source._kept.keys())

        monkeypatch.setattr(sides, "read_clip", recorded)
        monkeypatch.setattr(Pairs, "read_ahead", read_ahead)
        fit = SHORT | {"batch_size": 4, "validation": None}
        rows, counts = [], []
        for kept in (1 << 30, sum(clip.frames.nbytes for clip in CLIPS[:5]), 0):
            threads.clear()
            matcher = make().fit(paths, TEXTS[:16], fine_tune="appearance", kept_bytes=kept, **fit)
            rows.append(matcher.embed_clips(paths))
            counts.append(len(threads))
            assert all(name.startswith("pycm-read") for name in threads)
        assert told == [True] * 3 * 2 * 3  # trainings, epochs, batches that follow another
        assert counts[0] == 16
        assert counts[2] == 32
        assert 16 < counts[1] < 32
        np.testing.assert_array_equal(rows[0], rows[1])
        np.testing.assert_array_equal(rows[0], rows[2])
