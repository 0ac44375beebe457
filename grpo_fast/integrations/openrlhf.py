"""OpenRLHF: an ``Actor`` that scores tokens without logits, and its ``PolicyLoss`` by the definition of the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grpo_fast.integrations._policy_loss import clipped_policy_loss, mean
from grpo_fast.integrations._versions import require

require("openrlhf", oldest="0.11", below="0.12")

from openrlhf.models import Actor, PolicyLoss  # noqa: E402
from openrlhf.models.ring_attn_utils import gather_and_pad_tensor, unpad_and_slice_tensor  # noqa: E402

from grpo_fast.integrations.transformers import is_patched, patch_causal_lm  # noqa: E402

_THEIR_ACTOR, _THEIR_LOSS = Actor.forward, PolicyLoss.forward


def patch_openrlhf() -> None:
    """Let every ``Actor``, made before or after, return log-probs and entropy without logits, and ``PolicyLoss`` too.

    Log-probs come from ``linear_selective_log_softmax``; beside an ``action_mask`` only the tokens that it keeps are
    projected, and ``output.entropy`` is 0 elsewhere. A call that asks for logits alone gets them as before. The head
    is checked at an actor's first call.

    Each process that trains has to call it: with Ray, by ``runtime_env={"worker_process_setup_hook":
    "grpo_fast.integrations.openrlhf.patch_openrlhf"}`` in ``ray.init``, which OpenRLHF leaves to whoever comes first.

    Raises:
        ValueError: At a call, for a vision-language model; for ring attention; for a head that is more than a
            ``torch.nn.Linear``, an adapter or shards of tensor parallelism, for example.
    """
    Actor.forward, PolicyLoss.forward = actor_forward, policy_loss_forward


def unpatch_openrlhf() -> None:
    """Give OpenRLHF its own functions back; nothing, if it has them."""
    Actor.forward, PolicyLoss.forward = _THEIR_ACTOR, _THEIR_LOSS


def actor_forward(
    self: Actor,
    sequences: Tensor,
    action_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    ring_attn_group: Any = None,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
    **mm_inputs: Any,
) -> Any:
    """What ``Actor.forward`` returns of ``sequences`` (B, T), its ``output`` without logits.

    That is the log-probs (B, A) of the last A tokens times ``action_mask`` (B, A), or, with ``return_logprobs`` and
    without a mask, those of all but the first token (B, T - 1); with ``return_output``, (log-probs, output).
    """
    if action_mask is None and not return_logprobs:
        options = dict(return_output=return_output, allgather_logits=allgather_logits, return_entropy=return_entropy)
        layout = dict(ring_attn_group=ring_attn_group, packed_seq_lens=packed_seq_lens)
        return _THEIR_ACTOR(self, sequences, None, attention_mask, **options, **layout, **mm_inputs)
    if mm_inputs or getattr(self, "is_vlm", False):
        raise ValueError("mm_inputs: got a vision-language model, want one of text")
    if ring_attn_group is not None:
        raise ValueError("ring_attn_group: got one, want None (ring attention is not supported)")
    if return_entropy and not return_output:
        raise ValueError("return_entropy: got True without return_output, want both: the output has it")
    _patch_model(self)
    shape = sequences.shape
    counts = torch.ones_like(sequences)
    if action_mask is not None:  # the last token predicts nothing
        counts = functional.pad(action_mask.long(), (shape[1] - 1 - action_mask.size(1), 1))
    if self.packing_samples:
        sequences, position_ids, labels, _, indices = unpad_and_slice_tensor(sequences, attention_mask, None)
        attention_mask, counts = None, counts.flatten()[indices].view_as(labels)
    else:
        if attention_mask is None:
            raise ValueError("attention_mask: got None without packing, want (B, T)")
        labels = sequences.roll(-1, 1)
        position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    output = self.model(
        sequences,
        attention_mask=attention_mask,
        position_ids=position_ids,
        shift_labels=labels.masked_fill(counts == 0, -100),
    )

    def of_next_tokens(x: Tensor) -> Tensor:
        return (gather_and_pad_tensor(x, None, 0, indices, *shape) if self.packing_samples else x)[:, :-1]

    log_probs = of_next_tokens(output.logps)
    output.entropy = of_next_tokens(output.entropy) if return_entropy else None
    if action_mask is not None:
        log_probs = log_probs[:, -action_mask.size(1) :]
    return (log_probs, output) if return_output else log_probs


def _patch_model(actor: Actor) -> None:
    """Let the model under DeepSpeed and PEFT return log-probs, unless it does so already."""
    model = actor.model
    model = getattr(model, "module", model)  # DeepSpeed's engine
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not is_patched(model):
        patch_causal_lm(model, temperature=actor.temperature)


def policy_loss_forward(
    self: PolicyLoss,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``PolicyLoss.forward``: every option of it, of PPO and GSPO.

    Args:
        log_probs, old_log_probs, advantages, rollout_log_probs: (B, A) float.
        action_mask: (B, A); None where every token counts.
        dp_size: What the loss is multiplied by, if one of the next two divides it.
        batch_num_tokens, global_batch_size: What the sum over tokens, or over sequences' means, is divided by; None
            for the number in this batch.

    Returns:
        (loss, share of ratios that are clipped, mean of old minus new log-probs, the same of rollout minus old, share
        that the correction filters), scalars; the last two are None without a correction of PPO.

    Raises:
        ValueError: An option is out of its range; the message names it.
    """
    mask = torch.ones_like(log_probs) if action_mask is None else action_mask
    gspo = self.policy_loss_type == "gspo"
    if not gspo and self.policy_loss_type != "ppo":
        raise ValueError(f"policy_loss_type: got {self.policy_loss_type!r}, want 'ppo' or 'gspo'")
    log_ratio, weights, divergence, filtered = log_probs - old_log_probs, None, None, None
    if self.is_correction_level != "off":
        if rollout_log_probs is None:
            level = self.is_correction_level
            raise ValueError(f"rollout_log_probs: got None with is_correction_level={level!r}, want (B, A)")
        if gspo:
            log_ratio = log_probs - rollout_log_probs
        else:
            weights, filtered = _rollout_correction(self, old_log_probs, rollout_log_probs, mask)
            divergence = mean(rollout_log_probs - old_log_probs, mask)
    divisor = batch_num_tokens if self.token_level_loss else global_batch_size
    loss, clipped = clipped_policy_loss(
        log_ratio if gspo else log_ratio.clamp(-20.0, 20.0),
        advantages,
        mask,
        of_means=not self.token_level_loss,
        divisor=divisor,
        weights=weights,
        importance_sampling_level="sequence" if gspo else "token",
        epsilon_low=self.clip_eps_low,
        epsilon_high=self.clip_eps_high,
        dual_clip=self.dual_clip,
    )
    moved = mean((old_log_probs - log_probs).detach(), mask)
    return loss * (1 if divisor is None else dp_size), clipped, moved, divergence, filtered


def _rollout_correction(loss: PolicyLoss, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(weights (B, A), share of tokens or sequences outside of the thresholds), of policy over rollout."""
    low, high = loss.is_correction_threshold
    by_sequence, by_ratio = loss.is_correction_level == "seq", loss.is_correction_gating == "ratio"
    log_ratio = (old - rollout).detach()
    if by_ratio:
        statistic = log_ratio
    else:
        q, p = (x.detach().exp().clamp(1e-6, 1 - 1e-6) for x in (old, rollout))
        binary_kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        statistic = binary_kl if loss.is_correction_gating == "binary_kl" else (p - q).abs()
    if by_sequence:
        total = torch.where(mask.bool(), statistic, 0.0).sum(-1, keepdim=True)
        statistic = total / mask.sum(-1, keepdim=True).clamp(min=1)
    statistic = statistic.exp() if by_ratio else statistic
    outside = (statistic < low) | (statistic > high)
    share = outside.float().mean() if by_sequence else mean(outside.float(), mask)
    if loss.is_correction_mode == "clip":
        return statistic.clamp(low, high), share
    return log_ratio.exp().masked_fill(outside, 0.0), share
