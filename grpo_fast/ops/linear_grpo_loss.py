"""The GRPO loss from hidden states: the logits are never whole in memory."""

from __future__ import annotations

from torch import Tensor

from grpo_fast import backend
from grpo_fast.config import GRPOLossConfig
from grpo_fast.ops._checks import Shapes, check_logits_options
from grpo_fast.ops._loss_batch import GRPOLossOutput, LossBatch
from grpo_fast.ops.linear_selective_log_softmax import check_head
from grpo_fast.reference import accumulation_dtype, linear_logps_ref

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
    sampling_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    config: GRPOLossConfig = _DEFAULT,
    impl: str | None = None,
) -> GRPOLossOutput:
    """``grpo_loss`` of the logits ``hidden @ weight.T + bias``, which are computed in chunks and dropped.

    Args:
        hidden: (token, H) float: (B, T, H), or (N, H) with ``cu_seqlens``. ``hidden[..., t, :]`` predicts
            ``completion_ids[..., t]``: of states over prompt and completion, the slice ``[:, P - 1 : -1]``.
        weight: (V, H) float, the head (lm_head); of any precision, the logits are accumulated in float32 (float64
            if either is) and never rounded.
        completion_ids: (token) int. An id outside [0, V) that is not masked makes the loss NaN.
        bias: (V,) float.
        completion_mask: (token); positions where it is 0 are not projected.
        cu_seqlens, advantages, rewards, group_size, group_ids, old_logps, ref_logps, sampling_logps,
        importance_sampling_ratio, entropy_mask, entropy_threshold, num_items_in_batch, temperature, logit_scale,
        softcap, config, impl: As in ``grpo_loss``.

    Returns:
        ``GRPOLossOutput(loss, logps, entropy, metrics)``; the loss is differentiable in ``hidden``, ``weight`` and
        ``bias``, whichever require it.

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
    shapes = Shapes()
    check_head(shapes, hidden, weight, bias, batch.token_dims)
    batch.check(shapes)
    check_logits_options(temperature, logit_scale, softcap)
    backend.choose("linear_grpo_loss", impl, hidden)

    sequences = batch.sequences(accumulation_dtype(hidden, weight))
    logps, entropy = linear_logps_ref(
        hidden,
        weight,
        completion_ids,
        bias=bias,
        mask=sequences.mask,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    return batch.loss(logps, entropy, sequences)
