"""Cross entropy from hidden states, for supervised training on reasoning traces."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grpo_fast import backend
from grpo_fast.ops._checks import FLOATS, IDS, Shapes, check_choice, check_logits_options, check_positive
from grpo_fast.ops._chunks import wanted
from grpo_fast.ops._linear_logps import linear_logps
from grpo_fast.ops._linear_token_loss import check_weight_grad_out, cross_entropy_rows, known_gradients
from grpo_fast.ops._sparse import check_sparse_grad_tol
from grpo_fast.ops._vocabulary_parallel import local_shards
from grpo_fast.ops._workspace import check_workspace
from grpo_fast.ops.linear_selective_log_softmax import check_head, most_precise

Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    num_items_in_batch: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    weight_grad_out: Tensor | None = None,
    workspace_bytes: int | None = None,
    allow_sync: bool = True,
    sparse_grad_tol: float | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor:
    """Cross entropy of the logits ``hidden @ weight.T + bias``, which are computed in chunks and dropped.

    With a reduction, the kernels have loss and gradients from one sweep over the chunks, like ``linear_grpo_loss``:
    at most three matrix products, and one backward. ``"none"`` is ``linear_selective_log_softmax``.

    Args:
        hidden: (..., H) float; ``hidden[..., t, :]`` predicts ``labels[..., t]``: shift before the call.
        weight: (V, H) float, the head.
        labels: (...,) int; ``ignore_index`` is not projected and adds nothing. Others outside [0, V) give NaN.
        bias: (V,) float.
        ignore_index: The label to skip.
        label_smoothing: In [0, 1): the weight of the mean over the vocabulary beside the label, as in
            ``torch.nn.functional.cross_entropy``. The kernels have it without ``softcap`` only.
        reduction: ``"mean"`` over the labels that count (0 when there are none), ``"sum"``, or ``"none"``.
        num_items_in_batch: With ``"mean"``, the number to divide by instead, a number or a 0-d tensor.
        temperature, logit_scale, softcap, impl: As in ``selective_log_softmax``.
        weight_grad_out, workspace_bytes, allow_sync: As in ``linear_grpo_loss``; the first needs a reduction.
        sparse_grad_tol: As in ``linear_grpo_loss``.
        process_group: ``weight`` and ``bias`` are this rank's shard of the vocabulary, as in
            ``linear_selective_log_softmax``. There is then no sweep: it is that op, without ``label_smoothing``.

    Returns:
        A scalar, or (...,) with ``"none"``, in nats; float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: An argument is wrong; the message names it.
        RuntimeError: ``impl`` cannot run here.
    """
    group, (weight, bias) = local_shards(process_group, 0, weight=weight, bias=bias)
    shapes = Shapes()
    token_dims = tuple(f"dim {i}" for i in range(hidden.dim() - 1)) if isinstance(hidden, Tensor) else ()
    check_head(shapes, hidden, weight, bias, token_dims, group=group)
    shapes.check("labels", labels, token_dims, dtypes=IDS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {ignore_index!r}, want an int")
    check_choice("reduction", reduction, get_args(Reduction))
    check_num_items(shapes, num_items_in_batch, reduction)
    check_logits_options(temperature, logit_scale, softcap)
    _check_label_smoothing(label_smoothing)
    workspace = check_workspace(workspace_bytes)
    implementation = backend.choose("linear_cross_entropy", impl, most_precise(hidden, weight))
    if implementation != "torch" and label_smoothing and softcap is not None:
        raise ValueError(f"label_smoothing: got {label_smoothing} with a softcap, want 0 or impl='torch'")
    if group is not None and label_smoothing:
        raise ValueError(f"label_smoothing: got {label_smoothing} with a process_group, want 0")
    in_one_sweep = implementation != "torch" and group is None and reduction != "none"
    check_weight_grad_out(shapes, weight_grad_out, possible=in_one_sweep)
    check_sparse_grad_tol(
        sparse_grad_tol,
        hidden,
        weight,
        impl=implementation,
        allow_sync=allow_sync,
        weight_grad_out=weight_grad_out,
        softcap=softcap,
        label_smoothing=label_smoothing,
        process_group=group,
    )

    mask = labels != ignore_index
    logits_options: dict[str, Any] = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    chunk_options: dict[str, Any] = dict(workspace_bytes=workspace, allow_sync=allow_sync, impl=implementation)
    chunk_options |= {"label_smoothing": label_smoothing, "sparse_grad_tol": sparse_grad_tol}
    if not in_one_sweep:
        logps, _ = linear_logps(
            hidden, weight, labels, bias=bias, mask=mask, group=group, **logits_options, **chunk_options
        )
        return reduce_tokens(-logps, mask, reduction, num_items_in_batch)

    mask = mask.reshape(-1)
    token_weights = mask / (divisor(mask, num_items_in_batch) if reduction == "mean" else 1.0)
    needs = wanted(hidden, weight, bias)
    losses, _, gradients = cross_entropy_rows(
        hidden,
        weight,
        bias,
        labels,
        mask,
        token_weights,
        weight_grad_out,
        needs=needs,
        **logits_options,
        **chunk_options,
    )
    inputs = (hidden, weight, bias)
    return known_gradients(losses.sum(), inputs, gradients, needs, weight_grad_out, implementation)


def _check_label_smoothing(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"label_smoothing: got {value!r}, want a number")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"label_smoothing: got {value}, want at least 0 and less than 1")


def check_num_items(shapes: Shapes, num_items_in_batch: object, reduction: str) -> None:
    """Check the divisor of a mean."""
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items_in_batch: got one with reduction={reduction!r}, want it only with 'mean'")
    if isinstance(num_items_in_batch, Tensor):
        shapes.check("num_items_in_batch", num_items_in_batch, (), dtypes=FLOATS + IDS)
    else:
        check_positive("num_items_in_batch", num_items_in_batch)


def reduce_tokens(
    losses: Tensor, mask: Tensor | None, reduction: str, num_items_in_batch: float | Tensor | None
) -> Tensor:
    """Reduce per-token losses that are already 0 where ``mask`` is."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / divisor(losses if mask is None else mask.bool(), num_items_in_batch)


def divisor(x: Tensor, num_items_in_batch: float | Tensor | None) -> float | Tensor:
    """What a mean divides by: the given number, or that of the tokens that ``x`` keeps if it is a mask."""
    if num_items_in_batch is not None:
        return num_items_in_batch
    return x.sum().clamp(min=1) if x.dtype == torch.bool else max(x.numel(), 1)
