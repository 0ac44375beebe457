"""Registration of ops that have no derivative of their own.

``torch.library.custom_op`` does the same with more checks at each call; over the thirty arguments of the loss those
take longer than its launches do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def plain_op(
    name: str, *, fake: Callable[..., Any], mutates: str | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the op ``grpo_fast::name``, which may overwrite its argument ``mutates``.

    ``fake`` takes the same arguments and returns results of the right shapes.
    """

    def register(fn: Callable[..., Any]) -> Any:
        qualified = f"grpo_fast::{name}"
        torch.library.define(qualified, torch.library.infer_schema(fn, mutates_args=(mutates,) if mutates else ()))
        torch.library.impl(qualified, ("cpu", "cuda"), fn)
        torch.library.register_fake(qualified, fake)
        return getattr(torch.ops.grpo_fast, name).default

    return register


def gradient_buffer(x: Tensor) -> Tensor:
    """An uninitialized tensor for the gradient of ``x`` (B, T, V), in whose memory rows lie as they do in ``x``.

    That is, each begins as far off a multiple of 16 bytes, so that a kernel writes as many bytes at once as it reads.
    For logits that are contiguous, or whose rows begin at such multiples, it is what ``torch.empty_like`` gives.
    """
    unit = 16 // x.element_size()
    if torch.compiler.is_compiling() or x.stride(-1) != 1 or (x.is_contiguous() and x.storage_offset() % unit == 0):
        return torch.empty_like(x)
    offset = x.storage_offset() % unit
    B, T, V = x.shape
    stride_t = V + (x.stride(1) - V) % unit
    stride_b = T * stride_t + (x.stride(0) - T * stride_t) % unit
    return x.new_empty(offset + B * stride_b).as_strided((B, T, V), (stride_b, stride_t, 1), offset)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable``, for gradients that depend on the inputs too.

    Torch's own makes a second derivative an error where it would pass the upstream gradient. With a constant one, as
    of a loss, it gives a constant, and the second derivative would lack this part of it unseen.
    """
    once = once_differentiable(backward)

    def wrapper(ctx: Any, *upstream: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a graph of the derivative was asked for
            upstream = tuple(x if x is None else x.detach().requires_grad_() for x in upstream)
        return once(ctx, *upstream)

    return wrapper


def overwritten(x: Tensor) -> None:
    """Tell autograd that such an op has overwritten ``x``, so that what was saved of it is not used unseen."""
    if not torch.compiler.is_compiling():  # there the compiler sees it in the schema
        torch.autograd.graph.increment_version(x)
