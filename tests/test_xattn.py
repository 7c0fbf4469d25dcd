"""xattn_score: SCAN's equations, restated in torch step by step as the paper's code takes them, and gradients."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from interaction_cases import Sets, forms, make, padded
from tolerances import GRADCHECK
from torch_cases import raises

import pycm
from pycm import reference

torch = pytest.importorskip("torch")

NORMS = ["softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "no_norm", "clipped"]
AGGREGATIONS = ["LogSumExp", "Max", "Sum", "Mean"]
DIRECTIONS = ["t2i", "i2t"]
OPTIONS = list(itertools.product(DIRECTIONS, NORMS, AGGREGATIONS))
# Regions of an image, words of a caption; some items are empty.
REGIONS, WORDS = [36, 1, 12, 0, 17, 5], [7, 16, 1, 33, 0, 4, 12]


def scan_score(
    images: torch.Tensor,
    caption: torch.Tensor,
    direction: str,
    feature_norm: str,
    aggregation: str,
    lambda_softmax: float,
    lambda_lse: float,
    eps: float,
) -> torch.Tensor:
    """One caption [W, D] with images [n, R, D], every step materialised; no maximum is subtracted by hand."""
    words = caption.expand(len(images), *caption.shape)
    query, context = (words, images) if direction == "t2i" else (images, words)
    attention = torch.bmm(context, query.transpose(1, 2))  # [n, context, query]
    if "clipped" in feature_norm:
        attention = torch.nn.LeakyReLU(0.1)(attention)
    if feature_norm == "softmax":
        attention = torch.softmax(attention, dim=2)
    elif feature_norm.endswith("l2norm"):
        attention = attention / (attention.pow(2).sum(dim=2, keepdim=True).sqrt() + eps)
    elif feature_norm.endswith("l1norm"):
        attention = attention / (attention.abs().sum(dim=2, keepdim=True) + eps)
    weights = torch.softmax(attention.transpose(1, 2) * lambda_softmax, dim=2)  # [n, query, context]
    attended = torch.bmm(weights, context)
    product = (query * attended).sum(2)
    relevance = product / (query.norm(2, 2) * attended.norm(2, 2)).clamp(min=eps)
    if aggregation == "LogSumExp":
        return torch.log((relevance * lambda_lse).exp().sum(dim=1)) / lambda_lse
    if aggregation == "Max":
        return relevance.max(dim=1)[0]
    return relevance.sum(dim=1) if aggregation == "Sum" else relevance.mean(dim=1)


def scan_scores(images: Any, captions: Any, *options: Any) -> torch.Tensor:
    """[N, M] of lists of tensors; an empty item scores 0."""
    rows = []
    for image in images:
        for caption in captions:
            zero = (image.sum() + caption.sum()) * 0
            some = len(image) and len(caption)
            rows.append(scan_score(image[None], caption, *options)[0] if some else zero)
    return torch.stack(rows).reshape(len(images), len(captions))


@functools.cache
def case(dim: int, seed: int = 1) -> tuple[Sets, Sets]:
    """Rows of norm about 1, as SCAN's are."""
    scale = np.float32(dim**-0.5)
    return [x * scale for x in make(REGIONS, dim, seed)], [x * scale for x in make(WORDS, dim, seed + 1)]


@functools.cache
def want(dim: int, *options: Any) -> tuple[Any, float]:
    """fp64 scores, and how far off the same steps are in fp32."""
    sides = [[torch.from_numpy(x) for x in side] for side in case(dim)]
    wide = scan_scores(*([x.double() for x in side] for side in sides), *options)
    return wide.numpy(), float((scan_scores(*sides, *options) - wide).abs().max())


@pytest.mark.parametrize(("direction", "feature_norm", "aggregation"), OPTIONS)
def test_equal_to_the_original(level: str, direction: str, feature_norm: str, aggregation: str) -> None:
    """Our error against fp64 is that of the original's own steps in fp32, or a few ulps of the largest score."""
    for dim, factors in ((16, (9.0, 6.0, 1e-8)), (130, (4.0, 5.0, 1e-8)), (65, (20.0, 1.0, 0.3))):
        options = (direction, feature_norm, aggregation, *factors)
        names = ("direction", "feature_norm", "aggregation", "lambda_softmax", "lambda_lse", "eps")
        got = pycm.xattn_score(*case(dim), **dict(zip(names, options, strict=True)))
        exact, peer = want(dim, *options)
        assert got.dtype == np.float32
        assert np.abs(got - exact).max() <= peer + 4 * np.finfo(np.float32).eps * max(1.0, np.abs(exact).max())
        if level == "scalar":
            np.testing.assert_allclose(reference.xattn_score(*case(dim), *options), exact, rtol=1e-9, atol=1e-12)


def test_float64_and_halves(level: str) -> None:
    images, captions = case(40)
    for options in OPTIONS[::3]:
        named = dict(zip(("direction", "feature_norm", "aggregation"), options, strict=True))
        for dtype, limit in ((np.float64, 1e-12), (np.float16, 1e-5)):
            sides = [[x.astype(dtype) for x in side] for side in (images, captions)]
            exact = reference.xattn_score(*sides, *options)
            got = pycm.xattn_score(*sides, **named)
            assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
            np.testing.assert_allclose(got, exact, atol=limit, rtol=limit)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_forms_give_the_same_bits(level: str, direction: str) -> None:
    images, captions = case(21)
    expected = pycm.xattn_score(list(images), list(captions), direction=direction)
    for (name, a, a_lengths), (_, b, b_lengths) in zip(forms(images), forms(captions), strict=True):
        got = pycm.xattn_score(a, b, a_lengths, b_lengths, direction=direction)
        np.testing.assert_array_equal(got, expected, name)
    image_order, caption_order = np.random.default_rng(0).permutation(6), np.random.default_rng(1).permutation(7)
    shuffled = pycm.xattn_score(
        [images[i] for i in image_order], [captions[j] for j in caption_order], direction=direction
    )
    np.testing.assert_array_equal(shuffled, expected[image_order][:, caption_order])
    tensors = [[torch.from_numpy(x) for x in side] for side in (images, captions)]
    assert torch.equal(pycm.xattn_score(*tensors, direction=direction), torch.from_numpy(expected))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.usefixtures("threads")
def test_threads_and_chunks_change_no_bit(direction: str) -> None:
    rng = np.random.default_rng(2)
    images, captions = make([9] * 300, 16, 3), make(rng.integers(0, 30, 200).tolist(), 16, 4)
    results = []
    for count in (1, 2, 3):
        pycm.set_num_threads(count)
        results.append(pycm.xattn_score(images, captions, direction=direction))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    for i, j in ((0, 0), (299, 199), (150, 77)):
        assert pycm.xattn_score([images[i]], [captions[j]], direction=direction) == results[0][i, j]


def test_opposed_regions_do_not_cancel(level: str) -> None:
    """The attended vector nearly vanishes: its norm must not come from fp32 squares."""
    rng = np.random.default_rng(5)
    word = rng.standard_normal((1, 64)).astype(np.float32)
    region = rng.standard_normal((1, 64)).astype(np.float32)
    region -= word * (region @ word.T) / (word @ word.T)  # both regions get the same weight
    image = np.concatenate([region, -region + 1e-3 * word]).astype(np.float32)
    exact = reference.xattn_score([image], [word], feature_norm="no_norm", lambda_softmax=1e-3)
    got = pycm.xattn_score([image], [word], feature_norm="no_norm", lambda_softmax=1e-3)
    peer = scan_scores(
        [torch.from_numpy(image)], [torch.from_numpy(word)], "t2i", "no_norm", "LogSumExp", 1e-3, 6.0, 1e-8
    )
    assert np.abs(got - exact).max() <= np.abs(peer.numpy() - exact).max() + 1e-6


def test_zero_vectors_and_large_factors(level: str) -> None:
    """eps keeps zeros finite; a large lambda_lse does not overflow."""
    images, captions = (
        [np.zeros((3, 8), np.float32), make([4], 8)[0]],
        [np.zeros((2, 8), np.float32), make([5], 8, 1)[0]],
    )
    for options in OPTIONS:
        got = pycm.xattn_score(
            images, captions, **dict(zip(("direction", "feature_norm", "aggregation"), options, strict=True))
        )
        np.testing.assert_allclose(got, reference.xattn_score(images, captions, *options), atol=1e-5)
    large = pycm.xattn_score(images, captions, lambda_lse=1000.0)
    np.testing.assert_allclose(large, reference.xattn_score(images, captions, lambda_lse=1000.0), atol=1e-5)


def test_nan_stays_in_its_pairs() -> None:
    images, captions = make([4, 5], 8), make([3, 6, 2], 8, 1)
    images[1][2, 3], captions[2][1, 1] = np.nan, np.nan
    bad = np.zeros((2, 3), bool)
    bad[1], bad[:, 2] = True, True
    for options in OPTIONS:
        got = pycm.xattn_score(
            images, captions, **dict(zip(("direction", "feature_norm", "aggregation"), options, strict=True))
        )
        np.testing.assert_array_equal(np.isnan(got), bad, str(options))


def test_empty() -> None:
    x = np.ones((2, 3, 4), np.float32)
    assert pycm.xattn_score(x[:0], x).shape == (0, 2)
    assert pycm.xattn_score(x, x[:0]).shape == (2, 0)
    np.testing.assert_array_equal(pycm.xattn_score(x, x, [0, 3], [3, 0]), [[0, 0], [pycm.xattn_score(x, x)[1, 0], 0]])
    np.testing.assert_array_equal(pycm.xattn_score(x[:, :0], x), np.zeros((2, 2)))


# ---- gradients ----


def leaves(sets: Sets, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.empty(x.shape, dtype=dtype).copy_(torch.from_numpy(x)).requires_grad_() for x in sets]


@pytest.mark.parametrize(("direction", "feature_norm", "aggregation"), OPTIONS)
def test_gradients(direction: str, feature_norm: str, aggregation: str) -> None:
    """gradcheck, and the gradients of the restated original."""
    names = {"direction": direction, "feature_norm": feature_norm, "aggregation": aggregation}
    images, captions = leaves(make([3, 0, 2], 5, 6)), leaves(make([4, 1, 0, 2], 5, 7))

    def scores(*items: torch.Tensor) -> Any:
        return pycm.xattn_score(list(items[:3]), list(items[3:]), **names)

    assert torch.autograd.gradcheck(scores, (*images, *captions), **GRADCHECK)
    images, captions = leaves(case(30)[0]), leaves(case(30)[1])
    weights = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    for factors in ((9.0, 6.0, 1e-8), (3.0, 2.0, 0.2)):
        options = dict(zip(("lambda_softmax", "lambda_lse", "eps"), factors, strict=True))
        ours = (pycm.xattn_score(images, captions, **names, **options) * weights).sum()
        plain = (scan_scores(images, captions, *names.values(), *factors) * weights).sum()
        inputs = (*images, *captions)
        for got, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-9)


def test_gradient_of_padding_is_zero() -> None:
    (a, a_lengths), (b, b_lengths) = padded(case(12)[0], 40), padded(case(12)[1], 35)
    images, captions = torch.from_numpy(a).requires_grad_(), torch.from_numpy(b).requires_grad_()
    for direction in DIRECTIONS:
        scores = pycm.xattn_score(images, captions, a_lengths, b_lengths, direction=direction)
        grads = torch.autograd.grad(scores.sum(), (images, captions))
        for grad, lengths in zip(grads, (a_lengths, b_lengths), strict=True):
            outside = torch.arange(grad.shape[1]) >= torch.from_numpy(lengths)[:, None]
            assert not grad[outside].any()
            assert torch.isfinite(grad).all()
            assert grad[~outside].any()


def test_operator() -> None:
    images, captions = torch.randn(3, 5, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    call = (images, torch.tensor([5, 0, 2]), None, captions, None, torch.tensor([0, 4, 9]))
    options = ("t2i", "clipped_l2norm", "LogSumExp", 9.0, 6.0, 1e-8)
    torch.library.opcheck(torch.ops.pycm.xattn_score, (*call, *options))

    def loss(images: Any, lengths: Any, captions: Any, offsets: Any) -> Any:
        return pycm.xattn_score(images, (captions, offsets), lengths).square().sum()

    inputs = (images, call[1], captions, call[5])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), (images, captions))
    got = torch.autograd.grad(compiled(*inputs), (images, captions))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        half = images.detach().bfloat16()
        assert torch.equal(pycm.xattn_score(half, half), pycm.xattn_score(half.float(), half.float()))
    (grad,) = torch.autograd.grad(loss(*inputs), images, create_graph=True)
    raises(NotImplementedError, ["xattn_score", "second derivatives"], lambda: grad.sum().backward())


# ---- errors ----


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "direction must be t2i or i2t, got 'both'", (), {"direction": "both"}),
        (ValueError, "feature_norm must be one of softmax, l2norm, clipped_l2norm", (), {"feature_norm": "no"}),
        (ValueError, "aggregation must be one of LogSumExp, Max, Sum, Mean, got 'max'", (), {"aggregation": "max"}),
        (ValueError, "lambda_lse must not be 0", (), {"lambda_lse": 0}),
        (ValueError, "eps must be at least 0, got -1", (), {"eps": -1}),
        (ValueError, "image_lengths must be in [0, 3], got 4", ([4, 1],), {}),
        (ValueError, "caption_lengths must have shape [2], got [1]", (None, [4]), {}),
    ],
)
def test_errors(error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    x = np.ones((2, 3, 4), np.float32)
    for array in (x, torch.from_numpy(x)):
        raises(
            error, ["xattn_score: ", message], lambda array=array: pycm.xattn_score(array, array, *arguments, **options)
        )
    meta = torch.ones(2, 3, 4, device="meta")
    if not arguments:
        raises(error, ["xattn_score: ", message], lambda: pycm.xattn_score(meta, meta, **options))
