"""What all matchers refuse, or warn of: items that are none, items given twice, damaged files, options; and clones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")

from clip_cases import VectorImages, clip_features
from matcher_stubs import TEXTS, PixelEncoder, WordEncoder, images_fixture  # noqa: F401
from safetensors.torch import load_file, save_file
from test_matchers_region import Cells, Words
from video_text_cases import SHORT, TRAIN
from video_text_cases import TEXTS as CAPTIONS
from video_text_cases import make as make_video

from pycm import ImageTextMatcher, ImageVideoMatcher, VideoTextMatcher, matchers
from pycm.matchers import Boxes, RegionTextClassifier, RegionTextMatcher
from pycm.spaces import Ridge
from pycm.streams import encode_clips
from pycm.video import Sampling

FEW = TRAIN.take(range(12))
WORDS = [f"text {i}" for i in range(12)]
RUN: dict[str, Any] = {"epochs": 1, "batch_size": 4, "validation": None}


def image_text() -> ImageTextMatcher:
    return ImageTextMatcher(PixelEncoder(), WordEncoder(), Ridge())


def regions() -> RegionTextMatcher:
    return RegionTextMatcher(Cells(), Words(), dim=8, progress=False)


def pictures(n: int) -> list[Any]:
    return list(np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8))


# ---- items that are none ----


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("", ValueError, r"texts\[1\], of {}, must not be blank, got ''"),
        ("  \n", ValueError, r"texts\[1\], of {}, must not be blank"),
        (["a", " "], ValueError, r"texts\[1\], of {}, must not be blank, got ' '"),
        (None, TypeError, r"texts\[1\], of {}, must be a str or a list of them, got None"),
        (float("nan"), TypeError, r"texts\[1\], of {}, must be a str or a list of them, got nan"),
        (3, TypeError, r"texts\[1\], of {}, must be a str or a list of them, got 3"),
        (["a", None], TypeError, r"texts\[1\], of {}, must be a str or a list of them, got None"),
        ({"en": "a"}, TypeError, r"texts\[1\], of {}, must be a str or a list of them, got \{{'en': 'a'\}}"),
    ],
)
def test_what_is_no_text_is_named_with_its_item(text: Any, error: Any, told: str, images: list[Path]) -> None:
    texts = ["a", text, *TEXTS[2:5]]
    with pytest.raises(error, match="ImageTextMatcher.fit: " + told.format(f"image '{images[1]}'")):
        image_text().fit(images, texts)
    with pytest.raises(error, match="ImageTextMatcher.evaluate: " + told.format("image .*")):
        image_text().evaluate(images, texts)
    with pytest.raises(error, match="RegionTextMatcher.fit: " + told.format(r"image 'items\[1\]'")):
        regions().fit(pictures(5), texts, **RUN)
    with pytest.raises(error, match="VideoTextMatcher.fit: " + told.format("clip 'clip1'")):
        make_video().fit(FEW.take(range(5)), texts, **RUN)


def test_what_is_no_image_and_no_clip_is_named(images: list[Path]) -> None:
    with pytest.raises(TypeError, match=r"ImageTextMatcher.fit: images\[2\] must be a path, .* got NoneType"):
        image_text().fit([*images[:2], None, *images[3:]], TEXTS[:5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"ImageTextMatcher.match: texts\[1\] must be a str, got int"):
        ImageTextMatcher(PixelEncoder(), WordEncoder()).match(images, ["a", 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"RegionTextMatcher.fit: images\[1\] must be a path, .* got NoneType"):
        regions().fit([*pictures(1), None], ["red", "blue"], **RUN)
    matcher = VideoTextMatcher(["motion"], "words", progress=False)
    with pytest.raises(TypeError, match=r"VideoTextMatcher.fit: clips\[1\] must be a path, bytes or a Clip, got None"):
        matcher.fit(["a.mp4", None, "b.mp4"], WORDS[:3], **RUN)
    with pytest.raises(TypeError, match=r"encode_clips: clips\[1\] must be a path, bytes or a Clip, got float"):
        encode_clips([], ["a.mp4", 0.5])  # type: ignore[list-item]
    pair = ImageVideoMatcher(VectorImages(), ["ramp"], progress=False)
    with pytest.raises(TypeError, match=r"ImageVideoMatcher.fit: images\[1\] must be a path, .* got NoneType"):
        pair.fit([np.zeros((1, 6), np.uint8), None], FEW.take([0, 1]), **RUN)


# ---- items given twice ----


def test_one_file_is_one_item_in_any_spelling(images: list[Path]) -> None:
    again = images[1].parent / "." / ".." / images[1].parent.name / images[1].name
    assert str(again) != str(images[1])
    given, texts = [*images[:4], f"{images[1].parent}/./{images[1].name}"], TEXTS[:5]
    told = r"fit: images\[1\] and images\[4\] are both '.*image1.png'; give each once"
    for twice in (given, [*images[:4], again], [*images[:4], images[1]]):
        with pytest.raises(ValueError, match="ImageTextMatcher." + told):
            image_text().fit(twice, texts)
    boxes = [Boxes(image, [[0, 0, 4, 4]]) for image in given]
    hues = ["red", "green", "blue", "grey", "red"]
    with pytest.raises(ValueError, match=r"RegionTextMatcher.fit: images\[1\] and images\[4\] are both"):
        regions().fit(boxes, hues, **RUN)
    boxes[4] = Boxes(given[4], [[4, 0, 8, 4]])  # another part of the same image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a picture of one colour: its parts are alike
        regions().fit(boxes, hues, **RUN)
    pair = ImageVideoMatcher(PixelEncoder(), ["ramp"], progress=False)
    with pytest.raises(ValueError, match="ImageVideoMatcher." + told):
        pair.fit(given, FEW.take(range(5)), **RUN)


def test_a_clip_has_one_label() -> None:
    clips = FEW.take([0, 1, 2, 3, 0])
    told = r"VideoTextMatcher.fit: clips\[0\] and clips\[4\] are both 'clip0'"
    with pytest.raises(ValueError, match=told):
        make_video(head="labels").fit(clips, ["a", "b", "a", "b", "b"], **RUN)


def test_copies_under_two_names_are_told_once(images: list[Path]) -> None:
    copy = images[0].with_name("copy.png")
    copy.write_bytes(images[0].read_bytes())
    with pytest.warns(UserWarning, match=r"the images '.*image0.png' and '.*copy.png' have the same features") as told:
        image_text().fit([*images, copy], TEXTS)
    assert len(told) == 1
    clips = FEW.take([0, 1, 2, 3, 0, 1])
    clips = clip_features(clips.streams)  # under names of their own
    with pytest.warns(
        UserWarning, match=r"the clips 'clip0' and 'clip4' .* features, and so have 1 other pairs"
    ) as told:
        make_video().fit(clips, WORDS[:6], **RUN)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_video().fit(FEW, WORDS, **RUN)
        image_text().fit(images, TEXTS[:5])


# ---- saved matchers ----


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "nan":
        weights = load_file(path)
        name = next(name for name in weights if name.endswith("weight"))
        weights[name].view(-1)[0] = float("nan")
        save_file(weights, path)
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "other": b"x" * 99}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "other", "nan"])
def test_a_damaged_matcher_is_named(how: str, tmp_path: Path) -> None:
    video = make_video().fit(FEW, WORDS, **RUN)
    video.save(tmp_path / "video")
    pixels, hues = pictures(6), ["red", "green", "blue", "grey", "red", "red"]
    regions().fit(pixels, hues, **RUN).save(tmp_path / "regions")
    told = "holds NaN or infinity in '.*weight'" if how == "nan" else "is damaged or cut off"
    encoders: dict[str, Any] = {"image_encoder": Cells(), "text_encoder": Words()}
    for name, own in (("video", {}), ("regions", encoders)):
        (path,) = (tmp_path / name).glob("parts-*/network.safetensors")
        damaged(path, how)
        with pytest.raises(ValueError, match=rf"\.load: {path} {told}.*: save the matcher again"):
            matchers.load(tmp_path / name, **own)


# ---- options ----


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": "a"}, r"seed must be an int in \[0, 2\*\*63\), got 'a'"),
        ({"seed": -1}, r"seed must be an int in \[0, 2\*\*63\), got -1"),
        ({"workers": -1}, r"workers must be None or an int of at least 0, got -1"),
        ({"sampling": "unform:3"}, r'sampling must be "uniform:N", .* got \'unform:3\''),
        ({"device": "tpu?"}, r"device must be cpu, cuda or cuda:N, got 'tpu\?'"),
        ({"device": "cuda:99"}, r"device must be there, got 'cuda:99', and torch finds .* CUDA device"),
    ],
)
def test_options_are_checked_by_the_constructor(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match="VideoTextMatcher: " + told):
        VideoTextMatcher(["motion"], "words", **options)
    with pytest.raises(ValueError, match="ImageVideoMatcher: " + told):
        ImageVideoMatcher(VectorImages(), ["motion"], **options)
    if options.keys() <= {"seed", "device"}:
        with pytest.raises(ValueError, match="RegionTextMatcher: " + told):
            RegionTextMatcher(Cells(), Words(), **options)
    if "device" in options:
        with pytest.raises(ValueError, match="ImageTextMatcher: " + told):
            ImageTextMatcher("efficientnet-lite0", "minilm", **options)


def test_streams_that_nobody_knows() -> None:
    with pytest.raises(TypeError, match=r"VideoTextMatcher: streams\[1\] must be a stream or the spec of one, got 3"):
        VideoTextMatcher(["motion", 3], "words")  # type: ignore[list-item]
    matcher = VideoTextMatcher(["apperance"], "words", progress=False)
    with pytest.raises(ValueError, match="VideoTextMatcher: unknown stream 'apperance'; known: appearance, "):
        matcher.fit(["a.mp4", "b.mp4"], WORDS[:2], **RUN)


@pytest.mark.parametrize("spec", ["uniform", "uniform:", "uniform:many", "fps:"])
def test_a_sampling_without_a_number(spec: str) -> None:
    with pytest.raises(ValueError, match=rf'^sampling must be "uniform:N", "segments:N", .* got {spec!r}$'):
        Sampling.parse(spec)


def test_workers_are_checked_before_the_cache() -> None:
    with pytest.raises(ValueError, match=r"encode_clips: workers must be None or an int of at least 0, got -1"):
        encode_clips(["motion"], [], workers=-1)


@pytest.mark.parametrize("validation", [5, "0.1", (pictures(1), ["red"]), True, 1.5])
def test_regions_take_a_share_to_validate_on(validation: Any) -> None:
    told = r"validation must be a share in \(0, 1\) or None, got (5|'0.1'|a tuple|True|1.5)$"
    options = RUN | {"validation": validation}
    with pytest.raises(ValueError, match="RegionTextMatcher.fit: " + told):
        regions().fit(pictures(6), ["red"] * 6, **options)
    classifier = RegionTextClassifier(Cells(), Words(), dim=8, progress=False)
    with pytest.raises(ValueError, match="RegionTextClassifier.fit: " + told):
        classifier.fit(pictures(2), ["red"] * 2, [True, False], **options)


@pytest.mark.parametrize("validation", ["0.1", [FEW, WORDS], (FEW, WORDS, 3), True])
def test_forms_of_a_validation(validation: Any) -> None:
    told = r"fit: validation must be a share in .* or None, got ('0.1'|a list|a tuple of 3|True)$"
    with pytest.raises(ValueError, match=told):
        make_video().fit(TRAIN, CAPTIONS, **(SHORT | {"validation": validation}))


# ---- parameters ----


@pytest.mark.parametrize(
    "matcher",
    [
        make_video(hidden=7),
        ImageVideoMatcher(VectorImages(), ["ramp"], dim=9),
        image_text(),
        regions(),
        RegionTextClassifier(Cells(), Words(), heads=2, dim=8),
    ],
    ids=lambda matcher: type(matcher).__name__,
)
def test_clones_have_the_same_parameters_and_nothing_fitted(matcher: Any) -> None:
    base = pytest.importorskip("sklearn.base")
    clone = base.clone(matcher)
    assert type(clone) is type(matcher)
    given, got = matcher.get_params(), clone.get_params()
    plain = [name for name, value in given.items() if isinstance(value, (int, float, str, tuple))]
    assert {name: got[name] for name in plain} == {name: given[name] for name in plain}
    assert got.keys() == given.keys()
    assert not getattr(clone, "fitted", False)
    assert clone.set_params(batch_size=3) is clone
    assert clone.get_params()["batch_size"] == 3
    with pytest.raises(ValueError, match=r"set_params: unknown 'batchsize'; there are: "):
        clone.set_params(batchsize=3)


def test_parameters_are_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycm.matchers.features.get_encoders", lambda *_, **__: (PixelEncoder(), WordEncoder()))
    for kind in (ImageTextMatcher, RegionTextMatcher):
        params = kind("one", "other").get_params()
        assert (params["image_encoder"], params["text_encoder"]) == ("one", "other")


def test_what_was_fitted_is_forgotten_with_other_parameters() -> None:
    matcher = make_video().fit(FEW, WORDS, **RUN)
    assert matcher.set_params(hidden=5).hidden == 5
    with pytest.raises(RuntimeError, match="not fitted"):
        matcher.embed_texts(WORDS)
