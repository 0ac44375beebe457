"""How good a policy is, measured as in the DeepSeek-R1 paper: pass@k from samples, cons@k, greedy accuracy."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from grpo_fast.train.corrections import count_corrections
from grpo_fast.train.model import Policy
from grpo_fast.train.rewards import extract_answer, format_reward
from grpo_fast.train.rollout import Rollout, sample
from grpo_fast.train.tasks import Problem, Split, Task

#: Words by which a completion shows that it goes over its own reasoning again.
RECHECKS: tuple[str, ...] = ("wait", "check", "recheck", "verify", "again", "hmm", "actually", "mistake", "let me re")

#: Sizes of a majority vote that are measured where there are samples enough.
CONSENSUS: tuple[int, ...] = (16, 64)

# Groups of like length that accuracy is given for, at most.
_LENGTHS = 8


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and manner of a policy on some problems; shares are between 0 and 1.

    Attributes:
        problems: How many problems.
        samples: How many sampled completions of each (k).
        greedy: Share of problems whose likeliest completion is right.
        pass_at_1: Mean over problems of the share of right samples (arXiv 2501.12948, section 3).
        pass_at_1_se: Its standard error, samples of a problem taken together as one draw.
        cons_at_k: Share of problems where the answer most samples give is right.
        pass_at: [k, estimate, standard error] of pass@k, for powers of 2 up to ``samples``.
        cons_at: [k, estimate, standard error] of the majority vote among k samples, for ``CONSENSUS``: each
            problem's samples give as many votes as k goes into them.
        mean_length: Mean tokens of the samples, end token included.
        truncated: Share of samples that did not end.
        well_formed: Share of samples in the format of ``format_reward``.
        rechecks: Share of samples that hold one of ``RECHECKS``.
        right_if_rechecked: Share of right ones among those samples; None where there is none.
        corrections: As ``Corrections``, over the samples.
        by_length: [mean tokens, samples, share right] of samples of like length, shortest first.
        examples: The first problems with their greedy completions.
    """

    problems: int
    samples: int
    greedy: float
    pass_at_1: float
    pass_at_1_se: float
    cons_at_k: float
    pass_at: list[list[float]]
    cons_at: list[list[float]]
    mean_length: float
    truncated: float
    well_formed: float
    rechecks: float
    right_if_rechecked: float | None
    corrections: dict[str, int]
    by_length: list[list[float]]
    examples: list[dict[str, Any]]


def evaluate(
    policy: Policy,
    task: Task,
    split: Split,
    *,
    problems: int,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch: int = 512,
) -> Evaluation:
    """Measure a policy on the first problems of a split.

    Args:
        policy: The model.
        task: Where the problems come from, and what verifies answers.
        split: ``"dev"`` or ``"test"`` for problems no training step has seen.
        problems: How many, at least 1.
        samples: Completions sampled of each, at least 1.
        max_new_tokens: Longest completion, in tokens.
        temperature: Of the samples; the greedy ones have none.
        seed: The samples follow from it, and from ``batch``.
        batch: Completions that are sampled at once, at least 1.

    Raises:
        ValueError: ``problems``, ``samples`` or ``batch`` is below 1.
    """
    for name, value in (("problems", problems), ("samples", samples), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, want at least 1")
    chosen = task.problems(split, 0, problems)
    generator = torch.Generator(policy.device).manual_seed(seed)

    def complete(group_size: int, temperature: float) -> list[Rollout]:
        step = max(1, batch // group_size)
        return [
            sample(
                policy,
                [policy.prompt(p) for p in chosen[start : start + step]],
                group_size=group_size,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                generator=generator,
            )
            for start in range(0, problems, step)
        ]

    greedy = [text for rollout in complete(1, 0.0) for text in rollout.texts]
    sampled = complete(samples, temperature)
    texts = [text for rollout in sampled for text in rollout.texts]
    groups = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    right = [[_right(task, p, text) for text in group] for p, group in zip(chosen, groups, strict=True)]
    mean, error = mean_and_error([sum(r) / samples for r in right])
    answers = [[extract_answer(text) for text in group] for group in groups]

    def consensus(k: int) -> tuple[float, float]:
        votes = [[majority(given[i : i + k]) for i in range(0, samples - k + 1, k)] for given in answers]
        shares = [[task.verify(vote, p) for vote in each] for p, each in zip(chosen, votes, strict=True)]
        return mean_and_error([sum(each) / len(each) for each in shares])

    greedy_right = [_right(task, p, text) for p, text in zip(chosen, greedy, strict=True)]
    lengths = torch.cat([rollout.completion_mask.sum(1) for rollout in sampled]).tolist()
    each_right = [ok for group in right for ok in group]
    rechecked = [ok for text, ok in zip(texts, each_right, strict=True) if rechecks(text)]
    return Evaluation(
        problems=problems,
        samples=samples,
        greedy=sum(greedy_right) / problems,
        pass_at_1=mean,
        pass_at_1_se=error,
        cons_at_k=consensus(samples)[0],
        pass_at=[
            [k, *mean_and_error([pass_at_k(samples, sum(r), k) for r in right])]
            for k in (2**i for i in range(samples.bit_length()))
        ],
        cons_at=[[k, *consensus(k)] for k in CONSENSUS if k <= samples],
        mean_length=sum(lengths) / len(lengths),
        truncated=torch.cat([rollout.truncated for rollout in sampled]).float().mean().item(),
        well_formed=sum(r or 0.0 for r in format_reward(texts)) / len(texts),
        rechecks=len(rechecked) / len(texts),
        right_if_rechecked=sum(rechecked) / len(rechecked) if rechecked else None,
        corrections=asdict(count_corrections(texts)),
        by_length=accuracy_by_length(lengths, each_right),
        examples=[
            {"question": p.compact, "answer": p.answer, "completion": text, "right": ok}
            for p, text, ok in list(zip(chosen, greedy, greedy_right, strict=True))[:6]
        ],
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values and its standard error (0 for a single one)."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that one of k samples is right, estimated without bias from ``right`` of ``samples``.

    1 - C(n - c, k) / C(n, k), of arXiv 2107.03374, section 2.1.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def accuracy_by_length(lengths: Sequence[int], right: Sequence[bool]) -> list[list[float]]:
    """Samples of like length together, those of one length never apart: mean length, how many, share right."""
    least = len(lengths) / _LENGTHS
    groups: list[list[tuple[int, bool]]] = [[]]
    for length, ok in sorted(zip(lengths, right, strict=True)):
        if len(groups[-1]) >= least and groups[-1][-1][0] != length:
            groups.append([])
        groups[-1].append((length, ok))
    return [[sum(n for n, _ in g) / len(g), len(g), sum(ok for _, ok in g) / len(g)] for g in groups]


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the earlier one in a tie; None is no vote."""
    votes = Counter(answer.strip() for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def rechecks(text: str) -> bool:
    """Whether a completion holds one of ``RECHECKS`` as a word."""
    return re.search(rf"\b({'|'.join(RECHECKS)})", text, re.IGNORECASE) is not None


def _right(task: Task, problem: Problem, text: str) -> bool:
    return task.verify(extract_answer(text), problem)
