"""The GRPO loss from hidden states: the logits are never whole in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grpo_fast import backend
from grpo_fast.config import GRPOLossConfig
from grpo_fast.ops._checks import Shapes, check_choice, check_logits_options
from grpo_fast.ops._chunks import wanted
from grpo_fast.ops._linear_logps import linear_logps
from grpo_fast.ops._linear_token_loss import check_weight_grad_out, known_gradients, linear_token_loss, sum_rows
from grpo_fast.ops._loss_batch import GRPOLossOutput, LossBatch
from grpo_fast.ops._rows import as_rows
from grpo_fast.ops._sparse import check_sparse_grad_tol
from grpo_fast.ops._token_loss import name_results, term_options, threshold_tensor
from grpo_fast.ops._vocabulary_parallel import local_shards
from grpo_fast.ops._workspace import check_workspace
from grpo_fast.ops.linear_selective_log_softmax import check_head, most_precise
from grpo_fast.reference import accumulation_dtype, token_weights

Metrics = Literal["all", "active"]

_DEFAULT = GRPOLossConfig()


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    config: GRPOLossConfig = _DEFAULT,
    metrics: Metrics = "all",
    weight_grad_out: Tensor | None = None,
    workspace_bytes: int | None = None,
    allow_sync: bool = True,
    sparse_grad_tol: float | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    impl: str | None = None,
) -> GRPOLossOutput:
    """``grpo_loss`` of the logits ``hidden @ weight.T + bias``, which are computed in chunks and dropped.

    The kernels have loss and gradients from one sweep over the chunks: a matrix product for the logits, and one each
    for ``hidden`` and ``weight`` if they require a gradient. Where a sequence has to be known before its tokens' loss
    (a sequence-level ratio, ``"vespo"``, ``off_policy_mask_threshold``, an entropy bonus over a threshold's tokens),
    log-probs are computed first, as by ``linear_selective_log_softmax``, and the logits again in the backward, a
    product more, where they are not kept for it.

    A token whose gradient is known to be 0 costs one product, for its log-prob. Without KL and entropy bonus those
    are tokens of advantage 0 (groups of equal rewards), of ``importance_sampling_ratio`` 0, and out of
    ``entropy_mask``.

    Args:
        hidden: (token, H) float: (B, T, H), or (N, H) with ``cu_seqlens``. ``hidden[..., t, :]`` predicts
            ``completion_ids[..., t]``: of states over prompt and completion, the slice ``[:, P - 1 : -1]``.
        weight: (V, H) float, the head (lm_head); of any precision, the logits are accumulated in float32 (float64
            if either is) and never rounded.
        completion_ids: (token) int. An id outside [0, V) that is not masked makes the loss NaN.
        bias: (V,) float.
        completion_mask: (token); positions where it is 0 are not projected.
        ref_hidden, ref_weight, ref_bias: The reference model's states and head, in place of ``ref_logps``: a matrix
            product more, if ``config.beta`` is not 0. The other options of the logits are shared.
        cu_seqlens, advantages, rewards, group_size, group_ids, old_logps, ref_logps, sampling_logps,
        importance_sampling_ratio, entropy_mask, entropy_threshold, num_items_in_batch, temperature, logit_scale,
        softcap, config, impl: As in ``grpo_loss``.
        metrics: ``"active"`` does not project tokens whose gradient is known to be 0 at all: their logps and entropy
            are 0, and the metrics are over the other tokens. The loss is the same.
        weight_grad_out: (V, H) float32 that the weight's gradient is added to, without a rounding, in place of
            ``weight.grad``. That happens in the forward, so the loss must be scaled by its own options
            (``num_items_in_batch``): an upstream gradient other than 1 is an error on the device; and where
            activations are recomputed, what calls this must not be, or it is added twice. Only kernels, and only
            losses that follow from a token's own logits. A frozen ``weight`` adds nothing.
        workspace_bytes: What the call may take beyond its inputs, the gradients and up to 300 numbers a token; None
            is 2 GiB. It is never less than 4 V H + 8 H^2, what the gradient of a bfloat16 ``weight`` takes in
            float32, where it is added up if not all tokens fit at once, and some hidden states; unless ``weight`` is
            frozen or ``weight_grad_out`` given. Weights of another precision than the products are copied beside it.
            In float16 the gradients stay in float32 until the backward knows the scale of the loss, and are rounded
            there: for a moment a weight's takes 6 V H.
            The ``"torch"`` implementation has chunks of its own.
        allow_sync: The host waits for the GPU to learn how many tokens count. If it may not, or while a CUDA graph is
            captured, every token is projected; the result is the same.
        sparse_grad_tol: The expected error of the gradient of the logits, relative to itself in the L2 norm: 1e-4 to
            0.1, or None for none. Elements of at least a threshold are kept. Smaller ones reach ``hidden`` by chance:
            raised to the threshold with a probability of their size by it, else dropped, so that on average nothing
            is lost; ``weight`` and ``bias`` go without, which is less of an error there. Rows with few elements enter
            sparse products, whose cost is that of the elements; the others, and all if most are like them, the usual
            ones. The same inputs give the same gradients; loss, log-probs and metrics are exact.
            Beside the workspace, the elements take some 50 bytes each, the hidden states are copied, and the sum of
            the weight's gradient takes 2 V H. On Hopper, in bfloat16, with ``allow_sync``, without a softcap or
            ``process_group``, for H a multiple of 8 and up to 262,144 words. See docs/sparse.md.
        process_group: ``weight``, ``bias``, ``ref_weight`` and ``ref_bias`` are this rank's shards of the vocabulary,
            as in ``linear_selective_log_softmax``; the other arguments and the results are the same on every rank of
            the group. Every loss then takes the product more, in the backward, and there is no ``weight_grad_out``.

    Returns:
        ``GRPOLossOutput(loss, logps, entropy, metrics)``; the loss is differentiable in ``hidden``, ``weight`` and
        ``bias``, whichever require it. The kernels compute the gradients along with the loss and hand those buffers
        out, so they allow one backward.

    Raises:
        ValueError, TypeError: An argument is wrong; the message names it.
        RuntimeError: ``impl`` cannot run here.
    """
    batch = LossBatch(
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        cu_seqlens=cu_seqlens,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size,
        group_ids=group_ids,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampling_logps=sampling_logps,
        importance_sampling_ratio=importance_sampling_ratio,
        entropy_mask=entropy_mask,
        entropy_threshold=entropy_threshold,
        num_items_in_batch=num_items_in_batch,
        config=config,
    )
    group, (weight, bias, ref_weight, ref_bias) = local_shards(
        process_group, 0, weight=weight, bias=bias, ref_weight=ref_weight, ref_bias=ref_bias
    )
    shapes = Shapes()
    check_head(shapes, hidden, weight, bias, batch.token_dims, group=group)
    _check_reference(shapes, batch, ref_hidden, ref_weight, ref_bias, group)
    batch.check(shapes, ref_logps_follow=ref_hidden is not None)
    check_logits_options(temperature, logit_scale, softcap)
    check_choice("metrics", metrics, get_args(Metrics))
    workspace = check_workspace(workspace_bytes)
    reference = (ref_hidden, ref_weight) if config.beta != 0.0 else ()
    precision = most_precise(hidden, weight, *(x for x in reference if x is not None))
    implementation = backend.choose("linear_grpo_loss", impl, precision)
    fused = implementation != "torch" and group is None and batch.is_known_by_token()
    check_weight_grad_out(shapes, weight_grad_out, possible=fused)
    check_sparse_grad_tol(
        sparse_grad_tol,
        hidden,
        weight,
        impl=implementation,
        allow_sync=allow_sync,
        weight_grad_out=weight_grad_out,
        softcap=softcap,
        process_group=group,
    )

    logits_options: dict[str, Any] = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    chunk_options: dict[str, Any] = dict(workspace_bytes=workspace, allow_sync=allow_sync, impl=implementation)
    if ref_hidden is not None and config.beta != 0.0:
        assert ref_weight is not None
        with torch.no_grad():
            mask = None if batch.counts_everything else batch.sequences(torch.float32).mask
            batch.ref_logps = linear_logps(
                ref_hidden,
                ref_weight,
                completion_ids,
                bias=ref_bias,
                mask=mask,
                group=group,
                **logits_options,
                **chunk_options,
            )[0]
    chunk_options["sparse_grad_tol"] = sparse_grad_tol
    if fused:
        return _fused(hidden, weight, bias, batch, metrics, weight_grad_out, logits_options, chunk_options)

    sequences = batch.sequences(accumulation_dtype(hidden, weight))
    shown, live = sequences, None
    if metrics == "active" or not weight.requires_grad:  # under a trained head the backward sees for itself
        live = batch.live(sequences, sequences.per_token(batch.group_advantages()[0]))
    if metrics == "active" and live is not None:
        batch_shown = replace(batch, completion_mask=sequences.mask & live)
        shown, live = batch_shown.sequences(sequences.dtype), None
    logps, entropy = linear_logps(
        hidden,
        weight,
        completion_ids,
        bias=bias,
        mask=None if batch.counts_everything and shown is sequences else shown.mask,
        live=live,
        return_entropy=True,
        entropy_gradient=config.entropy_coef != 0.0,
        group=group,
        **logits_options,
        **chunk_options,
    )
    out = batch.loss(logps, entropy, sequences)
    if shown is sequences:
        return out
    active = batch_shown.loss(logps.detach(), entropy.detach(), shown).metrics
    return out._replace(metrics=active | {"policy_loss": out.metrics["policy_loss"]})


def _fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: LossBatch,
    metrics: str,
    weight_grad_out: Tensor | None,
    logits_options: dict[str, Any],
    chunk_options: dict[str, Any],
) -> GRPOLossOutput:
    """One sweep over the chunks. What concerns the whole batch is made into values by token ahead of it."""
    c = batch.config
    sequences = batch.sequences(torch.float32)
    mask = None if batch.counts_everything else sequences.mask
    advantages, zero_std = batch.group_advantages()
    advantages = sequences.per_token(advantages)
    live = batch.live(sequences, advantages)
    if metrics == "active" and live is not None:
        mask, live = sequences.mask & live, None
    ratio = batch.importance_sampling_ratio
    entropy_items = None
    if c.entropy_coef != 0.0:
        chosen = sequences.mask if batch.entropy_mask is None else sequences.mask & batch.entropy_mask.bool()
        entropy_items = chosen.sum().clamp(min=1).float()
    mask = _flat(mask)
    entropy_mask = _flat(batch.entropy_mask)
    needs = wanted(hidden, weight, bias)
    rows, *gradients = linear_token_loss(
        weight_grad_out,
        as_rows(hidden.detach()),
        weight.detach(),
        None if bias is None else bias.detach(),
        _flat(batch.completion_ids),
        mask,
        _flat(live),
        _flat(advantages),
        _flat(token_weights(sequences, batch.num_items_in_batch, c).expand_as(sequences.mask)),
        _flat(batch.old_logps),
        _flat(batch.ref_logps) if c.beta != 0.0 else None,
        entropy_mask,
        None if ratio is None else _flat(sequences.per_token(ratio, 1.0)),
        threshold_tensor(batch),
        entropy_items,
        needs=needs,
        hidden_in_float32=False,
        label_smoothing=0.0,
        **term_options(c),
        **logits_options,
        **chunk_options,
    )
    results = sum_rows(
        rows,
        mask,
        None if batch.cu_seqlens is None else batch.cu_seqlens.contiguous(),
        entropy_mask,
        sequences.count,
        sequences.width or batch.completion_ids.numel(),
        c.beta != 0.0,
        c.entropy_coef,
        chunk_options["impl"],
    )
    loss, named = name_results(results, batch, zero_std)
    loss = known_gradients(loss, (hidden, weight, bias), gradients, needs, weight_grad_out, chunk_options["impl"])
    logps, entropy = (x.view(batch.completion_ids.shape) for x in rows[:2].unbind())
    return GRPOLossOutput(loss, logps, entropy, named)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


def _check_reference(
    shapes: Shapes, batch: LossBatch, ref_hidden: object, ref_weight: object, ref_bias: object, group: str | None
) -> None:
    """Check that the reference model's log-probs come from one place, and whole."""
    if ref_hidden is None:
        for name, x in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if x is not None:
                raise ValueError(f"{name}: got one without ref_hidden, want both or neither")
        return
    if ref_weight is None:
        raise ValueError("ref_weight: got None with ref_hidden, want the reference model's head")
    if batch.ref_logps is not None:
        raise ValueError("ref_hidden: got one beside ref_logps, want only one of the two")
    check_head(shapes, ref_hidden, ref_weight, ref_bias, batch.token_dims, of="ref_", group=group)
