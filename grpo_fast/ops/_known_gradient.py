"""A loss whose gradient was computed along with it: the backward hands it out, scaled only where it must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast.ops._library import launchers, mutating_op, overwritten


class KnownGradientFunction(torch.autograd.Function):
    """``apply(x, gradient, loss, impl)`` is ``loss``, with ``gradient`` as its gradient by ``x``, for one backward.

    The backward scales ``gradient`` in place, so a second one is refused by autograd's own check.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, loss: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.impl = impl
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        _scale_gradient(gradient, upstream, ctx.impl)
        overwritten(gradient)
        return gradient, None, None, None


def _fake_scale_gradient(gradient: Tensor, factor: Tensor, impl: str) -> None:
    return None


@mutating_op("scale_gradient", mutates="gradient", fake=_fake_scale_gradient)
def _scale_gradient(gradient: Tensor, factor: Tensor, impl: str) -> None:
    """Multiply ``gradient`` (..., V) by the scalar ``factor``, unread on the host; 1 costs only a launch."""
    launchers("scale_gradient", impl).scale_gradient(gradient, factor)
