"""The update on a batch of completions: the gradient of the GRPO loss, then the optimizer's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from grpo_fast import GRPOLossOutput, linear_grpo_loss, linear_selective_log_softmax
from grpo_fast.train.model import Policy
from grpo_fast.train.ranks import ALONE, Ranks
from grpo_fast.train.rollout import Rollout
from grpo_fast.train.settings import Settings
from grpo_fast.train.sharding import whole

#: The losses that divide by the tokens of the whole batch; the others are means over its sequences.
_TOKEN_NORMALIZED = ("dapo", "cispo", "vespo")


def grpo_gradients(
    policy: Policy,
    batch: Rollout,
    advantages: Tensor,
    ref_logps: Tensor | None,
    settings: Settings,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Accumulate the gradient over slices of the batch, and over the ranks.

    Args:
        policy: The model that learns; gets the gradients.
        batch: B completions, whose ``logps`` are the old ones of the ratio.
        advantages: (B,), as ``group_advantages`` makes them of the rewards of all ranks.
        ref_logps: (B, T) under the reference model, needed with ``settings.beta``.
        settings: The run's.
        ranks: Each has as many completions of its own, which are the batch together.

    Returns:
        The loss's metrics as numbers (means over slices weighted by their rows), and ``loss``.
    """
    num_items = ranks.sum(batch.completion_mask.sum()) if settings.loss_type in _TOKEN_NORMALIZED else None
    metrics: defaultdict[str, float] = defaultdict(float)
    for rows in slices(advantages.numel(), settings.micro_prompts * settings.group_size):
        ref = None if ref_logps is None else ref_logps[rows]
        out = policy.inside(partial(_loss, policy, batch.part(rows), advantages[rows], ref, num_items, settings))
        share = advantages[rows].numel() / (advantages.numel() * ranks.count)
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


def _loss(
    policy: Policy,
    batch: Rollout,
    advantages: Tensor,
    ref_logps: Tensor | None,
    num_items: Tensor | None,
    settings: Settings,
) -> GRPOLossOutput:
    return linear_grpo_loss(
        batch.hidden_states(policy),  # (b, T, H)
        completion_ids=batch.completion_ids,
        completion_mask=batch.completion_mask,
        advantages=advantages,
        old_logps=batch.logps,
        ref_logps=ref_logps,
        num_items_in_batch=num_items,
        temperature=settings.temperature,
        config=settings.loss(),
        **policy.head,
    )


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Clip the gradients, take the step, clear them; returns their norm before."""
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return whole(norm).item()


def _over_ranks(metrics: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """Each rank's part of the batch's metrics, put together."""
    parts = ranks.gather(metrics)
    return {name: (max if name == "ratio/max" else sum)(part[name] for part in parts) for name in metrics}


@torch.no_grad()
def reference_logps(reference: Policy, batch: Rollout, settings: Settings) -> Tensor:
    """Log-probs (B, T) of the batch's completions under the reference model; 0 where masked."""
    every = slices(len(batch.texts), settings.micro_prompts * settings.group_size)
    parts = [reference.inside(partial(_logps, reference, batch.part(rows), settings.temperature)) for rows in every]
    return torch.cat(parts)


def _logps(policy: Policy, batch: Rollout, temperature: float) -> Tensor:
    logps = linear_selective_log_softmax(
        batch.hidden_states(policy),
        index=batch.completion_ids,
        mask=batch.completion_mask,
        temperature=temperature,
        **policy.head,
    )
    assert isinstance(logps, Tensor)
    return logps


def slices(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``count`` rows in order."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
