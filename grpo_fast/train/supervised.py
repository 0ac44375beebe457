"""The cold start: supervised steps on worked traces, so that the model knows the format and sometimes is right."""

from __future__ import annotations

import torch

from grpo_fast import linear_cross_entropy
from grpo_fast.train.model import Policy
from grpo_fast.train.ranks import ALONE, Ranks
from grpo_fast.train.tasks import Problem, completion_text


def supervised_loss(policy: Policy, problems: list[Problem], ranks: Ranks = ALONE) -> torch.Tensor:
    """Mean cross entropy of the worked completions' tokens, prompts left out: this rank's part of it."""
    prompts = [policy.prompt(p) for p in problems]
    completions = [policy.completion(completion_text(p)) for p in problems]
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(problems), width), policy.pad_id)
    labels = torch.full((len(problems), width), -100)
    mask = torch.zeros(len(problems), width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
        mask[row, :end] = True
    ids, labels, mask = (x.to(policy.device) for x in (ids, labels, mask))
    states = policy.forward(ids, mask, use_cache=False).last_hidden_state  # (B, L, H)
    count = ranks.sum((labels[:, 1:] != -100).sum())
    return linear_cross_entropy(states[:, :-1], labels=labels[:, 1:], num_items_in_batch=count, **policy.head)
