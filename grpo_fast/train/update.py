"""The update on a batch of completions: the gradient of the GRPO loss, then the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from grpo_fast import GRPOLossOutput, group_advantages, linear_grpo_loss, linear_selective_log_softmax
from grpo_fast.train.model import Policy
from grpo_fast.train.ranks import ALONE, Ranks
from grpo_fast.train.rollout import Rollout
from grpo_fast.train.settings import Settings
from grpo_fast.train.sharding import whole


def advantages_over_ranks(rewards: Tensor, settings: Settings, ranks: Ranks = ALONE) -> Tensor:
    """Advantages (B,) of this rank's completions, over groups, or a batch, that other ranks have a part of.

    Args:
        rewards: (B,), NaN where unscorable; B is the same on every rank, and their rewards after one another are
            those of the batch.
        settings: The run's.
        ranks: All of them call this.
    """
    everyones = torch.cat(ranks.gather(rewards))
    advantages = group_advantages(everyones, group_size=settings.group_size, scale=settings.loss().scale_rewards)
    return advantages.chunk(ranks.count)[ranks.rank]


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
        advantages: (B,), of ``advantages_over_ranks``.
        ref_logps: (B, T) under the reference model, needed with ``settings.beta``.
        settings: The run's.
        ranks: Each has as many completions of its own, which are the batch together.

    Returns:
        The loss's metrics over the batch as numbers, and ``loss``.
    """
    num_items = ranks.sum(batch.completion_mask.sum()) if settings.loss().divides_by_items else None
    parts = []
    for rows in slices(advantages.numel(), settings.micro_prompts * settings.group_size):
        micro, ref = batch.part(rows), None if ref_logps is None else ref_logps[rows]
        out = policy.inside(partial(_loss, policy, micro, advantages[rows], ref, num_items, settings))
        # A loss divided by num_items is its part of the batch's already; a mean counts by its rows.
        count = advantages[rows].numel()
        loss = out.loss if num_items is not None else out.loss * (count / (advantages.numel() * ranks.count))
        loss.backward()
        parts.append({**{name: x.item() for name, x in out.metrics.items()}, "loss": loss.item(), "rows": count})
    ranks.sum_gradients(policy.model.parameters())
    return _of_batch([part for of_rank in ranks.gather(parts) for part in of_rank], settings)


def _of_batch(parts: list[dict[str, float]], settings: Settings) -> dict[str, float]:
    """The metrics of the batch in one piece, from those of its slices: sums, extremes, means by tokens or rows."""
    tokens, rows = ([part.pop(name) for part in parts] for name in ("num_active_tokens", "rows"))
    found = {}
    for name in (name for name in parts[0] if name != "policy_loss"):
        values = [part[name] for part in parts]
        by_rows = settings.importance_sampling_level == "sequence" and name not in ("entropy", "kl")
        if name == "loss":
            found[name] = sum(values)
        elif name.endswith(("min", "max")):
            found[name] = (min if name.endswith("min") else max)(values)
        else:
            weights = rows if by_rows or name == "vespo/phi_seq_mean" else tokens
            found[name] = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    return found


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
        importance_sampling_ratio=batch.importance_sampling_ratio,
        num_items_in_batch=num_items,
        temperature=settings.temperature,
        config=settings.loss(),
        sparse_grad_tol=settings.sparse_grad_tol or None,
        **policy.head,
    )


def check_sparse_grad_tol(policy: Policy, settings: Settings) -> None:
    """Have the loss look at its ``sparse_grad_tol``, with the policy's head and one token, before any is sampled.

    Raises:
        ValueError: The loss cannot have it here; the message says why.
    """
    if not settings.sparse_grad_tol:
        return

    def loss_of_one() -> None:
        head = policy.head
        hidden = head["weight"].new_zeros(1, 1, head["weight"].size(1), requires_grad=True)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
        with torch.enable_grad():  # with none to make, the loss asks less
            linear_grpo_loss(
                hidden,
                completion_ids=ids,
                advantages=torch.ones(1, device=hidden.device),
                sparse_grad_tol=settings.sparse_grad_tol,
                **head,
            )

    with torch.no_grad():  # a sharded model would wait for a backward
        policy.inside(loss_of_one)


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Clip the gradients, take the step, clear them; returns their norm before."""
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return whole(norm).item()


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
