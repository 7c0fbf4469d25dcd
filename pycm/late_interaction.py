"""Late interaction: items that are sets of vectors, scored vector by vector.

The tokens of a query against those of a passage or a page (ColBERT, ColPali), words against image patches (FILIP),
words against regions (SCAN).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from pycm import _C
from pycm.functional import Matches, Precision, _as_numpy, _both_torch, _int64, _like

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = npt.NDArray[Any] | torch.Tensor
    #: Padded ``[N, T, D]``, ragged ``(values [total, D], offsets [N + 1])``, or one array ``[T_i, D]`` for each item.
    Items: TypeAlias = Array | tuple[Array, Any] | list[Array]

Direction: TypeAlias = Literal["t2i", "i2t", "both"]
Reduce: TypeAlias = Literal["sum", "mean"]
FeatureNorm: TypeAlias = Literal[
    "softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "no_norm", "clipped"
]
Aggregation: TypeAlias = Literal["LogSumExp", "Max", "Sum", "Mean"]

FEATURE_NORMS: tuple[str, ...] = get_args(FeatureNorm)
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


def maxsim(
    queries: Items,
    gallery: Items,
    query_lengths: Any = None,
    gallery_lengths: Any = None,
    *,
    metric: Literal["dot", "cosine"] = "dot",
    reduce: Reduce = "sum",
    direction: Direction = "t2i",
) -> Any:
    """Late-interaction scores of N queries with M items: each vector of one side's best match on the other, summed.

    Args:
        queries: N sets of vectors, float32, float16, bfloat16 or float64, torch, NumPy or DLPack, in one of three
            forms: padded ``[N, T, D]``; ragged, a pair ``(values [total, D], offsets [N + 1])`` in which query i is
            ``values[offsets[i]:offsets[i + 1]]``; or a list of N arrays ``[T_i, D]``. Any strides.
        gallery: M sets, of the same dtype and kind, in any of these forms.
        query_lengths: int ``[N]``, how many vectors of each padded query count; all by default. What lies beyond is
            not read: no NaN there changes a bit.
        gallery_lengths: int ``[M]``, the same for the gallery.
        metric: ``dot``, or ``cosine``, which is 0 for a zero vector.
        reduce: ``sum`` or ``mean`` over the vectors.
        direction: ``t2i`` (of text to image; ColBERT's) takes for each vector of the query the best of the item,
            ``i2t`` for each vector of the item the best of the query, ``both`` adds the two, each after its own mean.

    Returns:
        ``[N, M]`` float32 (float64 for float64 inputs), of the queries' kind and device. A pair in which either side
        has no vectors scores 0; one with a NaN similarity is NaN.

    Raises:
        TypeError: for an array of integers, differing dtypes or kinds, or no array.
        ValueError: for shapes that do not fit, a length outside [0, T], or an unknown name.

    Similarities are summed in fp32 (fp64 for float64) and their maxima in fp64: the scores do not depend on the form,
    the batch or the threads, and differ between processors by rounding only. `maxsim_topk` is exact.

    Differentiable in both for torch tensors: each maximum passes its gradient to the two vectors it comes from.
    O(total vectors of queries x of gallery x D) time; no similarity is written to memory, so the memory is that of the
    scores and a packed copy of some queries (of some items for ``i2t``). To weigh the vectors of a query, scale them
    (by a weight >= 0, with ``metric="dot"``).

    Khattab and Zaharia 2020 (ColBERT, arXiv:2004.12832); Yao et al. 2021 (FILIP, arXiv:2111.07783).
    """
    way = (metric, reduce, direction)
    q, g, is_torch = _pair("maxsim", ("queries", "gallery"), queries, gallery, query_lengths, gallery_lengths)
    if is_torch:
        import pycm._torch_late_interaction as ops

        return ops.maxsim(q, g, *way)
    return _like(_C.maxsim(*q, *g, *way), _kind(queries))


def maxsim_topk(
    queries: Items,
    gallery: Items,
    k: int,
    query_lengths: Any = None,
    gallery_lengths: Any = None,
    *,
    metric: Literal["dot", "cosine"] = "dot",
    reduce: Reduce = "sum",
    direction: Direction = "t2i",
    precision: Precision = "exact",
) -> Matches:
    """The k items of the gallery with the best late-interaction scores for each query.

    Args:
        queries, gallery, query_lengths, gallery_lengths, metric, reduce, direction: as for `maxsim`.
        k: from 1 to M.
        precision: ``exact``: the score of a pair is its fp64 value in the library's fixed order of operations, rounded
            to fp32 (not rounded for float64 inputs), and matches are ordered by score, then by index, lowest first: the
            same bits for any form, batch, thread count and processor. ``fast``: `maxsim`'s own scores.

    Returns:
        ``Matches(scores [N, k], indices [N, k])``. A NaN score is never a match: index -1, score -inf.

    Raises:
        TypeError, ValueError: as `maxsim`; ValueError for an empty gallery or a k outside [1, M].

    Every pair is screened by `maxsim`'s pass, whose error is bounded, and only pairs that may be among the best are
    evaluated in fp64, there again only products that may be a maximum. Memory: O(M) beside the result, never N x M.
    The scores are differentiable for torch tensors.
    """
    way = (metric, reduce, direction, precision)
    q, g, is_torch = _pair("maxsim_topk", ("queries", "gallery"), queries, gallery, query_lengths, gallery_lengths)
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"maxsim_topk: k must be an integer, got {type(k).__name__}") from None
    if is_torch:
        import pycm._torch_late_interaction as ops

        return Matches(*ops.maxsim_topk(q, g, k, *way))
    like = _kind(queries)
    return Matches(*(_like(result, like) for result in _C.maxsim_topk(*q, *g, k, *way)))


def xattn_score(
    images: Items,
    captions: Items,
    image_lengths: Any = None,
    caption_lengths: Any = None,
    *,
    direction: Literal["t2i", "i2t"] = "t2i",
    feature_norm: FeatureNorm = "clipped_l2norm",
    aggregation: Aggregation = "LogSumExp",
    lambda_softmax: float = 9.0,
    lambda_lse: float = 6.0,
    eps: float = 1e-8,
) -> Any:
    """Stacked cross attention of N images with M captions: the scores of SCAN, fused.

    ``t2i``: each word attends to an image's regions, and its relevance is the cosine of the word with the regions'
    weighted sum; ``i2t``: each region attends to a caption's words. The relevances are aggregated to one score.

    Args:
        images: N sets of region vectors, float32, float16, bfloat16 or float64: padded ``[N, R, D]``, ragged
            ``(values, offsets)``, or a list of arrays ``[R_i, D]``; torch, NumPy or DLPack.
        captions: M sets of word vectors, of the same dtype and kind.
        image_lengths, caption_lengths: ints, how many vectors of each padded item count.
        direction: ``t2i`` or ``i2t``.
        feature_norm: what is done to the dot products of one context vector (a region for ``t2i``) with all attending
            ones before the softmax over the context: ``softmax``; ``l2norm``, ``l1norm``: divided by their norm + eps;
            ``clipped``: negative ones times 0.1 (a leaky ReLU); ``clipped_l2norm``, ``clipped_l1norm``: clipped, then
            divided; ``no_norm``.
        aggregation: ``LogSumExp`` (log(sum(exp(lambda_lse r))) / lambda_lse), ``Max``, ``Sum`` or ``Mean``.
        lambda_softmax: factor of the attention's logits (SCAN's smoothing; 9 for t2i, 4 for i2t in the paper).
        lambda_lse: see LogSumExp.
        eps: of the norms, and the least product of norms in the cosine.

    Returns:
        ``[N, M]`` float32 (float64 for float64 inputs). A pair in which either side has no vectors scores 0.

    Raises:
        TypeError, ValueError: as `maxsim`; ValueError for an unknown name, ``lambda_lse`` 0 or a negative ``eps``.

    Equal to the original's arithmetic, to fp32 rounding; the softmax and the LogSumExp subtract their maximum, and do
    not overflow where the original's does. The attended vectors are never made: their products with the words and their
    norms follow from the dot products and one Gram matrix for each image. Differentiable for torch tensors: the
    backward repeats the forward in torch's own operations, some images and one caption at a time.

    Lee et al. 2018, "Stacked Cross Attention for Image-Text Matching", arXiv:1803.08024.
    """
    names, factors = (direction, feature_norm, aggregation), (float(lambda_softmax), float(lambda_lse), float(eps))
    i, c, is_torch = _pair("xattn_score", ("images", "captions"), images, captions, image_lengths, caption_lengths)
    if is_torch:
        import pycm._torch_late_interaction as ops

        return ops.xattn_score(i, c, *names, *factors)
    return _like(_C.xattn_score(*i, *c, *names, *factors), _kind(images))


# ---- arguments ----


class Sets(NamedTuple):
    """What the kernels take: padded values with lengths or None, or ragged values with offsets."""

    values: Any
    lengths: Any
    offsets: Any


def _kind(items: Items) -> Any:
    """An array that tells which kind the result should be."""
    if isinstance(items, tuple):
        return items[0]
    return items[0] if isinstance(items, list) and items else items


def _pair(
    function: str, names: tuple[str, str], a: Items, b: Items, a_lengths: Any, b_lengths: Any
) -> tuple[Sets, Sets, bool]:
    """Both sides, and whether they are torch tensors."""
    first, second = (_kind(items) for items in (a, b))
    if isinstance(first, list) or isinstance(second, list):
        name = names[0] if isinstance(first, list) else names[1]
        got = "a list of lists" if (a if name == names[0] else b) else "an empty list"
        raise ValueError(f"{function}: {name} must hold arrays, at least one, where it is a list, got {got}")
    is_torch = _both_torch(function, names[0], first, names[1], second)
    if is_torch:
        import pycm._torch_late_interaction as ops

        return ops.sets(function, names[0], a, a_lengths), ops.sets(function, names[1], b, b_lengths), True
    return _numpy_sets(function, names[0], a, a_lengths), _numpy_sets(function, names[1], b, b_lengths), False


def _numpy_sets(function: str, name: str, items: Items, lengths: Any) -> Sets:
    values, offsets = split(function, name, items, lengths)
    if isinstance(values, list):
        arrays = [_as_numpy(function, f"{name}[{i}]", array) for i, array in enumerate(values)]
        check_list(function, name, [array.shape for array in arrays], [str(array.dtype) for array in arrays])
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return Sets(np.concatenate(arrays), None, offsets)
    item = ITEM[name]
    return Sets(
        _as_numpy(function, name, values),
        None if lengths is None else _int64(function, f"{item}_lengths", lengths),
        None if offsets is None else _int64(function, f"{item}_offsets", offsets),
    )


ITEM = {"queries": "query", "gallery": "gallery", "images": "image", "captions": "caption"}


def split(function: str, name: str, items: Items, lengths: Any) -> tuple[Any, Any]:
    """(values, offsets): offsets are None for a padded array, and for a list, which is left to be joined."""
    if not isinstance(items, (tuple, list)):
        return items, None
    if lengths is not None:
        raise ValueError(f"{function}: {ITEM[name]}_lengths must be None where {name} are ragged")
    if isinstance(items, list):
        return items, None
    if len(items) != 2:
        raise ValueError(f"{function}: {name} must be a pair (values, offsets), got {len(items)} items")
    return items


def check_list(function: str, name: str, shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> None:
    """Whether a list's arrays can be joined."""
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        if len(shape) != 2 or shape[1] != shapes[0][-1]:
            expected = f"[T, {shapes[0][-1]}]" if len(shapes[0]) == 2 else "[T, D]"
            raise ValueError(f"{function}: {name}[{i}] must have shape {expected}, got {list(shape)}")
        if dtype != dtypes[0]:
            raise TypeError(f"{function}: {name}[{i}] must have the dtype {dtypes[0]} of {name}[0], got {dtype}")
