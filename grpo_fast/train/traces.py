"""Rejection sampling: a teacher answers problems, and what is right and well formed is kept for a student to learn.

As the traces that DeepSeek-R1 was distilled by (arXiv 2501.12948, sections 2.3.3 and 2.4).
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from grpo_fast.train.files import write_json
from grpo_fast.train.model import Policy
from grpo_fast.train.progress import progress
from grpo_fast.train.rewards import extract_answer, format_reward
from grpo_fast.train.rollout import sample
from grpo_fast.train.supervised import Example
from grpo_fast.train.tasks import Task


@dataclass(frozen=True)
class Traces:
    """Kept completions of train problems.

    Attributes:
        kept: (index of the problem in the train split, completion), distinct.
        sampled, right, well_formed: How many completions there were, and of those how many were each.
        seconds: What they took.
    """

    kept: list[tuple[int, str]]
    sampled: int
    right: int
    well_formed: int
    seconds: float

    def examples(self, task: Task) -> list[Example]:
        """What a student learns from."""
        return [(task.problem("train", index), text) for index, text in self.kept]

    def write(self, path: Path) -> None:
        """As JSON."""
        write_json(path, asdict(self))

    @staticmethod
    def read(path: Path) -> Traces:
        """What ``write`` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return Traces(**{**found, "kept": [(index, text) for index, text in found["kept"]]})


def collect(
    policy: Policy,
    task: Task,
    *,
    first: int,
    problems: int,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch: int = 512,
) -> Traces:
    """Sample completions of train problems, and keep those that are right and well formed, each once.

    Args:
        policy: The teacher.
        task: Where the problems come from, and what verifies answers.
        first: Index of the first problem; those it was trained on come before.
        problems, samples: How many problems, and completions of each.
        max_new_tokens, temperature: Of the sampling.
        seed: Everything random follows from it, and from ``batch``.
        batch: Completions that are sampled at once.
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    kept: dict[tuple[int, str], None] = {}
    sampled = right = well_formed = 0
    started = time.perf_counter()
    step = max(batch // samples, 1)
    starts = range(first, first + problems, step)
    with progress("traces", len(starts)) as advance:
        for start in starts:
            indices = range(start, min(start + step, first + problems))
            chosen = [task.problem("train", index) for index in indices]
            prompts = [policy.prompt(problem) for problem in chosen]
            texts = sample(
                policy,
                prompts,
                group_size=samples,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                generator=generator,
            ).texts
            formed = format_reward(texts)
            for row, text in enumerate(texts):
                problem = row // samples
                is_right = task.verify(extract_answer(text), chosen[problem])
                sampled, right, well_formed = sampled + 1, right + is_right, well_formed + bool(formed[row])
                if is_right and formed[row]:
                    kept[indices[problem], text] = None
            advance(f"{len(kept)} kept of {sampled}")
    return Traces(list(kept), sampled, right, well_formed, time.perf_counter() - started)
