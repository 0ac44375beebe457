"""The clipped policy loss from log-probs that a trainer already has, by the definition that the ops have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast.config import GRPOLossConfig
from grpo_fast.ops._loss_batch import LossBatch


def clipped_policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    of_means: bool,
    divisor: float | Tensor | None,
    weights: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The sum of the loss over tokens, or over the sequences' means, divided by ``divisor``.

    Args:
        log_ratio: (B, T) float, the log-probs minus those of the policy that sampled; differentiable.
        advantages: (B, T) float.
        mask: (B, T); where it is 0, nothing counts.
        of_means: Average each sequence's tokens before the sum.
        divisor: None for the number of tokens that count, or, ``of_means``, of sequences that have any.
        weights: (B, T) float, what the terms are multiplied by.
        **options: Of ``GRPOLossConfig``.

    Returns:
        (loss, share of the tokens whose ratio is clipped), scalars.

    Raises:
        ValueError: An option is out of its range; the message names it.
    """
    batch = LossBatch(
        completion_ids=mask,
        completion_mask=mask,
        advantages=advantages,
        old_logps=torch.zeros_like(log_ratio),
        importance_sampling_ratio=weights,
        config=GRPOLossConfig(loss_type="grpo" if of_means else "bnpo", **options),
    )
    sequences = batch.sequences(log_ratio.dtype)
    loss, _, _, metrics = batch.loss(log_ratio, torch.zeros_like(log_ratio), sequences)
    if of_means:
        count = (sequences.lengths > 0).sum().clamp(min=1) if divisor is None else divisor
        loss = loss * (sequences.count / count)
    elif divisor is not None:
        loss = loss * (sequences.lengths.sum() / divisor)
    return loss, metrics["clip_ratio/region_mean"]


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Of ``x`` (B, T) over the tokens that count: a scalar."""
    return torch.where(mask.bool(), x, 0.0).sum() / mask.sum().clamp(min=1)
