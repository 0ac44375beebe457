"""Supervised steps on worked completions: the cold start on given traces, distillation on those of a teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo_fast import linear_cross_entropy
from grpo_fast.train.model import Policy
from grpo_fast.train.ranks import ALONE, Ranks
from grpo_fast.train.tasks import Problem, completion_text

#: A problem, and a completion to learn.
Example = tuple[Problem, str]


def worked(problems: Sequence[Problem]) -> list[Example]:
    """Problems with the ideal completion that each comes with."""
    return [(problem, completion_text(problem)) for problem in problems]


def supervised_loss(policy: Policy, examples: Sequence[Example], ranks: Ranks = ALONE) -> torch.Tensor:
    """Mean cross entropy of the completions' tokens, prompts left out: this rank's part of it."""
    prompts = [policy.prompt(problem) for problem, _ in examples]
    completions = [policy.completion(text) for _, text in examples]
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(examples), width), policy.pad_id)
    labels = torch.full((len(examples), width), -100)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
        mask[row, :end] = True
    ids, labels, mask = (x.to(policy.device) for x in (ids, labels, mask))
    states = policy.forward(ids, mask, use_cache=False).last_hidden_state  # (B, L, H)
    count = ranks.sum((labels[:, 1:] != -100).sum())
    return linear_cross_entropy(states[:, :-1], labels=labels[:, 1:], num_items_in_batch=count, **policy.head)
