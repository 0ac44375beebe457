"""Log-probabilities and entropy from hidden states, over arguments that are checked: the registered ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_fast.ops._chunks import ChunkedHead, Needs, one_section_holds, wanted
from grpo_fast.ops._frozen_head import logps_of_frozen_head
from grpo_fast.ops._label_smoothing import above_mean, add_gradient_above_mean, as_address
from grpo_fast.ops._row_kernels import Gradient, linear_kernels, row_kernels
from grpo_fast.ops._rows import HiddenRows, Rows, as_rows, may_wait
from grpo_fast.ops._sparse import sparse_gradient
from grpo_fast.ops._vocabulary_parallel import merge_rows, shard_index, sharded_linear_logps_ref, upstream_in_shard
from grpo_fast.ops._workspace import row_width
from grpo_fast.reference import linear_logps_ref

#: If something flows back to a smaller share of the rows, to project these again costs less than products with all.
KEPT_FROM = 2 / 3


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    live: Tensor | None = None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int,
    allow_sync: bool,
    impl: str,
    return_entropy: bool = False,
    entropy_gradient: bool = True,
    label_smoothing: float = 0.0,
    sparse_grad_tol: float | None = None,
    group: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(logps, entropy) by ``impl``, over arguments that are checked; the entropy may be empty unless asked for.

    Nothing is to flow back to what is not ``live``, nor, without ``entropy_gradient``, to the entropy. With
    ``label_smoothing`` the log-probs are those that the reference defines; there is none over a ``group``.
    """
    if group is not None:
        trained = hidden.requires_grad and torch.is_grad_enabled()
        index = shard_index(index, weight.size(0), weight.size(1), trained, allow_sync, group)
    options: dict[str, Any] = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    if group is not None and impl == "torch":
        return sharded_linear_logps_ref(hidden, weight, index, bias=bias, mask=mask, group=group, **options)
    options["label_smoothing"] = label_smoothing
    if impl == "torch":
        return linear_logps_ref(hidden, weight, index, bias=bias, mask=mask, **options)
    by_logps_alone = not (return_entropy and entropy_gradient) and group is None
    # A tolerance is for rows as what flows back weighs them, which is not known yet.
    if by_logps_alone and sparse_grad_tol is None and wanted(hidden, weight, bias) == [True, False, False]:
        options |= dict(workspace_bytes=workspace_bytes, allow_sync=allow_sync, impl=impl)
        return logps_of_frozen_head(hidden, weight, bias, index, mask, live, **options)
    # What is kept has a size that is not known ahead, as a compiler wants it.
    needs = [False] * 3 if torch.compiler.is_compiling() else wanted(hidden, weight, bias)
    logps, entropy, *_ = _linear_logps(
        as_rows(hidden),
        weight,
        bias,
        index.reshape(-1).contiguous(),
        None if mask is None else mask.reshape(-1).bool(),
        temperature,
        logit_scale,
        softcap,
        label_smoothing,
        return_entropy,
        needs,
        workspace_bytes,
        allow_sync,
        impl,
        group,
        sparse_grad_tol,
    )
    return logps.view(index.shape), entropy.view(index.shape) if return_entropy else entropy


# The registered op: chunks of logits, forward and again backward -------------------------------------------------


@torch.library.custom_op("grpo_fast::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    return_entropy: bool,
    needs: list[bool],
    workspace_bytes: int,
    allow_sync: bool,
    impl: str,
    group: str | None,
    sparse_grad_tol: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropy, shift, total), (N,) each, of ``hidden`` (B, T, H); the last two are for the backward.

    So are two more: the rows' exponentials with their bases, where kernels make these, they are for one of ``needs``
    and the workspace holds them all; else empty.

    With a ``group``, ``index`` is ``shard_index``'s, and the results are those of the whole vocabulary.
    """
    kernels = row_kernels(impl)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rows = Rows.choose(index.numel(), mask, None, gradient=False, wait=may_wait(allow_sync, hidden))
        ids = rows.take(index)
        results = weight.new_zeros(4, rows.total, dtype=torch.float32)
        options = temperature, logit_scale, softcap, return_entropy
        states = HiddenRows(hidden, rows, torch.promote_types(hidden.dtype, weight.dtype))
        which = kernels, states, weight, label_smoothing, softcap, group is not None
        linear = linear_kernels(*which, gradient="by exponentials") if any(needs) else None
        keeps = 0
        if linear is None:
            linear = linear_kernels(*which, gradient="none")
        elif one_section_holds(states, weight, Needs(*needs), workspace_bytes, sparse=sparse_grad_tol is not None):
            keeps = rows.total
        kept = weight.new_empty(keeps, row_width(weight), dtype=states.dtype)
        bases = results.new_empty(keeps)
        head = ChunkedHead(
            states, weight, bias, Needs(False, False, False), workspace_bytes, keeps_logits=linear is None
        )
        for part, _ in head.chunks():
            counts = None if rows.mask is None else rows.mask[part]
            if linear is not None:
                place = (kept[part, : weight.size(0)], bases[part]) if keeps > 0 else ()
                found = linear.logps(head.states(part), head.weight, bias, ids[part], *options, *place)
                if counts is not None:
                    found = [x.where(counts, 0.0) if x.numel() > 0 else x for x in found]
                _put(results[:, part], found)
                continue
            logits, counts = head.logits(part), None if counts is None else counts.unsqueeze(0)
            _put(results[:, part], kernels.logps(logits.unsqueeze(0), ids[part].unsqueeze(0), counts, *options))
            if label_smoothing:
                spread = above_mean(logits, as_address(ids[part], logits.size(1)))
                spread *= label_smoothing * logit_scale / temperature
                results[0, part] -= spread if counts is None else spread * counts.squeeze(0)
        logps, entropy, shifts, totals = (x.clone() for x in rows.spread(results))
        if group is not None:
            logps, entropy, shifts, totals = merge_rows(
                index, weight.size(0), mask, logps, entropy, shifts, totals, group
            )
    return logps, entropy if return_entropy else entropy.new_empty(0), shifts, totals, kept, bases


def _put(results: Tensor, found: Sequence[Tensor]) -> None:
    """Into the rows of ``results`` what was found, but what is empty as nobody asked for it."""
    for result, values in zip(results, found, strict=True):
        if values.numel() > 0:
            result.copy_(values.view(-1))


@_linear_logps.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    return_entropy: bool,
    needs: list[bool],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logps, shifts, totals = (weight.new_empty(index.shape, dtype=torch.float32) for _ in range(3))
    entropy = weight.new_empty(index.shape if return_entropy else (0,), dtype=torch.float32)
    keeps = torch.library.get_ctx().new_dynamic_size() if any(needs) else 0
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    kept = weight.new_empty(keeps, row_width(weight), dtype=dtype)
    return logps, entropy, shifts, totals, kept, logps.new_empty(keeps)


@torch.library.custom_op("grpo_fast::linear_logps_backward", mutates_args=("kept",))
def _linear_logps_backward(
    kept: Tensor | None,
    bases: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    logps: Tensor,
    entropy: Tensor,
    shifts: Tensor,
    totals: Tensor,
    d_logps: Tensor,
    d_entropy: Tensor | None,
    needs: list[bool],
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    workspace_bytes: int,
    allow_sync: bool,
    impl: str,
    group: str | None,
    sparse_grad_tol: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias); rows that nothing flows back to are not projected again.

    Nor are the others, if their exponentials are ``kept``, whose place the gradient of the logits takes.
    """
    kernels = row_kernels(impl)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if group is not None:
            entropy, d_logps, d_entropy = upstream_in_shard(index, weight.size(0), entropy, d_logps, d_entropy)
        moved = d_logps != 0 if d_entropy is None else (d_logps != 0) | (d_entropy != 0)
        projected, mask = mask, moved if mask is None else moved & mask
        rows = Rows.choose(index.numel(), mask, None, gradient=True, wait=may_wait(allow_sync, hidden))
        if kept is not None and not 0 < KEPT_FROM * kept.size(0) <= rows.total:
            kept.untyped_storage().resize_(0)  # before memory for fewer rows is taken: the caller still holds it
            kept = bases = None
        if kept is not None:
            rows = rows.among(projected, kept.size(0), mask)
        states = HiddenRows(hidden, rows, torch.promote_types(hidden.dtype, weight.dtype))
        by: Gradient = "by the product" if sparse_grad_tol is None and kept is None else "by exponentials"
        linear = linear_kernels(kernels, states, weight, label_smoothing, softcap, group is not None, gradient=by)
        head = ChunkedHead(
            states,
            weight,
            bias,
            Needs(*needs),
            workspace_bytes,
            group=group,
            keeps_logits=linear is None,
            sparse=sparse_grad_tol is not None,
            kept=kept,
        )
        sparse = sparse_gradient(head, linear, sparse_grad_tol, may_wait(allow_sync, hidden))
        saved = [
            None if x is None or x.numel() == 0 else rows.take(x)
            for x in (index, rows.mask, logps, entropy, shifts, totals, d_logps, d_entropy)
        ]
        for part, _ in head.chunks():
            gradient = head.gradient(part)
            ids, counts, logp, h, shift, total, d_logp, d_h = (None if x is None else x[part] for x in saved)
            assert ids is not None
            assert logp is not None
            assert d_logp is not None
            if linear is not None:
                rest = head.states(part), head.weight, bias, ids, counts, logp, h, shift, total, d_logp, d_h
                options = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
                if by == "by the product":
                    linear.logps_backward(gradient, *rest, **options)
                    head.backpropagate(part)
                    continue
                exponentials = linear.exponentials(gradient, *rest, **options, bases=bases)
                if sparse is not None:
                    sparse.backpropagate(part, exponentials)
                else:
                    exponentials.gradient()
                    head.backpropagate(part)
                continue
            logits = head.logits(part)
            if label_smoothing:
                labels = as_address(ids, logits.size(1))
                factor = d_logp * (-label_smoothing * logit_scale / temperature)
                # The kernel wants the log-prob itself, from which the smoothed one is off by this.
                logp = logp + above_mean(logits, labels) * (label_smoothing * logit_scale / temperature)
            kernels.logps_backward(
                gradient.unsqueeze(0),
                logits.unsqueeze(0),
                ids,
                counts,
                logp,
                h,
                shift,
                total,
                d_logp,
                d_h,
                temperature,
                logit_scale,
                softcap,
            )
            if label_smoothing:
                add_gradient_above_mean(gradient, labels, factor if counts is None else factor * counts)
            head.backpropagate(part)
        if sparse is not None:
            sparse.finish()
        d_hidden, d_weight, d_bias = head.finish()
        if bias is not None:
            d_bias = d_bias.to(bias.dtype)
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias


@_linear_logps_backward.register_fake
def _(
    kept: Tensor | None, bases: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs = args[8]

    def gradient(x: Tensor | None, needed: bool) -> Tensor:
        return x.new_empty(x.shape) if needed and x is not None else weight.new_empty(0)

    return gradient(hidden, needs[0]), gradient(weight, needs[1]), gradient(bias, needs[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, index, mask, *options = inputs
    logps, entropy, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)  # an entropy that nothing depends on costs the backward nothing
    ctx.save_for_backward(hidden, weight, bias, index, mask, logps, entropy, *rest)
    logits_options, (_, needs, *chunk_options) = options[:4], options[4:]
    ctx.keeps = any(needs)
    ctx.options = *logits_options, *chunk_options


def _backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, index, mask, logps, entropy, shifts, totals, kept, bases = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    keeps, ctx.keeps = ctx.keeps, False  # for one backward, which overwrites it, but not what autograd has saved
    gradients = _linear_logps_backward(
        *((kept.data, bases) if keeps else (None, None)),
        hidden,
        weight,
        bias,
        index,
        mask,
        logps,
        entropy,
        shifts,
        totals,
        torch.zeros_like(logps) if d_logps is None else d_logps.contiguous(),
        None if d_entropy is None else d_entropy.contiguous(),
        needs,
        *ctx.options,
    )
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 13


_linear_logps.register_autograd(_backward, setup_context=_setup_context)
