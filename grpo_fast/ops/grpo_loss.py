"""The GRPO loss over logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast import backend
from grpo_fast.config import GRPOLossConfig
from grpo_fast.ops._checks import Shapes, check_logits_options, check_vocabulary
from grpo_fast.ops._known_gradient import KnownGradientFunction
from grpo_fast.ops._library import gradient_buffer, overwritten, plain_op
from grpo_fast.ops._loss_batch import GRPOLossOutput, LossBatch
from grpo_fast.ops._row_kernels import row_kernels
from grpo_fast.ops._token_loss import METRICS, name_results, term_options, threshold_tensor
from grpo_fast.ops._vocabulary_parallel import local_shards
from grpo_fast.ops.selective_log_softmax import logps_and_entropy
from grpo_fast.reference import accumulation_dtype

_DEFAULT = GRPOLossConfig()


def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    config: GRPOLossConfig = _DEFAULT,
    overwrite_logits: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
    impl: str | None = None,
) -> GRPOLossOutput:
    """The GRPO loss of completions under ``logits``: log-probs, ratio, clip, advantages, KL, metrics.

    DeepSeekMath, arXiv 2402.03300, section 4.1; the variants and their papers are in ``GRPOLossConfig``. Inputs are
    aligned: ``logits[..., t, :]`` is the distribution that ``completion_ids[..., t]`` was sampled from. Per-token
    tensors are padded (B, T), or packed (N,) with ``cu_seqlens``; below "token" stands for either.

    Args:
        logits: (token, V) float, any strides; a slice such as ``logits[:, P - 1 : -1]`` is taken as it is.
        completion_ids: (token) int. An id outside [0, V) that is not masked makes the loss NaN.
        completion_mask: (token); 1 where a token counts. What masked positions hold never matters.
        cu_seqlens: (B + 1,) int: 0, then where each packed sequence ends; rows past the last end are padding.
        advantages: (B,), (B, 1) or (token) float. Give either these or ``rewards``.
        rewards: (B,) float, normalized within their groups by ``group_advantages`` with ``config.scale_rewards``.
        group_size, group_ids: How the rewards are grouped, as in ``group_advantages``.
        old_logps: (token) float, log-probs of the policy that the ratio is taken against. None: on-policy, the
            ratio is 1 with the gradient of the log-prob.
        ref_logps: (token) float, log-probs of the reference model; needed when ``config.beta`` is not 0.
        sampling_logps: (token) float, log-probs the sampler reported, for ``config.off_policy_mask_threshold``;
            None takes ``old_logps``. NaN is a token it did not score.
        importance_sampling_ratio: (B,), (B, 1) or (token) float: multiplies the policy term, to correct for a
            sampler that differs from the old policy.
        entropy_mask: (token); the policy term and the entropy bonus act only where it is 1 (arXiv 2506.01939).
        entropy_threshold: The same by value: tokens of at least this entropy, in nats. A number or a 0-d tensor.
        num_items_in_batch: What ``dapo``, ``cispo`` and ``vespo`` divide by, a number or a 0-d tensor, of which
            less than 1 counts as 1; None takes the tokens that count in this batch, which are those of this process
            alone.
        temperature, logit_scale, softcap: As in ``selective_log_softmax``.
        overwrite_logits: Write the gradient over the logits, which saves a buffer as large. Their values are gone
            when this returns, or, for losses that need a whole sequence first, after the backward; with nothing to
            differentiate they stay. The ``"torch"`` implementation leaves them alone.
        process_group: ``logits`` are this rank's shard of the vocabulary, as in ``selective_log_softmax``; the
            other arguments and the results are the same on every rank of the group. The logits are then read twice,
            as for losses that need a whole sequence first.
        config: The loss's options.
        impl: None, or an implementation by name.

    Returns:
        ``GRPOLossOutput(loss, logps, entropy, metrics)``; the loss is differentiable in ``logits``. The kernels
        compute the gradient along with the loss and hand that buffer out, so they allow one backward.

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
    group, (logits,) = local_shards(process_group, -1, logits=logits)
    shapes = Shapes()
    shapes.check("logits", logits, (*batch.token_dims, "V"))
    check_vocabulary(shapes.dims["V"], group)
    batch.check(shapes)
    check_logits_options(temperature, logit_scale, softcap)

    implementation = backend.choose("grpo_loss", impl, logits)
    if implementation != "torch" and group is None and batch.is_known_by_token():
        return _fused(logits, batch, temperature, logit_scale, softcap, overwrite_logits, implementation)
    # The loss needs every token's log-prob first: log-probs, the reference on (B, T) values, then the gradient.
    sequences = batch.sequences(accumulation_dtype(logits))
    logps, entropy = logps_and_entropy(
        logits,
        completion_ids,
        mask=sequences.mask,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        return_entropy=True,
        overwrite_logits=overwrite_logits,
        impl=implementation,
        group=group,
    )
    return batch.loss(logps, entropy, sequences)


def _fused(
    logits: Tensor,
    batch: LossBatch,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    overwrite_logits: bool,
    impl: str,
) -> GRPOLossOutput:
    """The single-launch kernel over arguments that are checked."""
    c = batch.config
    rows = logits if logits.dim() == 3 else logits.unsqueeze(0)
    advantages, rewards, group_size, zero_std = batch.advantages, batch.rewards, batch.group_size, None
    if rewards is not None and group_size is None:  # scattered groups: by ids, before the kernel
        advantages, zero_std = batch.group_advantages()
        rewards = None
    needs_gradient = logits.requires_grad and torch.is_grad_enabled()
    source = rows.detach()
    gradient = (source if overwrite_logits else gradient_buffer(source)) if needs_gradient else None
    reduction, divisor, num_items = _reduction(batch)
    results, logps, entropy = _grpo_loss(
        gradient,
        None if overwrite_logits and needs_gradient else source,
        *(
            None if x is None else x.contiguous()
            for x in (
                batch.completion_ids,
                batch.completion_mask,
                batch.cu_seqlens,
                advantages,
                rewards,
                batch.old_logps,
                batch.ref_logps if c.beta != 0.0 else None,
                batch.entropy_mask,
                batch.importance_sampling_ratio,
            )
        ),
        threshold_tensor(batch),
        num_items,
        group_size=group_size or 1,
        divisor=divisor,
        reduction=reduction,
        scale_rewards=c.scale_rewards,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        **term_options(c),
        impl=impl,
    )
    if gradient is not None:
        overwritten(gradient)
    loss, metrics = name_results(results, batch, zero_std)
    if gradient is not None:
        loss = KnownGradientFunction.apply(loss, impl, rows, gradient)
    return GRPOLossOutput(loss, logps, entropy, metrics)


def _reduction(batch: LossBatch) -> tuple[str, float, Tensor | None]:
    """What the sum over tokens is divided by, as ``_grpo_loss`` takes it."""
    c, items = batch.config, batch.num_items_in_batch
    if c.loss_type in ("grpo", "sapo"):
        return "sequence_tokens", 1.0, None
    if c.loss_type == "luspo":
        return "sequences", 1.0, None
    if c.loss_type == "dr_grpo":
        length = c.max_completion_length
        return ("positions", 1.0, None) if length is None else ("sequences", float(length), None)
    if items is None or c.loss_type == "bnpo":
        return "tokens", 1.0, None
    if isinstance(items, Tensor):
        return "constant", 1.0, items
    return "constant", max(float(items), 1.0), None


def _fake_grpo_loss(
    gradient: Tensor | None, logits: Tensor | None, completion_ids: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    logps, entropy = (completion_ids.new_empty(completion_ids.shape, dtype=torch.float32) for _ in range(2))
    return logps.new_empty(1 + len(METRICS)), logps, entropy


@plain_op("grpo_loss", mutates="gradient", fake=_fake_grpo_loss)
def _grpo_loss(
    gradient: Tensor | None,
    logits: Tensor | None,
    completion_ids: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    advantages: Tensor | None,
    rewards: Tensor | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    entropy_mask: Tensor | None,
    sampler_ratio: Tensor | None,
    entropy_threshold: Tensor | None,
    num_items: Tensor | None,
    *,
    group_size: int,
    divisor: float,
    term: str,
    reduction: str,
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
    scale_rewards: str,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss and metrics, logps, entropy); ``gradient`` holds the logits where ``logits`` is None.

    ``divisor`` is multiplied by the number of "sequences", "positions" (B T), or, for "sequence_tokens", sequences.
    """
    source = gradient if logits is None else logits
    assert source is not None
    B = source.size(0) if cu_seqlens is None else cu_seqlens.numel() - 1
    counts = {"sequences": B, "sequence_tokens": B, "positions": B * source.size(1)}
    logps, entropy = (source.new_empty(completion_ids.shape, dtype=torch.float32) for _ in range(2))
    rows = (logps, entropy, *source.new_empty(4, completion_ids.numel(), dtype=torch.float32))
    zero_std = None if rewards is None else source.new_empty(B, dtype=torch.float32)
    results = source.new_empty(1 + len(METRICS), dtype=torch.float32)
    kernels = row_kernels(impl)
    kernels.loss_rows(
        rows,
        zero_std,
        gradient,
        source,
        completion_ids,
        mask,
        cu_seqlens,
        advantages,
        rewards,
        old_logps,
        ref_logps,
        entropy_mask,
        sampler_ratio,
        entropy_threshold,
        num_items,
        None,
        None,
        group_size=group_size,
        divisor=divisor * max(counts.get(reduction, 1), 1),
        term=term,
        reduction=reduction,
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
        scale_rewards=scale_rewards,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    kernels.sum_rows(
        results, rows, mask, cu_seqlens, entropy_mask, zero_std, B, source.size(1), beta != 0.0, entropy_coef
    )
    return results, logps, entropy
