"""Losses that follow from a token's own row, from hidden states: values and gradients in one sweep over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config import GRPOLossConfig
from grpo_fast.ops._ahead import product_ahead
from grpo_fast.ops._checks import Shapes
from grpo_fast.ops._chunks import ChunkedHead, Needs, fake_gradients
from grpo_fast.ops._known_gradient import KnownGradientFunction
from grpo_fast.ops._label_smoothing import above_mean, add_gradient_above_mean, as_address
from grpo_fast.ops._library import overwritten, plain_op
from grpo_fast.ops._row_kernels import Gradient, linear_kernels, row_kernels
from grpo_fast.ops._rows import Choice, HiddenRows, as_rows, may_wait
from grpo_fast.ops._sparse import sparse_gradient
from grpo_fast.ops._token_loss import METRICS, term_options

#: What a row leaves behind: log-prob, entropy, weighted loss, KL, ratio, clip.
ROW_RESULTS = 6
#: With advantage 1 the term is -logp: the ratio is clamped to 1. It is one to old log-probs of 0, as those of a token
#: that is excluded, -inf, have no ratio to themselves.
_CROSS_ENTROPY = GRPOLossConfig(loss_type="cispo", cispo_bounds="relative", epsilon_low=0.0)


def _fake_token_loss(
    weight_grad_out: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    *_: Any,
    needs: list[bool],
    hidden_in_float32: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = Needs(needs[0], needs[1] and weight_grad_out is None, needs[2])
    rows = weight.new_empty(ROW_RESULTS, index.numel(), dtype=torch.float32)
    return rows, *fake_gradients(kept, hidden, weight, bias, hidden_in_float32)


@plain_op("linear_token_loss", mutates="weight_grad_out", fake=_fake_token_loss)
def linear_token_loss(
    weight_grad_out: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    live: Tensor | None,
    advantages: Tensor,
    token_weights: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    entropy_mask: Tensor | None,
    sampler_ratio: Tensor | None,
    entropy_threshold: Tensor | None,
    entropy_items: Tensor | None,
    *,
    needs: list[bool],
    hidden_in_float32: bool,
    impl: str,
    workspace_bytes: int,
    allow_sync: bool,
    label_smoothing: float,
    sparse_grad_tol: float | None,
    term: str,
    low: float,
    high: float,
    delta: float | None,
    dual_clip: float | None,
    beta: float,
    kl_estimator: str,
    bias_correction: bool,
    tau_pos: float,
    tau_neg: float,
    entropy_coef: float,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row results (ROW_RESULTS, N), d_hidden, d_weight, d_bias), the gradients those of the sum of the losses.

    ``hidden`` is (B, T, H), ``weight`` (V, H), the others are per token (N,), contiguous, or scalars. Rows that
    ``mask`` drops are not projected, those out of ``live`` have no gradient. ``needs`` says which gradients are
    computed; the others are empty, and so is the weight's if it went to ``weight_grad_out``. They are in
    ``gradient_dtype``, but that of ``hidden`` may be asked for in float32.
    """
    kernels = row_kernels(impl)
    wants = Needs(*needs)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        choice = Choice.begin(index.numel(), mask, live, gradient=any(wants), wait=may_wait(allow_sync, hidden))
        scale = None
        if torch.promote_types(hidden.dtype, weight.dtype) == torch.float16 and token_weights.numel() > 0:
            sizes = advantages.abs() if sampler_ratio is None else advantages.abs() * sampler_ratio
            sizes = sizes if entropy_mask is None else sizes.where(entropy_mask.bool(), 0.0)
            bonus = None if entropy_items is None else abs(entropy_coef) / entropy_items
            scale = _scale(token_weights * (sizes + beta), bonus)
            token_weights = token_weights * scale
            entropy_items = None if entropy_items is None else entropy_items / scale
        logits_options: dict[str, Any] = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
        ahead = product_ahead(
            kernels,
            choice,
            hidden,
            weight,
            bias,
            index,
            workspace_bytes=workspace_bytes,
            own_sum=wants.weight and weight_grad_out is None,
            sparse=sparse_grad_tol is not None,
            label_smoothing=label_smoothing,
            **logits_options,
        )
        rows = choice.rows  # the host waits, and the GPU has something to do
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        states = HiddenRows(hidden, rows, dtype, None if ahead is None else ahead.states)
        by: Gradient = "by exponentials" if rows.live else "none"
        linear = linear_kernels(kernels, states, weight, label_smoothing, softcap, gradient=by)
        launched = 0 if ahead is None else min(ahead.launched, rows.live if any(wants) else rows.total)
        head = ChunkedHead(
            states,
            weight,
            bias,
            wants,
            workspace_bytes,
            weight_grad_out,
            scale,
            hidden_in_float32=hidden_in_float32,
            logits_a_row=int(linear is None),
            sparse=sparse_grad_tol is not None,
            section=None if ahead is None else ahead.section,
            first_band=launched if linear is not None and sparse_grad_tol is None else None,
        )
        sparse = sparse_gradient(head, linear, sparse_grad_tol, may_wait(allow_sync, hidden))
        inputs = (index, advantages, token_weights, old_logps, ref_logps, entropy_mask, sampler_ratio, rows.mask)
        per_token = [None if x is None else rows.take(x) for x in inputs]
        results = weight.new_zeros(ROW_RESULTS, rows.total, dtype=torch.float32)
        options: dict[str, Any] = dict(
            group_size=1,
            divisor=1.0,
            reduction="constant",
            scale_rewards="none",
            term=term,
            low=low,
            high=high,
            delta=delta,
            dual_clip=dual_clip,
            beta=beta,
            kl_estimator=kl_estimator,
            bias_correction=bias_correction,
            tau_pos=tau_pos,
            tau_neg=tau_neg,
            entropy_coef=entropy_coef,
        )
        pending = None  # exponentials of the band before, which are to be its gradient
        for part, has_gradient in head.chunks():
            ids, adv, weights, old, ref, chosen, ratio, kept = (None if x is None else x[part] for x in per_token)
            assert ids is not None
            assert weights is not None
            found = results[:, part].unbind()
            rest = (
                kept,
                None,
                adv,
                None,
                old,
                ref,
                chosen,
                ratio,
                entropy_threshold,
                None,
                weights,
                entropy_items,
            )
            memory = head.gradient(part) if has_gradient else ()
            if linear is not None:
                if ahead is not None and part.stop <= launched:
                    product = ahead.product[part]
                else:
                    model = head.states(part), weight, bias, ids
                    product = linear.product(*model, memory=memory, meanwhile=pending, **logits_options)
                exponentials, pending = linear.loss_rows(found, product, *rest, **options), None
                if has_gradient and sparse is not None:
                    sparse.backpropagate(part, exponentials)
                elif has_gradient and head.ends_section(part):
                    exponentials.gradient()
                    head.backpropagate(part)
                elif has_gradient:
                    pending = exponentials
            else:
                logits = head.logits(part)
                labels = as_address(ids, logits.size(1)) if label_smoothing else ids
                smoothing = weights * (label_smoothing * logit_scale / temperature)
                spread = above_mean(logits, labels) * smoothing if label_smoothing else None
                gradient = memory[0].unsqueeze(0) if has_gradient else None
                kernels.loss_rows(found, None, gradient, logits.unsqueeze(0), ids, *rest, **options, **logits_options)
                if spread is not None:
                    results[2, part] += spread
                    if has_gradient:
                        add_gradient_above_mean(memory[0], labels, smoothing)
                if has_gradient:
                    head.backpropagate(part)
        if sparse is not None:
            sparse.finish()
        if scale is not None:
            results[2] /= scale
        return rows.spread(results), *head.finish()


def _scale(sizes: Tensor, bonus: Tensor | None) -> Tensor:
    """A power of two that brings the largest of what the tokens' gradients are multiplied by to between 1 and 2.

    One in many tokens, or a small advantage, would underflow in float16, and a large one overflow. ``bonus`` is what
    those of the entropies are multiplied by.
    """
    largest = sizes.nan_to_num(0.0, 0.0, 0.0).amax()
    if bonus is not None:
        largest = torch.maximum(largest, bonus)
    largest = largest.where(largest > 0.0, 1.0).clamp(2.0**-60, 2.0**60)
    return torch.exp2(-largest.log2().floor())


def _fake_sum_rows(rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(1 + len(METRICS))


@plain_op("sum_rows", fake=_fake_sum_rows)
def sum_rows(
    rows: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    entropy_mask: Tensor | None,
    sequences: int,
    length: int,
    has_kl: bool,
    entropy_coef: float,
    impl: str,
) -> Tensor:
    """Loss and metrics from the row results of ``linear_token_loss``, as ``name_results`` takes them."""
    results = rows.new_empty(1 + len(METRICS))
    row_kernels(impl).sum_rows(
        results, rows.unbind(), mask, cu_seqlens, entropy_mask, None, sequences, length, has_kl, entropy_coef
    )
    return results


# Beside the ops --------------------------------------------------------------------------------------------------


def cross_entropy_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    token_weights: Tensor,
    weight_grad_out: Tensor | None = None,
    *,
    live: Tensor | None = None,
    hidden_in_float32: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(-logp times its weight, entropy, gradients of the first's sum over the live); mask, weights, live: flat."""
    rows, *gradients = linear_token_loss(
        weight_grad_out,
        as_rows(hidden.detach()),
        weight.detach(),
        None if bias is None else bias.detach(),
        labels.reshape(-1).contiguous(),
        mask,
        live,
        torch.ones_like(token_weights),
        token_weights,
        torch.zeros_like(token_weights),
        *[None] * 5,
        hidden_in_float32=hidden_in_float32,
        **term_options(_CROSS_ENTROPY),
        **options,
    )
    return rows[2], rows[1], gradients


def known_gradients(
    loss: Tensor,
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    needs: Sequence[bool],
    weight_grad_out: Tensor | None,
    impl: str,
) -> Tensor:
    """``loss``, differentiable in hidden, weight and bias where ``needs`` says so."""
    pairs: list[Tensor] = []
    for i, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        if needs[i] and x is not None and not (i == 1 and weight_grad_out is not None):
            pairs += [x, gradient.view(x.shape)]
    if pairs:
        loss = KnownGradientFunction.apply(loss, impl, *pairs)
    if needs[1] and weight_grad_out is not None:
        overwritten(weight_grad_out)
        loss = _AlreadyAddedFunction.apply(loss, inputs[1])
    return loss


class _AlreadyAddedFunction(torch.autograd.Function):
    """``apply(loss, weight)`` is ``loss``, whose gradient by ``weight`` has gone elsewhere, unscaled."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        torch._assert_async(upstream == 1, "weight_grad_out: the upstream gradient is not 1; scale the loss before")
        return upstream, None


def check_weight_grad_out(shapes: Shapes, weight_grad_out: object, *, possible: bool) -> None:
    """Check the buffer that a weight's gradient is added to."""
    if weight_grad_out is None:
        return
    shapes.check("weight_grad_out", weight_grad_out, ("V", "H"), dtypes=(torch.float32,))
    if not possible:
        raise ValueError(
            "weight_grad_out: got one, want None where the gradients do not come along with the loss: that takes a "
            "kernel, a loss that follows from a token's own logits, and all of these on one rank"
        )
