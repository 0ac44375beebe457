"""The kernels that work on rows of logits, by implementation: all that the ops do not leave to torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from grpo_fast.ops._rows import HiddenRows

#: Whether the kernels from hidden states are to make a gradient, and how.
Gradient = Literal["none", "by exponentials", "by the product"]


class LinearKernels(NamedTuple):
    """The same from hidden states, where no logits are kept."""

    takes: Callable[..., bool]  # (hidden, weight)
    product: Callable[..., Any]  # of the two; what follows is made from it
    loss_rows: Callable[..., Any]
    logps: Callable[..., Any]
    exponentials: Callable[..., Any]  # and the slopes of their gradient by those of log-probs and entropy
    logps_backward: Callable[..., Any]  # the gradient of the logits by another product
    sum_of_rows: Callable[..., Any]  # a product with sparse rows


class RowKernels(NamedTuple):
    """Each as documented where it is defined for Triton."""

    loss_rows: Callable[..., Any]  # loss terms, and the gradient of the logits
    sum_rows: Callable[..., Any]  # loss and metrics from what the rows left
    logps: Callable[..., Any]  # log-probs and entropy
    logps_backward: Callable[..., Any]  # the gradient of the logits from those of log-probs and entropy
    scale_gradient: Callable[..., Any]  # a gradient times a scalar that the host does not know
    linear: LinearKernels | None = None
    divergence_rows: Callable[..., Any] | None = None  # of a student's logits from a teacher's, and its gradient


def row_kernels(impl: str) -> RowKernels:
    """The kernels of ``impl``, which ``backend.choose`` has found able to run."""
    if impl == "cuda":
        from grpo_fast import cuda, cuda_linear

        return RowKernels(
            cuda.grpo_loss_rows,
            cuda.sum_rows,
            cuda.selective_log_softmax_fwd,
            cuda.selective_log_softmax_bwd,
            cuda.scale_gradient,
            LinearKernels(
                cuda_linear.takes,
                cuda_linear.linear_product,
                cuda_linear.linear_loss_rows,
                cuda_linear.linear_logps_fwd,
                cuda_linear.linear_exponentials,
                cuda_linear.linear_logps_bwd,
                cuda_linear.sum_of_rows,
            ),
        )
    assert impl == "triton", impl
    from grpo_fast.kernels._results import sum_rows
    from grpo_fast.kernels.distillation_loss import divergence_rows
    from grpo_fast.kernels.grpo_loss import grpo_loss_rows
    from grpo_fast.kernels.scale_gradient import scale_gradient
    from grpo_fast.kernels.selective_log_softmax import selective_log_softmax_bwd, selective_log_softmax_fwd

    return RowKernels(
        grpo_loss_rows,
        sum_rows,
        selective_log_softmax_fwd,
        selective_log_softmax_bwd,
        scale_gradient,
        divergence_rows=divergence_rows,
    )


def linear_kernels(
    kernels: RowKernels,
    states: HiddenRows,
    weight: Tensor,
    label_smoothing: float,
    softcap: float | None,
    sharded: bool = False,
    *,
    gradient: Gradient,
) -> LinearKernels | None:
    """Those that take these hidden states and this head, if there are any.

    They do not know label smoothing, and make gradients in bfloat16. The exponentials that they keep where a row's
    sum is not known in time have no digits for the slope of a softcap near the cap, and their range is about the
    sampled token, which a row whose token is in another shard of the vocabulary does not have.
    """
    linear = kernels.linear
    if linear is None or label_smoothing != 0.0:
        return None
    if gradient != "none" and states.dtype != torch.bfloat16:
        return None
    if gradient == "by exponentials" and (softcap is not None or sharded):
        return None
    # One row stands for all; of none, an address would say nothing.
    if not linear.takes(states[slice(0, min(1, states.rows.total))], weight):
        return None
    return linear
