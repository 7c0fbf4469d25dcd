"""`ImageVideoMatcher`: ranking, the GRU that is told of the image, re-ranking, saving, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from clip_cases import VectorImages, clip_features, sequences, shown  # noqa: E402

from pycm import ImageVideoMatcher, evaluate, matchers  # noqa: E402
from pycm.encoders import UnreadableInputError  # noqa: E402
from pycm.spaces import Ridge  # noqa: E402

IMAGES, CLIPS = shown(240, 0)
TEST_IMAGES, TEST_CLIPS = shown(40, 1)
FIT: dict[str, Any] = {"epochs": 20, "lr": 1e-2, "batch_size": 80}
SHORT: dict[str, Any] = {"epochs": 1, "lr": 5e-3, "batch_size": 64}


def make(**options: Any) -> ImageVideoMatcher:
    given = {"pool": "lastmean", "bidirectional": True, "hidden": 32, "dim": 32, "loss": "info_nce", "progress": False}
    return ImageVideoMatcher(VectorImages(), ["ramp"], **(given | options))


@pytest.fixture(scope="module")
def fitted() -> ImageVideoMatcher:
    return make(candidates=5).fit(IMAGES, CLIPS, **FIT)


def test_both_ways_are_found_by_embeddings_and_by_the_classifier(fitted: ImageVideoMatcher) -> None:
    ranking = make(head="ranking").fit(IMAGES, CLIPS, **FIT)
    for matcher in (ranking, fitted):
        found = matcher.evaluate(TEST_IMAGES, TEST_CLIPS)
        assert found.image_to_video.recall_at_k[1] >= 0.6  # chance is 0.025
        assert found.video_to_image.recall_at_k[1] >= 0.6  # chance is 0.025
    assert fitted.predict(TEST_IMAGES, TEST_CLIPS).mean() >= 0.8
    assert fitted.predict(TEST_IMAGES, TEST_CLIPS.take(np.roll(np.arange(40), 1))).mean() <= 0.2


@pytest.mark.parametrize("fusion", ["h0", "steps", ("h0", "steps")])
def test_the_gru_is_told_of_the_image(fusion: Any) -> None:
    """One pair's log-odds by torch's own LSTM and GRU, and not without the image's state."""
    matcher = make(fusion=fusion, bidirectional=False, pool="last").fit(IMAGES, CLIPS, **SHORT)
    torch.nn.init.normal_(matcher.network.head[-1].weight)  # it begins at zero, and would hide what it is told
    network: Any = matcher.network
    image = torch.from_numpy(VectorImages().encode(TEST_IMAGES[:1]))
    clip = torch.from_numpy(TEST_CLIPS.take([3]).streams["ramp"].values)

    def state(cell: Any, stream: Any, steps: Any, h0: Any = None, joined: Any = None) -> Any:
        steps = stream.project((steps - stream.standardize.mean) * stream.standardize.scale)
        steps = steps if joined is None else torch.cat([steps, joined.expand(len(steps), -1)], 1)
        rnn = cell(steps.shape[1], 32, batch_first=True)
        rnn.load_state_dict(stream.pool.state_dict())
        return rnn(steps[None], None if h0 is None else h0[None])[0][:, -1]

    with torch.no_grad():
        told = state(torch.nn.LSTM, network.first.tower.streams[0], image)
        plain = state(torch.nn.GRU, network.second.tower.streams[0], clip)
        h0 = torch.tanh(network.h0(told)) if "h0" in fusion else None
        joined = told if "steps" in fusion else None
        fused = network.fused.mlp(state(torch.nn.GRU, network.fused.streams[0], clip, h0, joined))
        x = torch.nn.functional.normalize(network.first.tower.mlp(told))
        y = torch.nn.functional.normalize(network.second.tower.mlp(plain))
        added = network.head(torch.cat([x, y, x * y, (x - y).abs(), fused], 1))[0, 0]
        expected = float(network.scale * (x * y).sum() + network.bias + added)
    found = matcher.scores(TEST_IMAGES[:2], TEST_CLIPS.take([2, 3]))
    assert abs(found[0, 1] - expected) < 1e-4 * max(1.0, abs(expected))
    assert (network.h0 is None) == ("h0" not in fusion)


def test_steps_are_projected_once_a_clip_and_not_once_a_pair(fitted: ImageVideoMatcher) -> None:
    rows = []
    fused: Any = fitted.network.fused
    hook = fused.streams[0].project.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    fitted.scores(TEST_IMAGES, TEST_CLIPS)
    hook.remove()
    assert sum(rows) == len(TEST_CLIPS.streams["ramp"].values)


def test_candidates_are_re_ranked_and_the_rest_stay_below(fitted: ImageVideoMatcher) -> None:
    logits = fitted.scores(TEST_IMAGES, TEST_CLIPS)
    a, b = fitted.embed_images(TEST_IMAGES), fitted.embed_clips(TEST_CLIPS)
    cosine = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    near = np.argsort(-cosine, axis=1, kind="stable")[:, :5]
    by_logit = np.argsort(-np.take_along_axis(logits, near, 1), axis=1, kind="stable")
    expected = np.take_along_axis(near, by_logit, 1)
    found = fitted.match(TEST_IMAGES, TEST_CLIPS, k=3)
    np.testing.assert_array_equal(found.image_to_video.indices, expected[:, :3])
    np.testing.assert_allclose(
        found.image_to_video.scores, np.take_along_axis(logits, expected[:, :3], 1), rtol=1e-4, atol=1e-5
    )
    rest = np.argsort(-cosine, axis=1, kind="stable")[:, 5:]
    order = np.concatenate([expected, rest], axis=1)
    ranks = np.argmax(order == np.arange(40)[:, None], axis=1)
    np.testing.assert_array_equal(fitted.evaluate(TEST_IMAGES, TEST_CLIPS).image_to_video.ranks, ranks)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_what_comes_first_does_not_depend_on_k(metric: Any) -> None:
    """Nor do candidates: `evaluate` ranks all as `match` does, be k below them or above."""
    matcher = make(metric=metric, candidates=3).fit(IMAGES, CLIPS, **SHORT)
    torch.nn.init.normal_(matcher.network.head[-1].weight, std=3.0)  # another order than that of the embeddings
    whole = matcher.match(TEST_IMAGES, TEST_CLIPS, k=40)
    for k in (1, 2, 3, 4, 10):
        found = matcher.match(TEST_IMAGES, TEST_CLIPS, k=k)
        for one, other in ((found.image_to_video, whole.image_to_video), (found.video_to_image, whole.video_to_image)):
            np.testing.assert_array_equal(one.indices, other.indices[:, :k])
            np.testing.assert_array_equal(one.scores, other.scores[:, :k])
    assert (np.diff(whole.image_to_video.scores, axis=1) <= 0).all()
    measured = matcher.evaluate(TEST_IMAGES, TEST_CLIPS)
    for ranks, way in (
        (measured.image_to_video.ranks, whole.image_to_video),
        (measured.video_to_image.ranks, whole.video_to_image),
    ):
        np.testing.assert_array_equal(ranks, np.argmax(way.indices == np.arange(40)[:, None], axis=1))


def test_pairs_are_scored_in_blocks_that_long_clips_make_small(
    fitted: ImageVideoMatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pycm.matchers import fusion, scoring

    whole, sizes = fitted.scores(TEST_IMAGES, TEST_CLIPS), []
    logits = fusion.FusedClassifier.logits

    def recorded(self: Any, first: Any, second: Any, i: Any, j: Any) -> Any:
        sizes.append(len(i))
        return logits(self, first, second, i, j)

    monkeypatch.setattr(fusion.FusedClassifier, "logits", recorded)
    monkeypatch.setattr(scoring, "_FLOATS", 1 << 18)
    monkeypatch.setattr(fusion, "_ITEMS", 7)
    np.testing.assert_allclose(fitted.scores(TEST_IMAGES, TEST_CLIPS), whole, rtol=1e-4, atol=1e-5)
    assert sum(sizes) == 1600
    # Of a pair at least the embeddings, 4 x 32, and 5 steps of 3 features with their states, 2 x 32.
    assert max(sizes) * (128 + 5 * (3 + 64)) <= 1 << 18


def test_several_images_of_one_thing_are_one_item() -> None:
    twice = [[image, image[:, ::-1]] for image in IMAGES]
    matcher = make(head="ranking").fit(twice, CLIPS, **SHORT)
    assert matcher.embed_images(twice[:3]).shape == (3, 32)
    one = matcher.embed_images([twice[0], twice[1][::-1]])
    np.testing.assert_allclose(one[0], matcher.embed_images(twice[:1])[0], rtol=1e-4, atol=1e-6)
    assert np.abs(one[1] - matcher.embed_images(twice[1:2])[0]).max() > 1e-3  # their order counts
    with pytest.raises(ValueError, match=r"embed_images: images\[1\] is an empty list"):
        matcher.embed_images([IMAGES[0], []])


@pytest.mark.parametrize(("toward", "dim"), [("zero", 5), ("identity", 6)])
def test_the_linear_start_is_ridge_from_the_image_to_the_mean_step(toward: Any, dim: int) -> None:
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (1, 6), dtype=np.uint8) for _ in range(60)]
    rows = VectorImages().encode(images)
    clips = clip_features({"ramp": sequences([row[:dim] + draw.normal(0, 0.3, (4, dim)) for row in rows])})
    train, test = np.arange(40), np.arange(40, 60)
    matcher = make(head="ranking", space=Ridge(toward=toward))
    matcher.fit([images[i] for i in train], clips.take(train), epochs=0)
    means = np.stack([part.mean(axis=0) for part in np.split(clips.streams["ramp"].values, 60)])
    ridge = Ridge(toward=toward).fit(rows[train], means[train])
    expected = evaluate.retrieval_metrics(
        (ridge.transform_images(rows[test]), ridge.transform_texts(means[test]), "cosine"), np.arange(20)
    )
    found = matcher.evaluate([images[i] for i in test], clips.take(test))
    np.testing.assert_array_equal(found.image_to_video.ranks, expected.ranks)
    assert expected.recall_at_k[5] > 0.6


def test_it_learns_from_pairs_that_it_finds_itself() -> None:
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (1, 6), dtype=np.uint8) for _ in range(140)]
    mix = draw.normal(size=(6, 5))
    rows = VectorImages().encode(images) @ mix
    clips = clip_features({"ramp": sequences([row + draw.normal(0, 0.9, (4, 5)) for row in rows])})
    fit: dict[str, Any] = {"epochs": 0, "validation": None}
    known, rest = np.arange(10), np.arange(10, 90)
    wanted = images[90:], clips.take(np.arange(90, 140))
    unlabelled = [images[i] for i in draw.permutation(rest)], clips.take(rest)
    found = []
    for options in ({}, {"unlabelled": unlabelled, "threshold": 0.7}):
        matcher = make(head="ranking", space=Ridge())
        matcher.fit(images[:10], clips.take(known), **fit, **options)
        found.append(matcher.evaluate(*wanted).image_to_video.mrr)
    assert found[1] > found[0] + 0.02


@pytest.mark.parametrize("head", ["ranking", "pairs"])
def test_it_comes_back_bit_for_bit(head: Any, tmp_path: Path) -> None:
    matcher = make(head=head, space=Ridge(), fusion=["steps"]).fit(IMAGES, CLIPS, **SHORT)
    matcher.save(tmp_path)
    with pytest.raises(ValueError, match=r"'vectors' in .* pass it: load\(folder, image_encoder=\.\.\.\)"):
        matchers.load(tmp_path)
    loaded = matchers.load(tmp_path, image_encoder=VectorImages(), progress=False)
    assert isinstance(loaded, ImageVideoMatcher)
    np.testing.assert_array_equal(loaded.scores(TEST_IMAGES, TEST_CLIPS), matcher.scores(TEST_IMAGES, TEST_CLIPS))


def test_contributions_and_history(fitted: ImageVideoMatcher) -> None:
    assert fitted.contributions(TEST_IMAGES, TEST_CLIPS)["ramp"] > 0.5
    assert fitted.history_[-1]["mrr"] > fitted.history_[0]["mrr"]


class Unreadable(VectorImages):
    """Refuses pictures that begin with 0."""

    fingerprint = "vectors-2"

    def encode(self, items: Any, **options: Any) -> np.ndarray:
        bad = [(f"items[{i}]", "it is blank") for i, item in enumerate(items) if np.asarray(item).flat[0] == 0]
        if bad:
            raise UnreadableInputError(bad, len(items))
        return super().encode(items)


def test_what_cannot_be_learned_from() -> None:
    with pytest.raises(ValueError, match=r"fit: there must be a clip for each of 239 images, got 240"):
        make().fit(IMAGES[:-1], CLIPS, **SHORT)
    with pytest.raises(ValueError, match=r"fit: clips\[1\] and clips\[2\] are both 'clip5'"):
        make().fit(IMAGES[:3], CLIPS.take([4, 5, 5]), **SHORT)
    with pytest.raises(ValueError, match=r"head must be ranking or pairs, got 'labels'"):
        make(head="labels")
    with pytest.raises(ValueError, match=r"fusion must be h0, steps or both, got \('h1',\)"):
        make(fusion=("h1",))
    with pytest.raises(ValueError, match=r"predict: needs head='pairs', this matcher has 'ranking'"):
        make(head="ranking").predict(TEST_IMAGES, TEST_CLIPS)
    blank = [np.zeros((1, 6), np.uint8), *IMAGES[1:3]]
    matcher = ImageVideoMatcher(Unreadable(), ["ramp"], progress=False)
    with pytest.raises(UnreadableInputError, match="it is blank"):
        matcher.fit(blank, CLIPS.take([0, 1, 2]))


def test_only_pairs_of_which_both_can_be_read_are_learned_from(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    paths = []
    for i in range(12):
        paths.append(tmp_path / f"{i}.png")
        image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(paths[-1])
    paths[4].write_bytes(b"not an image")
    from matcher_stubs import PixelEncoder

    matcher = ImageVideoMatcher(PixelEncoder(), ["ramp"], hidden=16, dim=16, progress=False, candidates=None)
    matcher.fit(paths, CLIPS.take(range(12)), on_error="skip", validation=None, **SHORT)
    found = matcher.match(paths, CLIPS.take(range(12)), on_error="skip")
    assert found.images == [str(path) for i, path in enumerate(paths) if i != 4]
    assert found.kept_images.tolist() == [i for i in range(12) if i != 4]
    assert [name for name, _ in found.errors] == [str(paths[4])]
    assert found.image_to_video.indices.shape == (11, 5)
    assert matcher.evaluate(paths, CLIPS.take(range(12)), on_error="skip").video_to_image.ranks.shape == (11,)
