"""SCAN's cross attention: the kernels against the paper's formulas in fp64, attended vectors and all."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from simt.sets import Float64, Sets, padded, ragged

NORMS = ("softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "no_norm", "clipped")
AGGREGATIONS = ("LogSumExp", "Max", "Sum", "Mean")
OPTIONS = (9.0, 6.0, 1e-8)


def softmax(x: Float64, axis: int) -> Float64:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def score(x: Float64, y: Float64, norm: str, aggregation: str, options: tuple[float, float, float] = OPTIONS) -> float:
    """Vectors x attend to the context y."""
    if not len(x) or not len(y):
        return 0.0
    smooth, sharpness, eps = options
    weights = y @ x.T  # [context, x]
    if norm.startswith("clipped"):
        weights = np.where(weights > 0, weights, 0.1 * weights)
    if norm == "softmax":
        weights = softmax(weights, 1)
    elif norm.endswith("l2norm"):
        weights = weights / (np.sqrt((weights**2).sum(axis=1, keepdims=True)) + eps)
    elif norm.endswith("l1norm"):
        weights = weights / (np.abs(weights).sum(axis=1, keepdims=True) + eps)
    attended = softmax(smooth * weights, 0).T @ y
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(attended, axis=1)
    relevance = (x * attended).sum(axis=1) / np.maximum(norms, eps)
    if aggregation == "LogSumExp":
        return float(np.log(np.exp(sharpness * relevance).sum()) / sharpness)
    return float({"Max": np.max, "Sum": np.sum, "Mean": np.mean}[aggregation](relevance))


def check(
    cuda_sets: Any,
    images: Sets,
    captions: Sets,
    direction: str,
    norm: str,
    aggregation: str,
    options: tuple[float, float, float] = OPTIONS,
) -> None:
    found = cuda_sets.xattn_score(*images.arguments, *captions.arguments, direction, norm, aggregation, *options)
    expected = np.zeros(found.shape)
    for i, image in enumerate(images.items):
        for j, caption in enumerate(captions.items):
            x, y = (caption, image) if direction == "t2i" else (image, caption)
            expected[i, j] = score(x, y, norm, aggregation, options)
    # A relevance of fp32 products, softmax weights and a quadratic form: 64 ulps of the scale of a score.
    scale = np.abs(expected).max() + 1
    tolerance = 64 * (np.finfo(np.float64).eps if images.values.dtype == torch.float64 else np.finfo(np.float32).eps)
    assert np.abs(found.numpy() - expected).max() <= tolerance * scale


def unit(sets: Sets) -> Sets:
    """Rows of length about 1, as SCAN has them: its softmax is tuned to that."""
    return Sets(sets.values * sets.values.shape[-1] ** -0.5, sets.lengths, sets.offsets)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_and_aggregations(cuda_sets: Any, dtype: torch.dtype, direction: str) -> None:
    images, captions = unit(padded(0, [9, 1, 0, 5], 24, dtype)), unit(ragged(1, [4, 0, 13], 24, dtype))
    for norm, aggregation in itertools.product(NORMS, AGGREGATIONS):
        check(cuda_sets, images, captions, direction, norm, aggregation)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shapes(cuda_sets: Any, dtype: torch.dtype, direction: str) -> None:
    """Regions and words as SCAN has them, items beyond a tile, odd dims and strides."""
    for dim, counts in ((64, [36, 36, 36, 36]), (33, [140, 3]), (7, [1, 33])):
        images, captions = unit(padded(dim, counts, dim, dtype)), unit(ragged(2, [12, 31, 1], dim, dtype))
        check(cuda_sets, images, captions, direction, "clipped_l2norm", "LogSumExp")
    wide = unit(padded(5, [9, 4], 48, dtype))
    images = Sets(wide.values[..., ::3], lengths=wide.lengths)
    check(cuda_sets, images, unit(ragged(6, [5], 16, dtype)), direction, "l1norm", "Mean")


def test_options(cuda_sets: Any) -> None:
    images, captions = unit(padded(3, [6, 2], 16, torch.float32)), unit(padded(4, [3, 8], 16, torch.float32))
    for options in ((4.0, 5.0, 1e-6), (20.0, 0.5, 1e-8), (9.0, 100.0, 1e-8)):
        check(cuda_sets, images, captions, "t2i", "l2norm", "LogSumExp", options)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_several_parts(cuda_sets: Any, arch: str, direction: str) -> None:
    """More vectors than one matrix of products holds: items must not be cut."""
    if arch == "90":
        pytest.skip("no kernels of its own; seconds long")
    counts = [(11 * i) % 37 for i in range(125)]
    captions = unit(ragged(7, [3, 0, 2], 3, torch.float32))
    for images in (padded(8, counts, 3, torch.float32), ragged(9, counts, 3, torch.float32)):
        check(cuda_sets, unit(images), captions, direction, "clipped_l2norm", "LogSumExp")


def test_zeros_and_nan(cuda_sets: Any) -> None:
    """Zero vectors are relevant to nothing; a NaN stays in the pairs it is in."""
    images, captions = unit(padded(10, [4, 3], 8, torch.float32)), unit(padded(11, [2, 5], 8, torch.float32))
    captions.values[0, 0] = 0
    check(cuda_sets, images, captions, "t2i", "clipped_l2norm", "Sum")
    images.values[1, 2, 0] = torch.nan
    found = cuda_sets.xattn_score(*images.arguments, *captions.arguments, "t2i", "l2norm", "Max", *OPTIONS).numpy()
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[0]).all()


def test_too_long(cuda_sets: Any) -> None:
    images, captions = Sets(torch.ones(1, 4097, 1)), Sets(torch.ones(1, 2, 1))
    message = "xattn_score: images must have at most 4096 vectors an item on a CUDA device, got 4097"
    with pytest.raises(ValueError, match=message):
        cuda_sets.xattn_score(*images.arguments, *captions.arguments, "t2i", "softmax", "Sum", *OPTIONS)
