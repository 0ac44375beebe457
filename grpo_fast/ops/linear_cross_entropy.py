"""Cross entropy from hidden states, for supervised training on reasoning traces."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from grpo_fast import backend
from grpo_fast.ops._checks import FLOATS, IDS, Shapes, check_choice, check_logits_options, check_positive
from grpo_fast.ops.linear_selective_log_softmax import check_head
from grpo_fast.reference import linear_logps_ref

Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items_in_batch: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Cross entropy of the logits ``hidden @ weight.T + bias``, which are computed in chunks and dropped.

    Args:
        hidden: (..., H) float; ``hidden[..., t, :]`` predicts ``labels[..., t]``: shift before the call.
        weight: (V, H) float, the head.
        labels: (...,) int; ``ignore_index`` is not projected and adds nothing. Others outside [0, V) give NaN.
        bias: (V,) float.
        ignore_index: The label to skip.
        reduction: ``"mean"`` over the labels that count (0 when there are none), ``"sum"``, or ``"none"``.
        num_items_in_batch: With ``"mean"``, the number to divide by instead, a number or a 0-d tensor.
        temperature, logit_scale, softcap, impl: As in ``selective_log_softmax``.

    Returns:
        A scalar, or (...,) with ``"none"``, in nats; float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: An argument is wrong; the message names it.
        RuntimeError: ``impl`` cannot run here.
    """
    shapes = Shapes()
    token_dims = tuple(f"dim {i}" for i in range(hidden.dim() - 1)) if isinstance(hidden, Tensor) else ()
    check_head(shapes, hidden, weight, bias, token_dims)
    shapes.check("labels", labels, token_dims, dtypes=IDS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {ignore_index!r}, want an int")
    check_choice("reduction", reduction, get_args(Reduction))
    check_num_items(shapes, num_items_in_batch, reduction)
    check_logits_options(temperature, logit_scale, softcap)
    backend.choose("linear_cross_entropy", impl, hidden)

    mask = labels != ignore_index
    logps, _ = linear_logps_ref(
        hidden,
        weight,
        labels,
        bias=bias,
        mask=mask,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    return reduce_tokens(-logps, mask, reduction, num_items_in_batch)


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
    if num_items_in_batch is not None:
        return losses.sum() / num_items_in_batch
    return losses.sum() / (max(losses.numel(), 1) if mask is None else mask.bool().sum().clamp(min=1))
