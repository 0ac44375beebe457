"""Divergence from a teacher, from both models' hidden states, over arguments that are checked: the registered op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast.ops._chunks import ChunkedHead, Needs, fake_gradients
from grpo_fast.ops._row_kernels import row_kernels
from grpo_fast.ops._rows import HiddenRows, Rows, may_wait


@torch.library.custom_op("grpo_fast::linear_divergence", mutates_args=())
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
    needs: list[bool],
    beta: float,
    temperature: float,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    workspace_bytes: int,
    allow_sync: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(divergences (N,), d_hidden, d_weight, d_bias), the gradients those of the divergences times ``token_weights``.

    Hidden states are (B, T, student H) and (B, T, teacher H). ``mask`` and ``token_weights`` are per token (N,),
    N = B T, contiguous; the latter float32, needed for a gradient. Rows that ``mask`` drops are not projected.
    ``needs`` says which gradients are computed; the others are empty. Without any the divergences have a derivative:
    the backward is this op again, with the upstream gradient for ``token_weights``.
    """
    kernels, wants = row_kernels(impl), Needs(*needs)
    assert kernels.divergence_rows is not None
    dtype, teacher_dtype = (
        torch.promote_types(x.dtype, w.dtype) for x, w in ((hidden, weight), (teacher_hidden, teacher_weight))
    )
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        count = hidden.size(0) * hidden.size(1)
        rows = Rows.choose(count, mask, None, gradient=any(wants), wait=may_wait(allow_sync, hidden))
        scale = None
        if token_weights is not None:
            if dtype == torch.float16 and count > 0:
                # A weight of 1 in many tokens would underflow: the largest is brought to between 1 and 2.
                scale = torch.exp2(-token_weights.abs().amax().clamp(min=1e-30).log2().floor())
                token_weights = token_weights * scale
            token_weights = rows.take(token_weights)
        head = ChunkedHead(
            HiddenRows(hidden, rows, dtype), weight, bias, wants, workspace_bytes, scale=scale, logits_a_row=2
        )
        teacher_states = HiddenRows(teacher_hidden, rows, teacher_dtype)
        teacher = head.beside(teacher_weight.to(teacher_dtype), teacher_bias)
        divergences = weight.new_zeros(1, rows.total, dtype=torch.float32)
        for part, has_gradient in head.chunks():
            logits = head.logits(part)
            gradient = head.gradient(part)[0] if has_gradient else None
            kernels.divergence_rows(
                divergences[0, part],
                gradient,
                logits,
                teacher(teacher_states[part]),
                None if rows.mask is None else rows.mask[part],
                token_weights[part] if has_gradient and token_weights is not None else None,
                beta=beta,
                temperature=temperature,
                student_logit_scale=student_logit_scale,
                teacher_logit_scale=teacher_logit_scale,
                student_softcap=student_softcap,
                teacher_softcap=teacher_softcap,
            )
            if has_gradient:
                head.backpropagate(part)
        del teacher
        return rows.spread(divergences).view(-1), *head.finish()


@linear_divergence.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = Needs(*args[5])
    divergences = weight.new_empty(hidden.size(0) * hidden.size(1), dtype=torch.float32)
    return divergences, *fake_gradients(needs, hidden, weight, bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, needs = inputs[:9]
    assert not any(needs), "gradients that come along with the divergences have no derivative"
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.options = inputs[9:]


def _backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    *models, mask = ctx.saved_tensors
    moved = upstream != 0  # what nothing flows back to is not projected again
    mask = moved if mask is None else moved & mask
    needs = list(ctx.needs_input_grad[:3])
    _, *gradients = linear_divergence(*models, mask, upstream.contiguous(), needs, *ctx.options)
    found = (
        gradient.to(x.dtype) if needed else None
        for gradient, x, needed in zip(gradients, models[:3], needs, strict=True)
    )
    return *found, *[None] * 15


linear_divergence.register_autograd(_backward, setup_context=_setup_context)
