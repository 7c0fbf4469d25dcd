"""Contrastive losses as a torch operator: `torch.ops.pycm.contrastive`, a value and its gradients in one call."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pycm import _C
from pycm._torch_arguments import _check_devices, _check_pair, _check_tangents, _name, _plain, _require, _score_dtype
from pycm._torch_losses_tiled import Arguments, contrastive_tiled

# The loss and the gradients of the four inputs that have one, not yet multiplied with the loss's own.
torch.library.define(
    "pycm::contrastive",
    "(Tensor queries, Tensor gallery, Tensor scale, Tensor bias, Tensor? groups, Tensor? ignored, Tensor? negatives, "
    "str function, str loss, str metric, float margin, bool needs_queries, bool needs_gallery, bool needs_scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
# One of them times the loss's gradient. `source`, the input, is what a second derivative would be taken by.
torch.library.define("pycm::contrastive_backward", "(Tensor grad, Tensor part, Tensor source, str function) -> Tensor")


def contrastive(
    function: str,
    loss: str,
    queries: Tensor,
    gallery: Tensor,
    *,
    metric: str,
    groups: Tensor | None = None,
    ignored: Tensor | None = None,
    negatives: Tensor | None = None,
    margin: float = 0.0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The sum of a loss over its rows, 0-d, differentiable once in queries, gallery, scale and bias."""
    dtype = _score_dtype(queries.dtype)
    scale = torch.ones((), dtype=dtype) if scale is None else scale
    bias = torch.zeros((), dtype=dtype) if bias is None else bias
    wanted = torch.is_grad_enabled()
    needs = (queries.requires_grad, gallery.requires_grad, scale.requires_grad or bias.requires_grad)
    inputs = (queries, gallery, scale, bias, groups, ignored, negatives, function, loss, metric, float(margin))
    if not torch.compiler.is_dynamo_compiling():
        _check_tangents(function, queries=queries, gallery=gallery, scale=scale, bias=bias)
    return cast(Tensor, torch.ops.pycm.contrastive(*inputs, *(wanted and need for need in needs))[0])


def _kernel(*args: Any) -> tuple[Tensor, ...]:
    given = _checked(args)
    queries, scale, bias = given.queries, given.scale, given.bias
    arguments: tuple[Any, ...] = (
        *(given.function, _plain(queries), _plain(given.gallery), given.loss, given.metric, given.margin),
        *(float(scale), float(bias)),
        *(None if part is None else part.contiguous() for part in (given.groups, given.ignored, given.negatives)),
        *(given.needs_queries, given.needs_gallery, given.needs_scale),
        torch.get_num_threads(),
    )
    value, grad_queries, grad_gallery, grad_scale, grad_bias = _C.contrastive(*arguments)
    dtype = _score_dtype(queries.dtype)
    grads = (queries.new_empty(0, dtype=dtype) if grad is None else grad for grad in (grad_queries, grad_gallery))
    return queries.new_tensor(value, dtype=dtype), *grads, scale.new_tensor(grad_scale), bias.new_tensor(grad_bias)


def _checked(args: tuple[Any, ...]) -> Arguments:
    """What needs no values is checked; the kernel says the rest."""
    given = Arguments(*args)
    queries, gallery, function = given.queries, given.gallery, given.function
    _check_pair(function, ("queries", "gallery"), ("[N, D]", "[N, D]"), queries, gallery)
    n, m = queries.shape[0], gallery.shape[0]
    _require(n >= 1, lambda: f"{function}: queries must have at least one row, got shape {list(queries.shape)}")
    if given.negatives is None:
        _require(
            m == n, lambda: f"{function}: gallery must have the queries' {n} rows, got shape {list(gallery.shape)}"
        )
    for name, shape, part, axis, size in (
        ("groups", "[N]", given.groups, 0, n),
        ("ignored", "[E, 2]", given.ignored, 1, 2),
        ("negatives", "[N, K]", given.negatives, 0, n),
    ):
        if part is None:
            continue
        _check_devices(function, **{"queries": queries, name: part})
        if part.dtype != torch.int64:
            raise TypeError(f"{function}: {name} must be an int64 tensor, got {_name(part.dtype)}")
        _require(
            part.ndim == shape.count(",") + 1 and part.shape[axis] == size,
            lambda: f"{function}: {name} must have shape {shape} for the {n} queries, got {list(part.shape)}",  # noqa: B023
        )
    for name, number in (("temperature", given.scale), ("bias", given.bias)):
        if number.ndim != 0 or not number.is_floating_point():
            raise ValueError(
                f"{function}: {name} must be a number or a floating-point tensor of shape [], "
                f"got {_name(number.dtype)} {list(number.shape)}"
            )
    return given


def _cuda_kernel(*args: Any) -> tuple[Tensor, ...]:
    return contrastive_tiled(_checked(args))


@torch.library.register_fake("pycm::contrastive")  # type: ignore[untyped-decorator]
def _fake(*args: Any) -> tuple[Tensor, ...]:
    given = _checked(args)
    dtype = _score_dtype(given.queries.dtype)
    sides = ((given.queries, given.needs_queries), (given.gallery, given.needs_gallery))
    grads = (side.new_empty(side.shape if needed else (0,), dtype=dtype) for side, needed in sides)
    return given.queries.new_empty((), dtype=dtype), *grads, given.scale.new_empty(()), given.bias.new_empty(())


# ---- gradients ----


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.function = inputs[7]


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    sources, parts = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    grads = (
        torch.ops.pycm.contrastive_backward(grad, part, source, ctx.function) if needed else None
        for part, source, needed in zip(parts, sources, ctx.needs_input_grad, strict=False)
    )
    return *grads, *(None,) * 10


def _scaled(grad: Tensor, part: Tensor, source: Tensor, function: str) -> Tensor:
    return (grad.to(part.device, part.dtype) * part).to(source.dtype)


def _scaled_fake(grad: Tensor, part: Tensor, source: Tensor, function: str) -> Tensor:
    return torch.empty_like(part, dtype=source.dtype)


def _setup_once(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.function = inputs[3]


def _once(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(f"{ctx.function}: second derivatives are not implemented")


torch.library.register_autograd("pycm::contrastive", _backward, setup_context=_setup)
torch.library.register_autograd("pycm::contrastive_backward", _once, setup_context=_setup_once)
torch.library.register_fake("pycm::contrastive_backward", _scaled_fake)
torch.library.impl("pycm::contrastive", "CPU", _kernel)
torch.library.impl("pycm::contrastive", "CUDA", _cuda_kernel)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("pycm::contrastive", _device, torch.float32)
    torch.library.impl("pycm::contrastive_backward", _device, _scaled)
