"""The update on a batch of completions: the gradient of the GRPO loss, then the optimizer's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_fast import linear_grpo_loss, linear_selective_log_softmax
from grpo_fast.train.model import Policy
from grpo_fast.train.ranks import ALONE, Ranks
from grpo_fast.train.rollout import Rollout
from grpo_fast.train.settings import Settings

#: The losses that divide by the tokens of the whole batch; the others are means over its sequences.
_TOKEN_NORMALIZED = ("dapo", "cispo", "vespo")


def grpo_gradients(
    policy: Policy,
    batch: Rollout,
    rewards: Tensor,
    ref_logps: Tensor | None,
    settings: Settings,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Accumulate the gradient over slices of whole groups, and over the ranks.

    Args:
        policy: The model that learns; gets the gradients.
        batch: B completions, whose ``logps`` are the old ones of the ratio.
        rewards: (B,), NaN where unscorable; the loss normalizes them within their groups.
        ref_logps: (B, T) under the reference model, needed with ``settings.beta``.
        settings: The run's.
        ranks: Each has completions of its own, which are the batch together.

    Returns:
        The loss's metrics as numbers (means over slices weighted by their rows), and ``loss``.
    """
    config = settings.loss()
    num_items = ranks.sum(batch.completion_mask.sum()) if settings.loss_type in _TOKEN_NORMALIZED else None
    all_rows = sum(ranks.gather(rewards.numel()))
    metrics: defaultdict[str, float] = defaultdict(float)
    for rows in slices(rewards.numel(), settings.micro_prompts * settings.group_size):
        micro, share = batch.part(rows), rewards[rows].numel() / all_rows
        out = linear_grpo_loss(
            micro.hidden_states(policy),  # (b, T, H)
            completion_ids=micro.completion_ids,
            completion_mask=micro.completion_mask,
            rewards=rewards[rows],
            group_size=settings.group_size,
            old_logps=micro.logps,
            ref_logps=None if ref_logps is None else ref_logps[rows],
            num_items_in_batch=num_items,
            temperature=settings.temperature,
            config=config,
            **policy.head,
        )
        # A loss divided by num_items is its part of the batch's already; a mean counts by its rows.
        loss = out.loss * share if num_items is None else out.loss
        loss.backward()
        metrics["loss"] += loss.item()
        for name, value in out.metrics.items():
            if name == "ratio/max":
                metrics[name] = max(metrics[name], value.item())
            elif name not in ("policy_loss", "num_active_tokens"):
                metrics[name] += value.item() * share
    ranks.sum_gradients(policy.model.parameters())
    return _over_ranks(metrics, ranks)


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Clip the gradients, take the step, clear them; returns their norm before."""
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def _over_ranks(metrics: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """Each rank's part of the batch's metrics, put together."""
    parts = ranks.gather(metrics)
    return {name: (max if name == "ratio/max" else sum)(part[name] for part in parts) for name in metrics}


@torch.no_grad()
def reference_logps(reference: Policy, batch: Rollout, settings: Settings) -> Tensor:
    """Log-probs (B, T) of the batch's completions under the reference model; 0 where masked."""
    parts = []
    for rows in slices(len(batch.texts), settings.micro_prompts * settings.group_size):
        micro = batch.part(rows)
        logps = linear_selective_log_softmax(
            micro.hidden_states(reference),
            index=micro.completion_ids,
            mask=micro.completion_mask,
            temperature=settings.temperature,
            **reference.head,
        )
        assert isinstance(logps, Tensor)
        parts.append(logps)
    return torch.cat(parts)


def slices(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``count`` rows in order."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
