"""Sampling: groups of completions from one batched pass with a key-value cache, log-probs kept."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from grpo_fast.train.graphed import can_be_graphed, graphed_decoder, next_token
from grpo_fast.train.model import Policy


@dataclass(frozen=True)
class Rollout:
    """Completions of some prompts; the B rows go prompt by prompt, a group's side by side.

    Attributes:
        prompt_ids: (B, P) int64, padded on the left.
        prompt_mask: (B, P) bool.
        completion_ids: (B, T) int64, padded on the right, the end token included.
        completion_mask: (B, T) bool.
        logps: (B, T) float32 log-probs under the policy, at the temperature of the sampling; 0 where masked.
        texts: The completions without end and padding tokens.
        truncated: (B,) bool, no end token within ``max_new_tokens``.
        importance_sampling_ratio: (B, T), the policy's probability over the sampler's, truncated from above; None
            where they are the same.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    logps: Tensor
    texts: list[str]
    truncated: Tensor
    importance_sampling_ratio: Tensor | None = None

    def part(self, rows: slice) -> Rollout:
        """Some of the rows."""
        values: list[Any] = [getattr(self, f.name) for f in fields(self)]
        parts: list[Any] = [None if value is None else value[rows] for value in values]
        return Rollout(*parts)

    def hidden_states(self, policy: Policy) -> Tensor:
        """Hidden states (B, T, H) of ``policy`` that predict the completions."""
        ids = torch.cat([self.prompt_ids, self.completion_ids], 1)
        mask = torch.cat([self.prompt_mask, self.completion_mask], 1)
        return policy.hidden_states(ids, mask)[:, self.prompt_ids.size(1) - 1 : -1]


def pad_left(rows: list[list[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids as one tensor (B, P), padded on the left, and its mask.

    Raises:
        ValueError: A row is empty, so that nothing would predict what follows it.
    """
    if not all(rows):
        raise ValueError(f"prompts: got no tokens in prompt {[*map(len, rows)].index(0)}, want one at least in each")
    width = max(map(len, rows))
    ids = torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) >= (width - lengths)[:, None]


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[list[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
) -> Rollout:
    """Sample ``group_size`` completions of each prompt; ``temperature`` 0 takes the likeliest token instead."""
    prompt_ids, prompt_mask = pad_left(prompts, policy.pad_id, policy.device)
    was_training = policy.model.training
    policy.model.eval()

    # Each prompt is read once; its keys and values are then shared out to its group.
    out = policy.forward(prompt_ids, prompt_mask, use_cache=True)
    cache = getattr(out, policy.cache_name)
    hidden = out.last_hidden_state[:, -1].repeat_interleave(group_size, 0)  # (B, H)
    prompt_ids, prompt_mask = (x.repeat_interleave(group_size, 0) for x in (prompt_ids, prompt_mask))
    if can_be_graphed(policy, cache):
        rows, width = prompt_ids.shape
        decoder = graphed_decoder(policy, cache, rows, width, max_new_tokens, temperature)
        decoder.begin(cache, hidden, prompt_mask)
        length = decoder.run(generator)
        ids, logps, kept = (x[:, :length].clone() for x in (decoder.ids, decoder.logps, decoder.kept))
        alive = decoder.alive.clone()
    else:
        cache.batch_repeat_interleave(group_size)
        ids, logps, kept, alive = _decode(policy, cache, hidden, prompt_mask, max_new_tokens, temperature, generator)
    policy.model.train(was_training)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=ids,
        completion_mask=kept,
        logps=logps,
        texts=[policy.decode(row) for row in ids.cpu()],
        truncated=alive,
    )


def _decode(
    policy: Policy,
    cache: Any,
    hidden: Tensor,
    prompt_mask: Tensor,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, logps, kept (B, T), alive (B,)) after as many steps as the longest completion has tokens.

    Rows that have ended are dropped whenever a quarter of those left have: a step's time goes by its rows, and by
    what the cache holds, which grows by copying. Noise is drawn for all of them, so that what a completion says does
    not depend on when others end.
    """
    rows, width = prompt_mask.shape
    mask = prompt_mask.new_zeros(rows, width + max_new_tokens)  # of the rows left, as are hidden and alive
    mask[:, :width] = prompt_mask
    ids = torch.full((rows, max_new_tokens), policy.pad_id, device=policy.device)
    logps = torch.zeros(rows, max_new_tokens, device=policy.device)
    kept = prompt_mask.new_zeros(rows, max_new_tokens)
    left = torch.arange(rows, device=policy.device)
    alive = prompt_mask.new_ones(rows)
    for position in range(max_new_tokens):
        log_p = policy.log_probs(hidden, temperature or 1.0)  # (rows left, V)
        noise = None
        if temperature > 0:
            noise = log_p.new_empty(rows, log_p.size(1)).exponential_(generator=generator)[left]
        token = next_token(log_p, noise).where(alive, policy.pad_id)
        ids[left, position] = token
        logps[left, position] = log_p.gather(-1, token[:, None]).squeeze(-1).where(alive, 0.0)
        kept[left, position] = mask[:, width + position] = alive
        alive = alive & (token != policy.eos_id)
        going = alive.nonzero().squeeze(-1)
        if going.numel() == 0 or position == max_new_tokens - 1:
            break
        if 4 * going.numel() <= 3 * alive.numel():
            cache.batch_select_indices(going)
            mask, token, left, alive = (x[going] for x in (mask, token, left, alive))
        seen = mask[:, : width + position + 1]
        out = policy.forward(token[:, None], seen, use_cache=True, **{policy.cache_name: cache})
        hidden = out.last_hidden_state[:, -1]
    unended = prompt_mask.new_zeros(rows)
    unended[left] = alive
    return ids[:, : position + 1], logps[:, : position + 1], kept[:, : position + 1], unended
