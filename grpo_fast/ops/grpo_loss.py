"""The GRPO loss over logits."""

from __future__ import annotations

from torch import Tensor

from grpo_fast import backend
from grpo_fast.config import GRPOLossConfig
from grpo_fast.ops._checks import Shapes, check_logits_options, check_vocabulary
from grpo_fast.ops._loss_batch import GRPOLossOutput, LossBatch
from grpo_fast.ops.selective_log_softmax import fused_logps_and_entropy
from grpo_fast.reference import accumulation_dtype, logps_and_entropy_ref

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
        num_items_in_batch: What ``dapo``, ``cispo`` and ``vespo`` divide by, a number or a 0-d tensor; None takes
            the tokens that count in this batch. Nothing is reduced across processes here.
        temperature, logit_scale, softcap, overwrite_logits: As in ``selective_log_softmax``.
        config: The loss's options.
        impl: None, or an implementation by name.

    Returns:
        ``GRPOLossOutput(loss, logps, entropy, metrics)``; the loss is differentiable in ``logits``.

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
    shapes.check("logits", logits, (*batch.token_dims, "V"))
    check_vocabulary(shapes.dims["V"])
    batch.check(shapes)
    check_logits_options(temperature, logit_scale, softcap)

    sequences = batch.sequences(accumulation_dtype(logits))
    if backend.choose("grpo_loss", impl, logits) == "torch":
        logps, entropy = logps_and_entropy_ref(
            logits,
            completion_ids,
            mask=sequences.mask,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
        )
    else:
        logps, entropy = fused_logps_and_entropy(
            logits,
            completion_ids,
            sequences.mask,
            temperature,
            logit_scale,
            softcap,
            return_entropy=True,
            overwrite_logits=overwrite_logits,
        )
    return batch.loss(logps, entropy, sequences)
