"""Named protocols: which items are queries and gallery, which match, how figures are averaged.

All take scores [V, T] of V images or videos ("visuals") with T texts, larger is better, or (visuals [V, D], texts [T,
D], metric), which is ranked without the matrix. Figures are those of `retrieval_metrics`, unless `strict_compat` asks
for an original's own arithmetic: True for the protocol's, or its name: "vsepp" (VSE++, SCAN and VSE∞), "open_clip",
"clip4clip", "mmt", "frozen" (Frozen in Time). docs/evaluation.md says what differs. Under it there are recalls, ranks
and MRR only, `ties` has no effect, and a constant matrix may give any number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from .._rows import as_numpy
from ._inputs import Int64, Scores, read_ks, read_scores
from .metrics import RetrievalMetrics, mean_of_folds, metrics_of
from .published import Original, published_metrics, rank_as

if TYPE_CHECKING:
    from ..ranking import Ties

_KS = (1, 5, 10)


class CrossModalMetrics(NamedTuple):
    """Both directions: images or videos as queries for texts, and texts as queries for them."""

    visual_to_text: RetrievalMetrics
    text_to_visual: RetrievalMetrics

    @property
    def rsum(self) -> float:
        """R@1 + R@5 + R@10 of both directions, in percent: 600 is perfect."""
        try:
            return 100 * sum(side.recall_at_k[k] for side in self for k in _KS)
        except KeyError as error:
            raise ValueError(f"CrossModalMetrics.rsum: ks must include 1, 5 and 10, and {error} is missing") from None

    def __str__(self) -> str:
        return f"visual -> text: {self.visual_to_text}\ntext -> visual: {self.text_to_visual}"


def one_to_one(
    scores: Any, *, ks: Sequence[int] = _KS, ties: Ties = "realistic", strict_compat: bool | Original = False
) -> CrossModalMetrics:
    """N visuals with one text each: text i belongs to visual i (MSR-VTT 1k-A, LSMDC, open_clip's validation).

    Args:
        scores: [N, N], or (visuals, texts, metric); see the module.
        ks, ties: as in `retrieval_metrics`.
        strict_compat: True means "open_clip".
    """
    read = read_scores("one_to_one", scores)
    if read.shape[0] != read.shape[1]:
        raise ValueError(f"one_to_one: scores must have as many rows as columns, got {list(read.shape)}")
    return _evaluate(read, np.arange(read.shape[0]), ks, ties, strict_compat, "open_clip", get_args(Original))


def five_captions(
    scores: Any,
    *,
    captions: int = 5,
    ks: Sequence[int] = _KS,
    ties: Ties = "realistic",
    strict_compat: bool | Original = False,
) -> CrossModalMetrics:
    """Images with five captions each, those of image i in columns 5i to 5i + 4: Flickr8K, Flickr30K.

    The protocol of VSE++ (Faghri et al. 2018), SCAN (Lee et al. 2018) and VSE∞ (Chen et al. 2021). An image's rank is
    that of its best caption. mAP, R-precision and mAP@R look at all five.

    Args:
        scores: [N, 5 N], or (images [N, D], captions [5 N, D], metric). Image rows that VSE++'s loader repeats five
            times must be thinned first: images[::5].
        captions: captions of each image, where they are not five.
        ks, ties: as in `retrieval_metrics`.
        strict_compat: True means "vsepp".
    """
    return _captions("five_captions", scores, captions, 1, ks, ties, strict_compat)


def coco_5k(
    scores: Any, *, ks: Sequence[int] = _KS, ties: Ties = "realistic", strict_compat: bool | Original = False
) -> CrossModalMetrics:
    """MS-COCO's 5000 test images (Karpathy's split), the first five captions of each, ranked all together.

    Arguments as `five_captions`; scores [5000, 25000].
    """
    return _captions("coco_5k", scores, 5, 1, ks, ties, strict_compat, images=5000)


def coco_1k(
    scores: Any, *, ks: Sequence[int] = _KS, ties: Ties = "realistic", strict_compat: bool | Original = False
) -> CrossModalMetrics:
    """COCO's 5000 test images in five folds of 1000 consecutive ones, each ranked by itself; figures are folds' means.

    Arguments as `coco_5k`. The directions' `folds` hold each fold's figures.
    """
    return _captions("coco_1k", scores, 5, 5, ks, ties, strict_compat, images=5000)


def multi_caption_video(
    scores: Any,
    owner: Any,
    *,
    ks: Sequence[int] = _KS,
    ties: Ties = "realistic",
    strict_compat: bool | Original = False,
) -> CrossModalMetrics:
    """Videos with any number of captions each: MSR-VTT full, MSVD, VATEX.

    The protocol of MMT (Gabeur et al. 2020) and Frozen in Time (Bain et al. 2021). Each caption is a query for videos,
    and a video's rank is that of its best caption among all captions.

    Args:
        scores: [V, T], or (videos, captions, metric). The originals hold the transpose. Leave out the columns of
            missing captions instead of masking them.
        owner: ints [T], the video that each caption describes; every video must have one.
        ks, ties: as in `retrieval_metrics`.
        strict_compat: True means "mmt". "clip4clip" ranks a video among videos, by the best caption of each.
    """
    read = read_scores("multi_caption_video", scores)
    owners = as_numpy(owner)
    if owners.dtype.kind not in "iu":
        raise TypeError(f"multi_caption_video: owner must be integers, got {owners.dtype}")
    v, t = read.shape
    if owners.shape != (t,):
        raise ValueError(f"multi_caption_video: owner must have shape [{t}], got {list(owners.shape)}")
    if owners.min() < 0 or owners.max() >= v:
        raise ValueError(f"multi_caption_video: owner must be in [0, {v - 1}], got {owners.min()} to {owners.max()}")
    missing = np.flatnonzero(np.bincount(owners, minlength=v) == 0)
    if len(missing):
        raise ValueError(f"multi_caption_video: owner must name every video, and {missing[0]} has no caption")
    known: tuple[Original, ...] = ("vsepp", "clip4clip", "mmt", "frozen")
    return _evaluate(read, owners.astype(np.int64), ks, ties, strict_compat, "mmt", known)


def _captions(
    function: str,
    scores: Any,
    captions: int,
    folds: int,
    ks: Sequence[int],
    ties: Ties,
    strict_compat: bool | Original,
    images: int | None = None,
) -> CrossModalMetrics:
    read = read_scores(function, scores)
    n, texts = read.shape
    if texts != captions * n or (images is not None and n != images):
        wanted = f"[{images}, {captions * images}]" if images else f"[N, {captions} N]"
        raise ValueError(f"{function}: scores must have shape {wanted}, got {[n, texts]}")
    size = n // folds
    owner = np.repeat(np.arange(size), captions)
    known: tuple[Original, ...] = ("vsepp", "clip4clip", "mmt", "frozen")
    parts = [
        _evaluate(
            read.block(slice(i * size, (i + 1) * size), slice(i * size * captions, (i + 1) * size * captions)),
            owner,
            ks,
            ties,
            strict_compat,
            "vsepp",
            known,
        )
        for i in range(folds)
    ]
    if folds == 1:
        return parts[0]
    return CrossModalMetrics(*(mean_of_folds(side) for side in zip(*parts, strict=True)))


def _evaluate(
    scores: Scores,
    owner: Int64,
    ks: Sequence[int],
    ties: Ties,
    strict_compat: bool | Original,
    default: Original,
    known: Sequence[str],
) -> CrossModalMetrics:
    if strict_compat is not False:
        original = default if strict_compat is True else strict_compat
        if original not in known:
            raise ValueError(
                f"{scores.function}: strict_compat must be a bool or one of {', '.join(known)}, got {original!r}"
            )
        cutoffs = read_ks(scores.function, ks)
        both = rank_as(original, scores, owner)
        return CrossModalMetrics(*(published_metrics(ranking, cutoffs) for ranking in both))
    order = np.argsort(owner, kind="stable")
    offsets = np.searchsorted(owner[order], np.arange(scores.shape[0] + 1))
    return CrossModalMetrics(
        metrics_of(scores, (offsets, order), ks, ties), metrics_of(scores.transposed, owner, ks, ties)
    )
