"""The kernels that work on rows of logits, by implementation: all that the ops do not leave to torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class LinearLogps(NamedTuple):
    """Log-probs from hidden states, without logits."""

    takes: Callable[..., bool]  # (hidden, weight)
    forward: Callable[..., Any]


class RowKernels(NamedTuple):
    """Each as documented where it is defined for Triton."""

    loss_rows: Callable[..., Any]  # loss terms, and the gradient of the logits
    sum_rows: Callable[..., Any]  # loss and metrics from what the rows left
    logps: Callable[..., Any]  # log-probs and entropy
    logps_backward: Callable[..., Any]  # the gradient of the logits from those of log-probs and entropy
    scale_gradient: Callable[..., Any]  # a gradient times a scalar that the host does not know
    linear_logps: LinearLogps | None = None


def row_kernels(impl: str) -> RowKernels:
    """The kernels of ``impl``, which ``backend.choose`` has found able to run."""
    if impl == "cuda":
        from grpo_fast import cuda

        return RowKernels(
            cuda.grpo_loss_rows,
            cuda.sum_rows,
            cuda.selective_log_softmax_fwd,
            cuda.selective_log_softmax_bwd,
            cuda.scale_gradient,
            LinearLogps(cuda.has_linear_logps, cuda.linear_logps_fwd),
        )
    assert impl == "triton", impl
    from grpo_fast.kernels._results import sum_rows
    from grpo_fast.kernels.grpo_loss import grpo_loss_rows
    from grpo_fast.kernels.scale_gradient import scale_gradient
    from grpo_fast.kernels.selective_log_softmax import selective_log_softmax_bwd, selective_log_softmax_fwd

    return RowKernels(grpo_loss_rows, sum_rows, selective_log_softmax_fwd, selective_log_softmax_bwd, scale_gradient)
