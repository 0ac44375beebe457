"""Log-probs whose backward needs no logits: under a frozen head a token has one gradient, its hidden state's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast.ops._library import differentiable_once
from grpo_fast.ops._linear_token_loss import cross_entropy_rows
from grpo_fast.ops._rows import as_rows


def logps_of_frozen_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    live: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(logps, entropy) of ``hidden`` (..., H), shaped like ``index``; the log-probs alone are differentiable.

    Their gradients by the hidden states are made along with them, two products in all, and kept until the backward,
    in float32, as they are rounded once they are scaled. The other form makes the logits again, and takes three.
    """
    mask, live = (None if x is None else x.reshape(-1).bool() for x in (mask, live))
    weights = hidden.new_ones(index.numel(), dtype=torch.float32) if mask is None else mask.float()
    losses, entropy, gradients = cross_entropy_rows(
        hidden,
        weight,
        bias,
        index,
        mask,
        weights,
        live=live,
        needs=[True, False, False],
        hidden_in_float32=True,
        sparse_grad_tol=None,
        **options,
    )
    logps = _RowGradientsFunction.apply(losses, as_rows(hidden), gradients[0])
    if mask is not None:
        logps = logps.where(mask, 0.0)  # whatever flows back to the others, NaN included, ends here
    return logps.view(index.shape), entropy.view(index.shape)


class _RowGradientsFunction(torch.autograd.Function):
    """``apply(losses, hidden, gradient)`` is ``-losses`` (N,); ``gradient`` (B, T, H) is that of their sum."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, hidden: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return -losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        factor = -upstream.view(*gradient.shape[:-1], 1)
        scaled = torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=ctx.dtype))  # no float32 copy
        return None, scaled.masked_fill_(factor == 0, 0.0), None  # what nothing flows back to may be NaN
