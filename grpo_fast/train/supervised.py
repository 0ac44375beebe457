"""Supervised steps on worked completions: the cold start on given traces, distillation on those of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast import linear_cross_entropy, linear_distillation_loss
from grpo_fast.train.model import Policy
from grpo_fast.train.ranks import ALONE, Ranks
from grpo_fast.train.tasks import Problem, completion_text

#: A problem, and a completion to learn.
Example = tuple[Problem, str]


def worked(problems: Sequence[Problem]) -> list[Example]:
    """Problems with the ideal completion that each comes with."""
    return [(problem, completion_text(problem)) for problem in problems]


@dataclass(frozen=True)
class Batch:
    """Examples as tensors (B, L), padded on the right.

    Attributes:
        ids: Prompts and completions.
        mask: Where there are any, bool.
        labels: (B, L - 1), what each position predicts: the completions' tokens, -100 elsewhere.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor

    @staticmethod
    def of(policy: Policy, examples: Sequence[Example]) -> Batch:
        """With the policy's tokens, on its device."""
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
        return Batch(*(x.to(policy.device) for x in (ids, mask, labels[:, 1:])))

    def states(self, policy: Policy) -> Tensor:
        """(B, L - 1, H) hidden states that predict the labels."""
        return policy.hidden_states(self.ids, self.mask)[:, :-1]


def supervised_loss(policy: Policy, examples: Sequence[Example], ranks: Ranks = ALONE) -> Tensor:
    """Mean cross entropy of the completions' tokens, prompts left out: this rank's part of it."""
    batch = Batch.of(policy, examples)
    count = ranks.sum((batch.labels != -100).sum())
    return policy.inside(
        lambda: linear_cross_entropy(
            batch.states(policy), labels=batch.labels, num_items_in_batch=count, **policy.head
        )
    )


def divergence_loss(student: Policy, teacher: Policy, examples: Sequence[Example], beta: float) -> Tensor:
    """Cross entropy and, added to it, the mean divergence from the teacher's distribution over the same tokens.

    Both models have the same vocabulary. ``beta`` as in ``linear_distillation_loss``: 0 is the forward KL.
    """
    batch = Batch.of(student, examples)
    states = batch.states(student)
    with torch.no_grad():
        targets = batch.states(teacher)
    heads = {
        f"{of}_{name}": x for of, p in (("student", student), ("teacher", teacher)) for name, x in p.head.items()
    }
    divergence = linear_distillation_loss(
        states, teacher_hidden=targets, completion_mask=batch.labels != -100, beta=beta, **heads
    )
    return linear_cross_entropy(states, labels=batch.labels, **student.head) + divergence
