"""A loss whose gradient was computed along with it: the backward hands it out, scaled only where it must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast.ops._library import differentiable_once, overwritten, plain_op
from grpo_fast.ops._row_kernels import row_kernels
from grpo_fast.ops._rows import as_rows


class KnownGradientFunction(torch.autograd.Function):
    """``apply(loss, impl, x, gradient, ...)`` is ``loss``, with ``gradient`` as its gradient by ``x``, once.

    Any number of such pairs. The backward scales each ``gradient`` in place, so a second one is refused by autograd's
    own check; what is kept in another precision than its ``x`` is rounded after.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, impl: str, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[1::2])
        ctx.dtypes = [x.dtype for x in pairs[::2]]
        ctx.impl = impl
        return loss.view_as(loss)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None, None]
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            _scale_gradient(as_rows(gradient), upstream, ctx.impl)
            overwritten(gradient)
            grads += [gradient.to(dtype), None]
        return tuple(grads)


def _fake_scale_gradient(gradient: Tensor, factor: Tensor, impl: str) -> None:
    return None


@plain_op("scale_gradient", mutates="gradient", fake=_fake_scale_gradient)
def _scale_gradient(gradient: Tensor, factor: Tensor, impl: str) -> None:
    """Multiply ``gradient`` (..., V) by the scalar ``factor``, unread on the host; 1 costs only a launch."""
    row_kernels(impl).scale_gradient(gradient, factor)
