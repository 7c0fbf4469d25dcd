"""Contrastive losses of matched pairs, without the N x N matrix of scores.

    from pycm import losses
    loss = losses.info_nce(images, texts, temperature=0.07)      # images[i] belongs to texts[i], both [N, D]
    loss.backward()

Each is one operator that computes its value and its exact gradients together: blocks of the score matrix are
multiplied, summed along rows and columns, turned into their own gradients and multiplied again, so that memory stays
O(N·D). On the CPU the library's kernels do it; CUDA tensors take the same blocks in torch's own operations. Under
`torch.no_grad` no gradient is computed. Differentiable once; `torch.compile` traces them; two runs give the same bits,
on the CPU whatever the number of threads.

Shared by all: `queries` and `gallery` are float32, float16, bfloat16 or float64 tensors ``[N, D]`` of one dtype and
device, N >= 1, any strides; low precision is computed in float32. The loss is 0-d, float32 (float64 for float64), its
gradients of the inputs' dtypes. `metric` is ``cosine`` (0 for a zero row, which gets no gradient), ``dot`` or
``pearson``. A NaN score that counts makes the loss NaN. Among equal hardest negatives the one of the lowest index gets
the gradient.

Two arguments say which scores of other rows are no negatives; one of them may be given:

* `groups`, int64 ``[N]``: rows of one group are no negatives of each other (captions of one image, clips of one label).
* `ignored`, int64 ``[E, 2]``: pairs (i, j), i != j, of a query and a row of the gallery whose score is left out, in any
  order. That of (j, i) still counts. It says what no groups can: that one caption is right of two images whose other
  captions are wrong of each other. O(E log E) beside the rest (for CUDA tensors O(E) a block).
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

from pycm._optional import require

require("torch", "torch", "pycm.losses")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from pycm._torch_arguments import _integers, _score_dtype  # noqa: E402
from pycm._torch_losses import contrastive  # noqa: E402

__all__ = ["InfoNCE", "MaxHinge", "SigmoidLoss", "Triplet", "info_nce", "max_hinge", "sigmoid_loss", "triplet"]

LossMetric: TypeAlias = Literal["cosine", "dot", "pearson"]
_METRICS = ("cosine", "dot", "pearson")


def max_hinge(
    queries: Tensor,
    gallery: Tensor,
    *,
    margin: float = 0.2,
    hardest: bool = True,
    groups: Any = None,
    ignored: Any = None,
    metric: LossMetric = "cosine",
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The hinge of VSE++: each row against its hardest negative, in both directions.

    ``sum_i max(0, margin + max_j s_ij - s_ii) + sum_j max(0, margin + max_i s_ij - s_jj)``, over N for ``mean``.

    Args:
        queries, gallery, groups, ignored, metric: as the module says.
        margin: by which a pair should score above its negatives.
        hardest: False sums over all negatives, not their maximum. From a random start the maximum may collapse all rows
            into one; an epoch of the sum first avoids it.
        reduction: ``mean`` over the N pairs, or ``sum``, as the original has it.

    Raises:
        TypeError, ValueError: tensors, groups, pairs or options that do not fit.

    O(N²·D) time, a third of it for ``hardest``, whose gradient touches 2 N pairs alone and takes no product.

    Faghri et al. 2018, "VSE++: Improving Visual-Semantic Embeddings with Hard Negatives", arXiv:1707.05612.
    """
    name = "max_hinge"
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction must be mean or sum, got {reduction!r}")
    total = contrastive(
        name, "max_hinge" if hardest else "sum_hinge", queries, gallery, metric=_metric(name, metric),
        **_left_out(name, groups, ignored, queries), margin=_number(name, "margin", margin),
    )  # fmt: skip
    return total if reduction == "sum" else total / queries.shape[0]


def info_nce(
    queries: Tensor,
    gallery: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    groups: Any = None,
    ignored: Any = None,
    metric: LossMetric = "cosine",
) -> Tensor:
    """Cross entropy of each pair among its row's and among its column's, CLIP's loss.

    ``-1/(2N) sum_i (log softmax_j(x_ij)_i + log softmax_j(x_ji)_i)`` with ``x = s / temperature``.

    Args:
        queries, gallery, groups, ignored, metric: as the module says; what is no negative is left out of the softmax.
        temperature: positive; a tensor of shape [] gets its gradient.

    Raises:
        TypeError, ValueError: tensors, groups, pairs or options that do not fit.

    O(N²·D) time; for N above 2048 the scores are computed twice.

    van den Oord et al. 2018, arXiv:1807.03748; Radford et al. 2021 (CLIP), arXiv:2103.00020.
    """
    name = "info_nce"
    scale = _inverse(name, temperature, queries)
    total = contrastive(
        name, "info_nce", queries, gallery, metric=_metric(name, metric), **_left_out(name, groups, ignored, queries),
        scale=scale,
    )  # fmt: skip
    return total / (2 * queries.shape[0])


def sigmoid_loss(
    queries: Tensor,
    gallery: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    groups: Any = None,
    ignored: Any = None,
    metric: LossMetric = "cosine",
) -> Tensor:
    """SigLIP's loss: every pair by itself, matched or not.

    ``1/N sum_ij log(1 + exp(-z_ij x_ij))`` with ``x = s / temperature + bias``, z = 1 where i = j, else -1.

    Args:
        queries, gallery, groups, ignored, metric: as the module says; pairs that are no negatives count neither way.
        temperature, bias: numbers, or tensors of shape [], which get their gradients. The original's t is
            1 / temperature; it starts from t = 10 and bias = -10.

    Raises:
        TypeError, ValueError: tensors, groups, pairs or options that do not fit.

    Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343.
    """
    name = "sigmoid_loss"
    total = contrastive(
        name, "sigmoid", queries, gallery, metric=_metric(name, metric), **_left_out(name, groups, ignored, queries),
        scale=_inverse(name, temperature, queries), bias=_scalar(name, "bias", bias, queries),
    )  # fmt: skip
    return total / queries.shape[0]


def triplet(
    queries: Tensor,
    gallery: Tensor,
    *,
    margin: float = 0.2,
    negatives: Literal["semi-hard", "hard"] | Tensor = "semi-hard",
    groups: Any = None,
    ignored: Any = None,
    metric: LossMetric = "cosine",
) -> Tensor:
    """Triplets ``max(0, margin + s(query, negative) - s(query, positive))`` with mined negatives.

    Args:
        queries, groups, ignored, metric: as the module says.
        gallery: ``[N, D]``; where `negatives` are given ``[M, D]``, M >= N, the first N the queries' own.
        margin: of scores. A squared Euclidean distance of rows of norm 1 is 2 - 2 cosine: FaceNet's margin is twice
            this one.
        negatives: which negatives make the triplets.

            * ``semi-hard``: of each row the hardest of the negatives that score below its positive, in both
              directions. A row without one adds nothing.
            * ``hard``: of each row the hardest, in both directions; the same as `max_hinge`.
            * integers ``[N, K]``: rows of the gallery mined beforehand for each query, such as
              ``pycm.mine_hard_negatives(...).indices``; -1 for none.

    Returns:
        The sum over the triplets over N, or for given negatives their mean.

    Raises:
        TypeError, ValueError: tensors, groups, pairs or options that do not fit, or do not go together.

    Schroff et al. 2015, "FaceNet", arXiv:1503.03832.
    """
    name = "triplet"
    if isinstance(negatives, str):
        if negatives not in ("semi-hard", "hard"):
            raise ValueError(f"{name}: negatives must be semi-hard, hard or a tensor, got {negatives!r}")
        loss = "semi_hard" if negatives == "semi-hard" else "max_hinge"
        total = contrastive(
            name, loss, queries, gallery, metric=_metric(name, metric), **_left_out(name, groups, ignored, queries),
            margin=_number(name, "margin", margin),
        )  # fmt: skip
        return total / queries.shape[0]
    for option, value in (("groups", groups), ("ignored", ignored)):
        if value is not None:
            raise ValueError(f"{name}: {option} must be None where negatives are given")
    rows = _integers(name, "negatives", torch.as_tensor(negatives, device=queries.device))
    total = contrastive(
        name, "listed", queries, gallery, metric=_metric(name, metric), negatives=rows,
        margin=_number(name, "margin", margin),
    )  # fmt: skip
    return total / (rows >= 0).sum().clamp(min=1)


# ---- modules ----


class MaxHinge(nn.Module):
    """`max_hinge` as a module.

    Args:
        margin, hardest, metric: as `max_hinge`. `hardest` is an attribute: set it after the warm-up.
    """

    def __init__(self, margin: float = 0.2, hardest: bool = True, metric: LossMetric = "cosine") -> None:
        super().__init__()
        self.margin, self.hardest, self.metric = margin, hardest, metric

    def forward(self, queries: Tensor, gallery: Tensor, groups: Any = None, ignored: Any = None) -> Tensor:
        return max_hinge(
            queries, gallery, margin=self.margin, hardest=self.hardest, groups=groups, ignored=ignored,
            metric=self.metric,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"margin={self.margin}, hardest={self.hardest}, metric={self.metric!r}"


class InfoNCE(nn.Module):
    """`info_nce` with a learned temperature.

    Args:
        temperature: to begin with.
        learned: False keeps it.
        least: below which it does not fall; CLIP's is 0.01.
        metric: as `info_nce`.

    Attributes:
        log_temperature: the parameter.
    """

    def __init__(
        self, temperature: float = 0.07, learned: bool = True, least: float = 0.01, metric: LossMetric = "cosine"
    ) -> None:
        super().__init__()
        _positive("InfoNCE", "temperature", temperature)
        _positive("InfoNCE", "least", least)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learned)
        self.least, self.metric = least, metric

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp().clamp(min=self.least)

    def forward(self, queries: Tensor, gallery: Tensor, groups: Any = None, ignored: Any = None) -> Tensor:
        return info_nce(
            queries, gallery, temperature=self.temperature, groups=groups, ignored=ignored, metric=self.metric
        )

    def extra_repr(self) -> str:
        return f"least={self.least}, metric={self.metric!r}"


class SigmoidLoss(nn.Module):
    """`sigmoid_loss` with learned temperature and bias.

    Args:
        temperature, bias: to begin with.
        learned: False keeps them.
        metric: as `sigmoid_loss`.

    Attributes:
        log_temperature, bias: the parameters.
    """

    def __init__(
        self, temperature: float = 0.1, bias: float = -10.0, learned: bool = True, metric: LossMetric = "cosine"
    ) -> None:
        super().__init__()
        _positive("SigmoidLoss", "temperature", temperature)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learned)
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learned)
        self.metric = metric

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def forward(self, queries: Tensor, gallery: Tensor, groups: Any = None, ignored: Any = None) -> Tensor:
        return sigmoid_loss(
            queries, gallery, temperature=self.temperature, bias=self.bias, groups=groups, ignored=ignored,
            metric=self.metric,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}"


class Triplet(nn.Module):
    """`triplet` as a module.

    Args:
        margin, metric: as `triplet`.
        negatives: ``semi-hard`` or ``hard``, where the call gives none.
    """

    def __init__(
        self,
        margin: float = 0.2,
        negatives: Literal["semi-hard", "hard"] = "semi-hard",
        metric: LossMetric = "cosine",
    ) -> None:
        super().__init__()
        self.margin, self.negatives, self.metric = margin, negatives, metric

    def forward(
        self,
        queries: Tensor,
        gallery: Tensor,
        groups: Any = None,
        negatives: Tensor | None = None,
        ignored: Any = None,
    ) -> Tensor:
        return triplet(
            queries, gallery, margin=self.margin, negatives=self.negatives if negatives is None else negatives,
            groups=groups, ignored=ignored, metric=self.metric,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"margin={self.margin}, negatives={self.negatives!r}, metric={self.metric!r}"


# ---- arguments ----


def _metric(function: str, metric: str) -> str:
    if metric not in _METRICS:
        raise ValueError(f"{function}: metric must be one of {', '.join(_METRICS)}, got {metric!r}")
    return metric


def _left_out(function: str, groups: Any, ignored: Any, queries: Tensor) -> Any:
    """Whichever of the two was given, by name."""
    given = {name: value for name, value in (("groups", groups), ("ignored", ignored)) if value is not None}
    if len(given) > 1:
        raise ValueError(f"{function}: groups and ignored do not go together")
    return {
        name: _integers(function, name, torch.as_tensor(value, device=queries.device)) for name, value in given.items()
    }


def _number(function: str, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}") from None


def _positive(function: str, name: str, value: Any) -> None:
    if not _number(function, name, value) > 0:
        raise ValueError(f"{function}: {name} must be positive, got {value}")


def _scalar(function: str, name: str, value: Any, like: Tensor) -> Tensor:
    """0-d, of the scores' dtype where it is a number."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(_number(function, name, value), dtype=_score_dtype(like.dtype), device=like.device)


def _inverse(function: str, temperature: Any, like: Tensor) -> Tensor:
    if not isinstance(temperature, Tensor):
        _positive(function, "temperature", temperature)
    return 1 / _scalar(function, "temperature", temperature, like)
