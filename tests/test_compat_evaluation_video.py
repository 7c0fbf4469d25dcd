"""pycm.compat's video–text and CLIP metrics against their published definitions, restated in compat_oracles.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from compat_oracles import collaborative_experts, places, text_to_video_ranks, video_to_text_ranks

from pycm.compat import clip4clip, clip_benchmark, frozen_in_time, mmt, open_clip

torch = pytest.importorskip("torch")

KINDS = ["random", "ties", "constant"]


def matrix(kind: str, *shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "random":
        noise = rng.standard_normal(shape)
        per_video = shape[0] // shape[-1]
        return noise + 1.5 * (np.arange(shape[0])[:, None] // max(1, per_video) == np.arange(shape[-1]))
    return rng.integers(0, 3, shape) * 1.0 if kind == "ties" else np.ones(shape)


# ---- CLIP4Clip ----


def check_clip4clip(found: dict[str, Any], ranks: list[int]) -> None:
    assert list(found) == ["R1", "R5", "R10", "MR", "MedianR", "MeanR", "cols"]
    assert found["cols"] == ranks
    assert all(type(rank) is int for rank in found["cols"])
    for k in (1, 5, 10):
        assert found[f"R{k}"] == pytest.approx(100 * sum(rank < k for rank in ranks) / len(ranks), rel=1e-14)
    assert found["MR"] == found["MedianR"] == np.median(ranks) + 1
    assert found["MeanR"] == pytest.approx(sum(ranks) / len(ranks) + 1, rel=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (25, 25), (12, 30)])
def test_compute_metrics(kind: str, dtype: type, shape: tuple[int, int]) -> None:
    scores = matrix(kind, *shape).astype(dtype)
    ranks = [place for row in range(shape[0]) for place in places(scores[row], row, "all")]
    check_clip4clip(clip4clip.compute_metrics(scores), ranks)
    check_clip4clip(clip4clip.compute_metrics(torch.from_numpy(scores)), ranks)


def test_compute_metrics_of_a_constant_matrix() -> None:
    found = clip4clip.compute_metrics(np.zeros((100, 100)))
    assert len(found["cols"]) == 10_000
    assert (found["R1"], found["R10"], found["MR"]) == (1, 10, 50.5)


def test_compute_metrics_leaves_infinite_positives_out() -> None:
    scores = matrix("random", 20, 20)
    scores[4] = -np.inf
    scores[7, 9], scores[11, 11] = np.inf, np.inf
    ranks = [places(scores[row], row, "all")[0] for row in range(20) if row not in (4, 11)]
    check_clip4clip(clip4clip.compute_metrics(scores), ranks)


def test_compute_metrics_refuses() -> None:
    scores = matrix("random", 6, 6)
    scores[2, 3] = np.nan
    with pytest.raises(ValueError, match="compute_metrics: scores must be numbers, got a NaN for query 2"):
        clip4clip.compute_metrics(scores)
    with pytest.raises(ValueError, match="M >= N"):
        clip4clip.compute_metrics(np.zeros((5, 3)))


def captioned(kind: str, seed: int = 0) -> np.ndarray:
    """[V, C, V] with captions missing, as -inf rows and NaN rows."""
    rng = np.random.default_rng(seed)
    scores = np.stack([matrix(kind, 4, 13, seed=seed + v) for v in range(13)])
    scores[np.arange(13), :, np.arange(13)] += rng.integers(0, 2, (13, 4))
    scores[2, 3:], scores[5, 1:], scores[9, 2:] = -np.inf, -np.inf, np.nan
    return scores


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_text_to_video_metrics(kind: str) -> None:
    scores = captioned(kind)
    ranks = np.array(
        [
            places(scores[video, caption], video, "stable")[0]
            for video in range(13)
            for caption in range(4)
            if np.isfinite(scores[video, caption, video])
        ]
    )
    ks = [1, 3, 5, 10]
    expected = {f"R{k}": np.float32(100 * (ranks < k).sum() / len(ranks)) for k in ks}
    expected["MedianR"] = expected["MR"] = float(np.sort(ranks)[(len(ranks) - 1) // 2] + 1)
    expected["MeanR"], expected["Std_Rank"] = (ranks + 1).mean(), (ranks + 1).std()
    for given in (scores, torch.from_numpy(scores)):
        found = clip4clip.tensor_text_to_video_metrics(given, top_k=ks)
        assert list(found) == ["R1", "R3", "R5", "R10", "MedianR", "MeanR", "Std_Rank", "MR"]
        assert found == pytest.approx(expected, rel=1e-14)
        assert all(type(value) is float for value in found.values())
    assert set(clip4clip.tensor_text_to_video_metrics(scores)) >= {"R1", "R5", "R10"}


def test_a_nan_ranks_above_numbers_as_in_torch() -> None:
    scores = torch.zeros(3, 1, 3)
    scores[0, 0] = torch.tensor([5.0, torch.nan, torch.nan])
    sorted_first = torch.argsort(scores[0, 0], descending=True).tolist()
    assert sorted_first.index(0) == 2  # what is claimed of torch
    assert clip4clip.tensor_text_to_video_metrics(scores)["MeanR"] == pytest.approx((3 + 2 + 3) / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_video_to_text_sim(kind: str) -> None:
    scores = captioned(kind)
    before, given = scores.copy(), torch.from_numpy(scores)
    expected = np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-np.inf).max(axis=1).T
    for found in (clip4clip.tensor_video_to_text_sim(scores), clip4clip.tensor_video_to_text_sim(given)):
        assert torch.is_tensor(found)
        np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(scores, before)
    check_clip4clip(
        clip4clip.compute_metrics(found),
        [place for row in range(13) for place in places(expected[row], row, "all")],
    )


def test_print_computed_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    clip4clip.print_computed_metrics({"R1": 40, "R5": 50.123456, "R10": 60, "MR": 2.0})
    assert capsys.readouterr().out == "R@1: 40.0000 - R@5: 50.1235 - R@10: 60.0000 - Median R: 2.0\n"


# ---- MMT, Frozen in Time ----


def masks_of(kind: str | None, texts: int, videos: int) -> np.ndarray | None:
    if kind is None:
        return None
    masks = np.ones((videos, texts // videos))
    masks[1, -1] = masks[3, 1:] = 0
    return masks if kind == "matrix" else masks.reshape(-1).astype(np.int64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_video", [1, 4])
@pytest.mark.parametrize("masked", [None, "matrix", "vector"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_t2v_metrics(kind: str, per_video: int, masked: str | None, dtype: type) -> None:
    scores = matrix(kind, 17 * per_video, 17).astype(dtype)
    masks = masks_of(masked if per_video > 1 else None, len(scores), 17)
    before = scores.copy()
    for module, ties in ((mmt, "mean"), (frozen_in_time, "first")):
        ranks = text_to_video_ranks(scores, masks, ties)
        found = module.t2v_metrics(scores, masks)
        if module is mmt:
            assert found.pop("cols") == [int(rank) for rank in ranks]
        expected = collaborative_experts(ranks, len(ranks))
        assert list(found) == list(expected)
        assert found == pytest.approx(expected, rel=1e-12)

        ranks = video_to_text_ranks(scores, masks)
        found = module.v2t_metrics(scores, masks)
        if module is mmt:
            assert found.pop("cols") == [int(rank) for rank in ranks]
        assert found == pytest.approx(collaborative_experts(ranks, 17), rel=1e-12)
    np.testing.assert_array_equal(scores, before)


def test_constant_matrices() -> None:
    scores = np.zeros((100, 100))
    assert frozen_in_time.t2v_metrics(scores)["R1"] == 100  # as published
    for found in (mmt.t2v_metrics(scores), mmt.v2t_metrics(scores), frozen_in_time.v2t_metrics(scores)):
        assert (found["R1"], found["R10"], found["MedR"], found["geometric_mean_R1-R5-R10"]) == (0, 0, 50.5, 0)


def test_a_tie_for_the_first_place_is_no_hit() -> None:
    scores = np.array([[1.0, 1.0], [0.0, 1.0]])
    assert mmt.t2v_metrics(scores)["R1"] == 50
    assert mmt.t2v_metrics(scores)["cols"] == [0, 0]


def test_videos_without_texts() -> None:
    scores, masks = matrix("random", 12, 4), np.ones((4, 3))
    masks[2] = 0
    assert frozen_in_time.v2t_metrics(scores, masks)["MeanR"] == math.inf
    with pytest.raises(OverflowError):  # it makes integers of its ranks
        mmt.v2t_metrics(scores, masks)


def test_t2v_metrics_refuses() -> None:
    scores = matrix("random", 12, 4)
    for module in (mmt, frozen_in_time):
        for function in (module.t2v_metrics, module.v2t_metrics):
            with pytest.raises(AssertionError, match="must be a matrix"):
                function(scores[0])
            with pytest.raises(AssertionError, match="query_masks must have 12 entries, got 3"):
                function(scores, np.ones(3))
            broken = scores.copy()
            broken[3, 1] = np.nan
            with pytest.raises(ValueError, match=r"NaN for query (3|1)"):
                function(broken)
            broken[3:6, 1] = np.inf
            with pytest.raises(ValueError, match=r"must be finite, got inf for (text 3|video 1)"):
                function(broken)
        with pytest.raises(ValueError, match="multiple of 4 rows"):
            module.t2v_metrics(scores[:11])


# ---- open_clip ----


def features(kind: str, n: int, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    if kind == "random":
        images = rng.standard_normal((n, 16))
        pair = images, images + 1.5 * rng.standard_normal((n, 16))
    elif kind == "ties":  # exact in fp32 and in bf16
        pair = rng.integers(-1, 2, (n, 4)), rng.integers(-1, 2, (n, 4))
    else:
        pair = np.ones((n, 3)), np.ones((n, 3))
    return tuple(torch.from_numpy(x.astype(np.float32)) for x in pair)


def clip_metrics(scores: np.ndarray, names: tuple[str, str] = ("image", "text")) -> dict[str, float]:
    metrics = {}
    for name, matrix in ((f"{names[0]}_to_{names[1]}", scores), (f"{names[1]}_to_{names[0]}", scores.T)):
        ranks = [places(row, i, "stable")[0] for i, row in enumerate(matrix)]
        metrics[f"{name}_mean_rank"] = sum(ranks) / len(ranks) + 1
        metrics[f"{name}_median_rank"] = math.floor(float(np.median(ranks))) + 1
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = sum(rank < k for rank in ranks) / len(ranks)
    return metrics


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [100.0, 1, torch.tensor(14.3), -2.0, 0.0])
@pytest.mark.parametrize("n", [1, 50])
def test_get_clip_metrics(kind: str, scale: Any, n: int) -> None:
    images, texts = features(kind, n)
    scores = np.sign(float(scale)) * (images.double() @ texts.double().T).numpy()
    found = open_clip.get_clip_metrics(images.requires_grad_(), texts, scale)
    expected = clip_metrics(scores)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-14)


def test_get_clip_metrics_of_parts_and_other_names() -> None:
    images, texts = features("ties", 40)
    expected = clip_metrics((images @ texts.T).numpy(), ("audio", "caption"))
    found = open_clip.get_clip_metrics(
        [images[:7], images[7:30], images[30:]],
        (texts[:25], texts[25:]),
        1.0,
        image_key="audio",
        text_key="caption",
        retrieval_chunk_size=8,
        retrieval_device="cpu",
        retrieval_dtype=torch.float32,
    )
    assert found == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("dtype", ["fp32", "model", None, torch.bfloat16])
def test_get_clip_metrics_dtypes(dtype: Any) -> None:
    images, texts = (x.bfloat16() for x in features("ties", 40, seed=5))
    expected = clip_metrics((images.float() @ texts.float().T).numpy())
    found = open_clip.get_clip_metrics(images, texts, 1.0, retrieval_dtype=dtype)
    assert found == pytest.approx(expected, rel=1e-14)


def test_get_clip_metrics_refuses() -> None:
    images, texts = features("random", 6)
    for arguments, message in (
        ((images, texts[:5], 1.0), "one shape"),
        ((images[0], texts, 1.0), "must have shape"),
        (([images[:3], images[3:, :4]], texts, 1.0), "must have shape"),
        (([], texts, 1.0), "at least one tensor"),
        ((images, texts, float("nan")), "logit_scale"),
    ):
        with pytest.raises(ValueError, match=message):
            open_clip.get_clip_metrics(*arguments)
    with pytest.raises(ValueError, match="retrieval_dtype"):
        open_clip.get_clip_metrics(images, texts, 1.0, retrieval_dtype="fp8")
    images[4, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN in row 4"):
        open_clip.get_clip_metrics(images, texts, 1.0)


# ---- CLIP_benchmark ----


@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("transposed", [False, True])
def test_recall_at_k(k: int, transposed: bool) -> None:
    rng = np.random.default_rng(6)
    scores = torch.from_numpy(rng.standard_normal((40, 40)).astype(np.float32))
    positives = torch.from_numpy(rng.random((40, 40)) < 0.1)
    positives[5] = positives[:, 5] = False
    if transposed:
        scores, positives = scores.T, positives.T
    expected = []
    for row, own in zip(scores.numpy(), positives.numpy(), strict=True):
        best = set(np.argsort(-row)[:k].tolist())
        wanted = set(np.flatnonzero(own).tolist())
        expected.append(np.float32(len(best & wanted) / len(wanted)) if wanted else np.nan)
    found = clip_benchmark.recall_at_k(scores, positives, k)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), np.array(expected, np.float32))


def test_recall_at_k_breaks_ties_as_torch_does() -> None:
    scores, positives = torch.zeros(9, 50), torch.rand(9, 50) < 0.3
    best = torch.topk(scores, 7, dim=1).indices
    expected = torch.stack([own[chosen].sum() / own.sum() for own, chosen in zip(positives, best, strict=True)])
    torch.testing.assert_close(
        clip_benchmark.recall_at_k(scores, positives, 7), expected, rtol=0, atol=0, equal_nan=True
    )
    with pytest.raises(RuntimeError):
        clip_benchmark.recall_at_k(scores, positives, 51)


class Model:
    """Embeds numbers by a table, unnormalised."""

    def __init__(self, seed: int) -> None:
        self.table = torch.randn(2, 200, 8, generator=torch.Generator().manual_seed(seed))

    def encode_image(self, images: Any) -> Any:
        return self.table[0, images]

    def encode_text(self, tokens: Any) -> Any:
        return self.table[0, tokens // 5] + 0.8 * self.table[1, tokens]


def test_clip_benchmark_evaluate() -> None:
    model, images = Model(7), 33
    captions = [[str(5 * image + c) for c in range(image % 4)] for image in range(images)]  # some have none
    loader = [
        (torch.arange(start, min(images, start + 10)), captions[start : start + 10]) for start in range(0, images, 10)
    ]
    found = clip_benchmark.evaluate(
        model, loader, lambda texts: torch.tensor([int(text) for text in texts]), "cpu", recall_k_list=[1, 3, 10]
    )

    owner = np.array([image for image in range(images) for _ in captions[image]])
    tokens = torch.tensor([int(text) for texts in captions for text in texts])
    unit = torch.nn.functional.normalize
    scores = (
        unit(model.encode_text(tokens), dim=-1).double()
        @ unit(model.encode_image(torch.arange(images)), dim=-1).double().T
    ).numpy()
    expected = {}
    for k in (1, 3, 10):
        by_text = [owner[text] in np.argsort(-row)[:k] for text, row in enumerate(scores)]
        by_image = [image in owner[np.argsort(-column)[:k]] for image, column in enumerate(scores.T)]
        expected[f"image_retrieval_recall@{k}"] = np.mean(by_text)
        expected[f"text_retrieval_recall@{k}"] = np.mean(by_image)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-6)
    assert 0.1 < found["image_retrieval_recall@1"] < 0.9
    assert list(clip_benchmark.evaluate(model, loader, lambda t: torch.tensor([int(x) for x in t]), "cpu", False)) == [
        "image_retrieval_recall@5",
        "text_retrieval_recall@5",
    ]
    with pytest.raises(ValueError, match="k must be"):
        clip_benchmark.evaluate(model, loader, lambda t: torch.tensor([int(x) for x in t]), "cpu", recall_k_list=[99])
