"""Log-probabilities and entropy from hidden states, over arguments that are checked: the registered ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_fast.ops._chunks import ChunkedHead, Needs, section_of_all, wanted
from grpo_fast.ops._frozen_head import logps_of_frozen_head
from grpo_fast.ops._label_smoothing import above_mean, add_gradient_above_mean, as_address
from grpo_fast.ops._row_kernels import Gradient, linear_kernels, row_kernels
from grpo_fast.ops._rows import Choice, HiddenRows, Rows, as_rows, may_wait
from grpo_fast.ops._section import Section
from grpo_fast.ops._sparse import sparse_gradient
from grpo_fast.ops._vocabulary_parallel import merge_rows, shard_index, sharded_linear_logps_ref, upstream_in_shard
from grpo_fast.ops._workspace import LAUNCH_ROWS
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropy, shift, total), (N,) each, of ``hidden`` (B, T, H); the last two are for the backward.

    So are three more: the rows' exponentials, in the one or two places of a ``Section``, and their bases, where
    kernels make these, they are for one of ``needs``, and the workspace holds them all; else empty.

    With a ``group``, ``index`` is ``shard_index``'s, and the results are those of the whole vocabulary.
    """
    kernels, count, V = row_kernels(impl), index.numel(), weight.size(0)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        choice = Choice.begin(count, mask, None, gradient=False, wait=may_wait(allow_sync, hidden))
        logits_options: dict[str, Any] = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
        which = weight, label_smoothing, softcap, group is not None
        rows, counted, section = choice.all, choice.numbers, None
        states, keeps = HiddenRows(hidden, rows, dtype), any(needs)
        linear = None if keeps or count > LAUNCH_ROWS else linear_kernels(kernels, states, *which, gradient="none")
        if linear is None:  # the host has to know how many rows there are
            rows, counted = choice.rows, None
            states = HiddenRows(hidden, rows, dtype)
            linear = linear_kernels(kernels, states, *which, gradient="by exponentials") if keeps else None
            keeps = linear is not None
            linear = linear or linear_kernels(kernels, states, *which, gradient="none")
        if keeps:
            sparse = sparse_grad_tol is not None
            section = section_of_all(workspace_bytes, rows.total, weight, dtype, own_sum=needs[1], sparse=sparse)
        bases = weight.new_empty(rows.total if section is not None else 0, dtype=torch.float32)
        ids = rows.take(index)
        results = weight.new_zeros(4, rows.total, dtype=torch.float32)
        head = ChunkedHead(
            states, weight, bias, Needs(False, False, False), workspace_bytes, logits_a_row=int(linear is None)
        )
        for part, _ in head.chunks():
            if linear is not None:
                product = linear.product(
                    head.states(part),
                    head.weight,
                    bias,
                    ids[part],
                    memory=() if section is None else section[part],
                    counted=None if counted is None else counted[1],
                    **logits_options,
                )
                if product.bases is not None:
                    bases[part] = product.bases
                _put(results[:, part], linear.logps(product, return_entropy))
                continue
            logits, counts = head.logits(part), None if rows.mask is None else rows.mask[part].unsqueeze(0)
            options = temperature, logit_scale, softcap, return_entropy
            _put(results[:, part], kernels.logps(logits.unsqueeze(0), ids[part].unsqueeze(0), counts, *options))
            if label_smoothing:
                spread = above_mean(logits, as_address(ids[part], logits.size(1)))
                spread *= label_smoothing * logit_scale / temperature
                results[0, part] -= spread if counts is None else spread * counts.squeeze(0)
        results = rows.spread(results)
        if mask is not None:
            results = results.where(mask, 0.0)
        logps, entropy, shifts, totals = (x.clone() for x in results)
        if group is not None:
            logps, entropy, shifts, totals = merge_rows(index, V, mask, logps, entropy, shifts, totals, group)
        nothing = weight.new_empty(0, 0, dtype=dtype), weight.new_empty(0, dtype=dtype)
        kept = nothing if section is None else (section.own, section.borrowed)
    return logps, entropy if return_entropy else entropy.new_empty(0), shifts, totals, *kept, bases


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logps, shifts, totals = (weight.new_empty(index.shape, dtype=torch.float32) for _ in range(3))
    entropy = weight.new_empty(index.shape if return_entropy else (0,), dtype=torch.float32)
    rows, words, elements = (torch.library.get_ctx().new_dynamic_size() if any(needs) else 0 for _ in range(3))
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    kept = weight.new_empty(rows, words, dtype=dtype), weight.new_empty(elements, dtype=dtype)
    return logps, entropy, shifts, totals, *kept, logps.new_empty(rows)


@torch.library.custom_op("grpo_fast::linear_logps_backward", mutates_args=("kept", "borrowed"))
def _linear_logps_backward(
    kept: Tensor | None,
    borrowed: Tensor | None,
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
    kernels, dtype = row_kernels(impl), torch.promote_types(hidden.dtype, weight.dtype)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if group is not None:
            entropy, d_logps, d_entropy = upstream_in_shard(index, weight.size(0), entropy, d_logps, d_entropy)
        moved = d_logps != 0 if d_entropy is None else (d_logps != 0) | (d_entropy != 0)
        counts = moved if mask is None else moved & mask
        choice = Choice.begin(index.numel(), mask, moved, gradient=True, wait=may_wait(allow_sync, hidden))
        which = weight, label_smoothing, softcap, group is not None
        rows, section, linear = None, None, None
        by: Gradient = "by exponentials"
        if kept is not None and borrowed is not None:
            section, rows = Section.of(kept, borrowed, weight.size(0)), _kept_rows(mask, counts, kept.size(0))
            if choice.places is not None and choice.first == rows.total:
                rows = replace(rows, mask=None)
            states = HiddenRows(hidden, rows, dtype)
            if 0 < KEPT_FROM * rows.total <= choice.first:
                linear = linear_kernels(kernels, states, *which, gradient=by)
            if linear is None:
                section.release()  # before memory for fewer rows is taken: the caller still holds it
                section = bases = None
        if section is None or rows is None:
            by = "by the product" if sparse_grad_tol is None else by
            rows = _with_gradient(choice, counts)
            states = HiddenRows(hidden, rows, dtype)
            linear = linear_kernels(kernels, states, *which, gradient=by)
        head = ChunkedHead(
            states,
            weight,
            bias,
            Needs(*needs),
            workspace_bytes,
            group=group,
            logits_a_row=int(linear is None),
            sparse=sparse_grad_tol is not None,
            section=section,
        )
        sparse = sparse_gradient(head, linear, sparse_grad_tol, may_wait(allow_sync, hidden))
        logits_options: dict[str, Any] = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
        saved = [
            None if x is None or x.numel() == 0 else rows.take(x)
            for x in (index, rows.mask, logps, entropy, shifts, totals, d_logps, d_entropy)
        ]
        for part, _ in head.chunks():
            memory = head.gradient(part)
            ids, counted, logp, h, shift, total, d_logp, d_h = (None if x is None else x[part] for x in saved)
            assert ids is not None
            assert logp is not None
            assert d_logp is not None
            if linear is not None:
                model = head.states(part), head.weight, bias, ids
                rest = counted, logp, h, shift, total, d_logp, d_h
                if by == "by the product":
                    linear.logps_backward(memory, *model, *rest, **logits_options)
                    head.backpropagate(part)
                    continue
                known = None if bases is None else bases[part]
                product = linear.product(*model, memory=memory, bases=known, **logits_options)
                exponentials = linear.exponentials(product, *rest)
                if sparse is not None:
                    sparse.backpropagate(part, exponentials)
                else:
                    exponentials.gradient()
                    head.backpropagate(part)
                continue
            (gradient,) = memory
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
                counted,
                logp,
                h,
                shift,
                total,
                d_logp,
                d_h,
                **logits_options,
            )
            if label_smoothing:
                add_gradient_above_mean(gradient, labels, factor if counted is None else factor * counted)
            head.backpropagate(part)
        if sparse is not None:
            sparse.finish()
        d_hidden, d_weight, d_bias = head.finish()
        if bias is not None:
            d_bias = d_bias.to(bias.dtype)
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias


def _with_gradient(choice: Choice, counts: Tensor) -> Rows:
    """Those in ``counts``, which come first; all if the host may not wait."""
    if choice.places is None:
        return Rows(choice.count, choice.count, choice.count, mask=counts)
    first, index = choice.rows.live, choice.rows.index
    return Rows(choice.count, first, first, None if index is None else index[:first])


def _kept_rows(projected: Tensor | None, counts: Tensor, total: int) -> Rows:
    """The ``total`` rows that were ``projected``, whose exponentials are kept; those in ``counts`` count."""
    index = None
    if projected is not None and total < projected.numel():
        index = torch.nonzero_static(projected, size=total).squeeze(1)
    return Rows(counts.numel(), total, total, index, counts)


@_linear_logps_backward.register_fake
def _(
    kept: Tensor | None,
    borrowed: Tensor | None,
    bases: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *args: Any,
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
    hidden, weight, bias, index, mask, logps, entropy, shifts, totals, kept, borrowed, bases = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    keeps, ctx.keeps = ctx.keeps, False  # for one backward, which overwrites it, but not what autograd has saved
    gradients = _linear_logps_backward(
        *((kept.data, borrowed.data, bases) if keeps else 3 * [None]),
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
