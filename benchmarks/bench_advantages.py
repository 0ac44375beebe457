"""Group advantages from raw rewards: the smallest op, whose cost is its launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast import group_advantages

from .harness import Benchmark, Provider, Record, Task, Timer, run_task

NOTES = """\\
Rewards of whole groups, 0 or 1, scaled by the group's standard deviation. The ceiling is one addition to all of them,
so this counts launches. The fused losses take raw rewards and need none of it. Errors are against float64."""


@dataclass(frozen=True)
class Case:
    completions: int
    group_size: int
    device: str


@dataclass(frozen=True)
class Inputs:
    rewards: Tensor
    group_size: int


def _plain(rewards: Tensor, group_size: int) -> Tensor:
    groups = rewards.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


TASK = Task(
    "advantages",
    "one addition",
    (
        Provider("grpo_fast", lambda x: group_advantages(x.rewards, group_size=x.group_size), ours=True),
        Provider("torch eager", lambda x: _plain(x.rewards, x.group_size)),
    ),
    {"advantage": 1e-3},
)


def measure(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    torch.manual_seed(0)
    rewards = torch.randint(0, 2, (case.completions,)).float().to(case.device)
    truth = _plain(rewards.double(), case.group_size)

    def errors(result: Tensor) -> dict[str, float]:
        return {"advantage": (result.double() - truth).abs().max().item()}

    x = Inputs(rewards, case.group_size)
    return run_task(timer, case, TASK, x, ceiling=lambda: rewards + 1.0, takes_part=takes_part, errors=errors)


def benchmark(device: str) -> Benchmark:
    """On a GPU or on the CPU."""
    cases = tuple(Case(completions, 16, device) for completions in (64, 1024, 16384))
    return Benchmark(
        name="advantages",
        summary="group advantages from raw rewards",
        notes=NOTES,
        cases=cases,
        quick=cases[:1],
        headline=cases[0],
        measure=measure,
        title=lambda case: f"{case['completions']:,} completions in groups of {case['group_size']}, {case['device']}",
        device=device,
    )
