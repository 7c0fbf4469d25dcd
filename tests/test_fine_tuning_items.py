"""Fine-tuning: which item is which where some are left out, folds, and what a checkpoint is taken for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")

from tuning_cases import (  # noqa: E402
    CLIPS,
    KINDS,
    SHORT,
    TEST,
    TEXTS,
    CellEncoder,
    WordNet,
    appearance,
    grey,
    lengths,
    make,
    picture,
    quarters,
)  # fmt: skip

from pycm import ImageVideoMatcher, matchers  # noqa: E402
from pycm.matchers import Boxes, RegionTextClassifier, RegionTextMatcher, sides, tuning  # noqa: E402
from pycm.matchers.learning import Pairs  # noqa: E402
from pycm.streams import Appearance, FeatureDifferences  # noqa: E402
from pycm.video import write_clip  # noqa: E402

N = 12
IMAGES, _, SENTENCES = quarters(N, 0)
ONE: dict[str, Any] = SHORT | {"epochs": 1, "batch_size": 4, "validation": None, "fine_tune": "all"}
BOXES = [[0, 0, 16, 16], [16, 0, 32, 16]]
REFUSED = "of a training on other data or with other options"
Fit = Callable[..., Any]


def changed(clip: Any) -> Any:
    """Other content, of the same shape and name."""
    return type(clip).from_frames(255 - clip.frames, name=clip.name)


def boxed(images: Any) -> list[Boxes]:
    return [Boxes(image, BOXES) for image in images]


def image_video(image_encoder: Any = None, stream: Any = None) -> ImageVideoMatcher:
    given: dict[str, Any] = {"hidden": 8, "dim": 8, "head": "ranking", "loss": "info_nce", "progress": False}
    return ImageVideoMatcher(image_encoder or grey(), [stream or appearance()], **given)


def regions(image_encoder: Any = None, text_encoder: Any = None) -> RegionTextMatcher:
    return RegionTextMatcher(image_encoder or CellEncoder(), text_encoder or WordNet(), dim=8, progress=False)


class TestLeftOut:
    """With an unreadable item in the middle, training is to the bit what it is without the item."""

    def test_clips(self, tmp_path: Path) -> None:
        pytest.importorskip("av")
        (tmp_path / "junk.mp4").write_bytes(b"junk")
        clips, texts = list(CLIPS[:N]), TEXTS[:N]
        whole = make().fit(clips, texts, **ONE)
        clips.insert(4, tmp_path / "junk.mp4")
        found = make().fit(clips, [*texts[:4], "gone", *texts[4:]], on_error="skip", **ONE)
        np.testing.assert_array_equal(found.embed_clips(TEST), whole.embed_clips(TEST))

    def test_groups_of_images(self, tmp_path: Path) -> None:
        (tmp_path / "junk.png").write_bytes(b"junk")
        draw = np.random.default_rng(5)
        images: list[Any] = [[picture(kind, draw) for _ in range(1 + kind % 2)] for kind in KINDS[:N]]
        whole = image_video().fit(images, CLIPS[:N], **ONE)
        images.insert(4, [images[0][0], tmp_path / "junk.png"])
        found = image_video().fit(images, [*CLIPS[:4], TEST[0], *CLIPS[4:N]], on_error="skip", **ONE)
        np.testing.assert_array_equal(found.scores(images[:4], TEST), whole.scores(images[:4], TEST))

    @pytest.mark.parametrize("form", [list, boxed])
    def test_regions(self, tmp_path: Path, form: Any) -> None:
        (tmp_path / "junk.png").write_bytes(b"junk")
        whole = regions().fit(form(IMAGES), SENTENCES, **ONE)
        images = form([*IMAGES[:4], tmp_path / "junk.png", *IMAGES[4:]])
        found = regions().fit(images, [*SENTENCES[:4], "gone", *SENTENCES[4:]], on_error="skip", **ONE)
        assert found.encoders["image"].fingerprint == whole.encoders["image"].fingerprint


def test_folds_are_trainings_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fold begins with what another has learned; of each the last epoch counts as best, so that it has learned."""
    validate, calls = Pairs.validate, itertools.count()

    def better(self: Any, *given: Any) -> Any:
        return validate(self, *given)._replace(better=(float(next(calls)),))

    monkeypatch.setattr(Pairs, "validate", better)
    clips, texts = CLIPS[:24], TEXTS[:24]
    fit = ONE | {"epochs": 2, "patience": None}
    found = make().fit(clips, texts, **(fit | {"validation": 2})).history_
    fold = np.random.default_rng([0, 1]).permutation(24) % 2
    apart = []
    for held in range(2):
        mine, theirs = [np.flatnonzero(fold != held), np.flatnonzero(fold == held)]
        data = ([clips[i] for i in theirs], [texts[i] for i in theirs])
        one = make().fit([clips[i] for i in mine], [texts[i] for i in mine], **(fit | {"validation": data}))
        apart.append(one.history_)
    for name in ("loss", "mrr"):
        mean = np.mean([[record[name] for record in history] for history in apart], axis=0)
        np.testing.assert_allclose([record[name] for record in found], mean, rtol=1e-6)


def blind(encoder: Any) -> Any:
    """To which all items are the same before it is trained: no feature tells them apart."""
    with torch.no_grad():
        for weight in encoder.module.parameters():
            weight.zero_()
    return encoder


def clips_and_texts(clips: Any = CLIPS[:N], texts: Any = TEXTS[:N], **files: Any) -> Any:
    matcher = make(Appearance(blind(grey())), text_encoder=blind(lengths()))
    return matcher.fit(clips, texts, **(ONE | {"epochs": 0}), **files)


def images_and_clips(images: Any, **files: Any) -> Any:
    return image_video(blind(grey())).fit(images, CLIPS[:N], **(ONE | {"epochs": 0}), **files)


def regions_and_words(images: Any = IMAGES, texts: Any = SENTENCES, **files: Any) -> Any:
    return regions(blind(CellEncoder()), blind(WordNet())).fit(images, texts, **(ONE | {"epochs": 0}), **files)


PICTURES = [[image, image] if i < 2 else [image] for i, image in enumerate(IMAGES)]
MOVED = [Boxes(IMAGES[0], [[0, 0, 16, 16], [16, 1, 32, 17]]), *boxed(IMAGES)[1:]]


LETTERS = list("abcdefghijklm")


class TestIdentity:
    @pytest.mark.parametrize(
        ("fit", "first", "second"),
        [
            (clips_and_texts, {}, {"clips": [changed(CLIPS[0]), *CLIPS[1:N]]}),
            (clips_and_texts, {"texts": LETTERS[:N]}, {"texts": LETTERS[1:]}),
            (images_and_clips, {"images": PICTURES}, {"images": [*PICTURES[:-1], [255 - IMAGES[-1]]]}),
            (regions_and_words, {}, {"images": [255 - IMAGES[0], *IMAGES[1:]]}),
            (regions_and_words, {"texts": LETTERS[:N]}, {"texts": LETTERS[1:]}),
            (regions_and_words, {"images": boxed(IMAGES)}, {"images": boxed([255 - IMAGES[0], *IMAGES[1:]])}),
            (regions_and_words, {"images": boxed(IMAGES)}, {"images": MOVED}),
        ],
    )
    def test_content_that_no_feature_shows(self, tmp_path: Path, fit: Fit, first: Any, second: Any) -> None:
        fit(**first, checkpoint=tmp_path)
        fit(**first, checkpoint=tmp_path)
        with pytest.raises(ValueError, match=REFUSED):
            fit(**second, checkpoint=tmp_path)

    def test_nothing_passes_from_an_item_to_the_next(self) -> None:
        with tuning.Tuning(frozenset(["x"]), 0, 1, 4) as plan:
            digests = {
                tuning.Source(plan, encoder, "encode", lambda i: [], keys.__getitem__, 2).digest
                for encoder in [grey()]
                for keys in ([b"ab", b"c"], [b"a", b"bc"], [b"abc", b""])
            }
        assert len(digests) == 3

    def test_lone_surrogates_have_a_key(self, tmp_path: Path) -> None:
        texts = ["a\ud800", *SENTENCES[1:]]
        regions().fit(IMAGES, texts, **(ONE | {"epochs": 0}), checkpoint=tmp_path)

    def test_sampling_streams_and_frozen_weights(self, tmp_path: Path) -> None:
        fit = ONE | {"epochs": 0}

        def run(name: str, *streams: Any, clips: Any = CLIPS[:N], **options: Any) -> Any:
            return make(*streams, **options).fit(clips, TEXTS[:N], checkpoint=tmp_path / name, **fit)

        encoder = grey()
        run("kind", Appearance(encoder, name="x"))
        with pytest.raises(ValueError, match=REFUSED):
            run("kind", FeatureDifferences(encoder, name="x"))
        frozen = grey()
        frozen.module.out.requires_grad_(False)
        run("trained", appearance())
        with pytest.raises(ValueError, match=REFUSED):
            run("trained", Appearance(frozen))
        pytest.importorskip("av")
        paths = [tmp_path / f"{i}.mp4" for i in range(N)]
        for path, kind in zip(paths, KINDS, strict=False):
            draw = np.random.default_rng(kind)
            write_clip(path, np.stack([picture(kind, draw) for _ in range(6)]))
        run("sampling", clips=paths, sampling="uniform:2")
        with pytest.raises(ValueError, match=REFUSED):
            run("sampling", clips=paths, sampling="uniform:4")

    def test_the_rate_of_encoders_counts_where_they_are_trained(self, tmp_path: Path) -> None:
        for name, fine_tune in (("frozen", None), ("tuned", "appearance")):
            fit = ONE | {"epochs": 0, "fine_tune": fine_tune, "checkpoint": tmp_path / name}
            make().fit(CLIPS[:N], TEXTS[:N], **fit)
            if fine_tune is None:
                make().fit(CLIPS[:N], TEXTS[:N], **(fit | {"encoder_lr": 0.5}))
            else:
                with pytest.raises(ValueError, match=REFUSED):
                    make().fit(CLIPS[:N], TEXTS[:N], **(fit | {"encoder_lr": 0.5}))

    def test_without_a_checkpoint_nothing_is_hashed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tuning.Source, "digest", property(lambda self: pytest.fail("hashed")))
        monkeypatch.setattr(sides, "clip_key", lambda clip: pytest.fail("hashed"))
        clips_and_texts()
        regions_and_words()


def test_regions_that_begin_equal_are_learned() -> None:
    """Features without variance do not count as nothing."""
    image, text = CellEncoder(), WordNet()
    with torch.no_grad():
        image.module.conv.weight.zero_()
        text.module.weight.fill_(0.5)
    matcher = regions(image, text).fit(IMAGES, SENTENCES, **(ONE | {"epochs": 2, "weight_decay": 0.0}))
    assert (matcher.encoders["image"].module.conv.weight != image.module.conv.weight).any()
    assert (matcher.encoders["text"].module.weight != text.module.weight).any()


def test_regions_are_read_a_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ahead = tuning.Source.ahead
    monkeypatch.setattr(
        tuning.Source, "ahead", lambda self, ids: (asked.append(len(ids)) if self.method == "encode_grid" else 0,
                                                   ahead(self, ids))[1],
    )  # fmt: skip
    inputs = tuning.Source.inputs

    def batch(self: Any, ids: Any) -> Any:
        if self.method == "encode_grid":
            asked.append(-len(ids))
        return inputs(self, ids)

    monkeypatch.setattr(tuning.Source, "inputs", batch)
    regions().fit(IMAGES, SENTENCES, **ONE)
    assert [n for n in asked if n in (4, -4)][:2] == [4, -4]  # the second batch, before the first is encoded
    asked.clear()
    labels = np.arange(N) % 2 == 0
    RegionTextClassifier(CellEncoder(), WordNet(), dim=8, progress=False).fit(IMAGES, SENTENCES, labels, **ONE)
    assert [n for n in asked if n in (4, -4)][:2] == [4, -4]


def test_of_large_items_few_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_AHEAD", 2)
    monkeypatch.setattr(tuning, "_AHEAD_BYTES", 50)
    with tuning.Tuning(frozenset(["x"]), 0, 1, 4) as plan:
        source = tuning.Source(plan, grey(), "encode", lambda i: [np.zeros(10, np.uint8)], lambda i: b"", 40)
        source.ahead(list(range(20)))
        assert sorted(source._coming) == [0, 1]  # nobody knows yet how large they are
        assert len(list(source.inputs([0, 1]))) == 2
        source.ahead(list(range(20)))
        assert sorted(source._coming) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["clips", "regions"])
def test_a_matcher_saved_before_there_was_fine_tuning(kind: str, tmp_path: Path) -> None:
    plain = ONE | {"fine_tune": None}
    if kind == "clips":
        make().fit(CLIPS[:N], TEXTS[:N], **plain).save(tmp_path)
    else:
        regions().fit(IMAGES, SENTENCES, **plain).save(tmp_path)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    del document["fine_tuned"]
    path.write_text(json.dumps(document))
    if kind == "clips":
        assert matchers.load(tmp_path, streams=[appearance()]).fitted
    else:
        assert matchers.load(tmp_path, image_encoder=CellEncoder(), text_encoder=WordNet()).fitted
