"""Divergence between a student's and a teacher's next-token distributions, from their hidden states."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from grpo_fast import backend
from grpo_fast.ops._checks import MASKS, Shapes, check_choice, check_logits_options
from grpo_fast.ops._chunks import wanted
from grpo_fast.ops._linear_divergence import linear_divergence
from grpo_fast.ops._linear_token_loss import known_gradients
from grpo_fast.ops._rows import as_rows
from grpo_fast.ops._workspace import check_workspace
from grpo_fast.ops.linear_cross_entropy import Reduction, check_num_items, divisor, reduce_tokens
from grpo_fast.ops.linear_selective_log_softmax import check_head, most_precise
from grpo_fast.reference import linear_divergence_ref


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    completion_mask: Tensor | None = None,
    beta: float = 0.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: float | Tensor | None = None,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    workspace_bytes: int | None = None,
    allow_sync: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Generalized Jensen-Shannon divergence of each token (GKD, arXiv 2306.13649); no logits whole in memory.

    With a reduction, the kernels have loss and gradients from one sweep over chunks of both models' logits, like
    ``linear_cross_entropy``: four matrix products, and one backward. With ``"none"`` the backward knows the gradient
    of each token first, and projects both models again.

    Args:
        student_hidden: (..., student H) float.
        student_weight: (V, student H) float, the student's head.
        teacher_hidden: (..., teacher H) float, aligned with the student's. No gradient flows to the teacher.
        teacher_weight: (V, teacher H) float, over the same vocabulary.
        completion_mask: (...,); positions where it is 0 are not projected and add nothing.
        beta: 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher); between them
            beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.
        student_bias, teacher_bias: (V,) float.
        reduction: ``"mean"`` over the tokens that count (0 when there are none), ``"sum"``, or ``"none"``.
        num_items_in_batch: With ``"mean"``, the number to divide by instead, a number or a 0-d tensor.
        temperature: Divides both models' logits.
        student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap: As in ``selective_log_softmax``.
        workspace_bytes: As in ``linear_grpo_loss``; the logits of both models are in memory at a time.
        allow_sync: As in ``linear_grpo_loss``.
        impl: None, or an implementation by name: ``"triton"`` or ``"torch"``.

    Returns:
        A scalar, or (...,) with ``"none"``, in nats; float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: An argument is wrong; the message names it.
        RuntimeError: ``impl`` cannot run here.
    """
    shapes = Shapes()
    is_tensor = isinstance(student_hidden, Tensor)
    token_dims = tuple(f"dim {i}" for i in range(student_hidden.dim() - 1)) if is_tensor else ()
    check_head(shapes, student_hidden, student_weight, student_bias, token_dims, of="student_")
    check_head(shapes, teacher_hidden, teacher_weight, teacher_bias, token_dims, of="teacher_")
    shapes.optional("completion_mask", completion_mask, token_dims, dtypes=MASKS)
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"beta: got {beta!r}, want a number")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: got {beta}, want between 0 (forward KL) and 1 (reverse KL)")
    check_choice("reduction", reduction, get_args(Reduction))
    check_num_items(shapes, num_items_in_batch, reduction)
    check_logits_options(temperature, student_logit_scale, student_softcap, of="student_")
    check_logits_options(temperature, teacher_logit_scale, teacher_softcap, of="teacher_")
    workspace = check_workspace(workspace_bytes)
    precision = most_precise(student_hidden, student_weight, teacher_hidden, teacher_weight)
    implementation = backend.choose("linear_distillation_loss", impl, precision)

    options: dict[str, Any] = dict(
        beta=float(beta),
        temperature=temperature,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
    )
    if implementation == "torch":
        divergence = linear_divergence_ref(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            mask=completion_mask,
            **options,
        )
        return reduce_tokens(divergence, completion_mask, reduction, num_items_in_batch)

    options |= dict(workspace_bytes=workspace, allow_sync=allow_sync, impl=implementation)
    mask = None if completion_mask is None else completion_mask.reshape(-1).bool()
    student = as_rows(student_hidden), student_weight, student_bias
    teacher = _detached(as_rows(teacher_hidden), teacher_weight, teacher_bias)
    if reduction == "none":
        single: Tensor = linear_divergence(*student, *teacher, mask, None, [False] * 3, **options)[0]
        return single.view(student_hidden.shape[:-1])

    inputs = student_hidden, student_weight, student_bias
    needs = wanted(*inputs)
    counted = student_hidden.new_ones(student_hidden.shape[:-1], dtype=torch.bool).view(-1) if mask is None else mask
    token_weights = counted.float() / (divisor(counted, num_items_in_batch) if reduction == "mean" else 1.0)
    divergence, *gradients = linear_divergence(*_detached(*student), *teacher, mask, token_weights, needs, **options)
    loss = (divergence * token_weights).sum()
    return known_gradients(loss, inputs, gradients, needs, None, implementation)


def _detached(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach() for x in tensors]
