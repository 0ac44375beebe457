"""What runs without a GPU: the reference path of the losses, and a step of the training loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast import grpo_loss, linear_grpo_loss

from .harness import Benchmark, Provider, Record, Task, Timer, run_task

NOTES = """\\
The reference path in plain PyTorch on a CPU, float32: what tests and the demo run on. The ceiling of a loss is what
reads and writes its logits once, that of a training step is its sampling. Errors are against float64."""


@dataclass(frozen=True)
class Case:
    """A loss over rows x vocabulary logits, from hidden states if there are any; or a step of the demo."""

    rows: int = 512
    vocabulary: int = 8192
    hidden: int = 0
    step: bool = False


@dataclass
class Inputs:
    """Leaves: logits, or hidden states and the head."""

    ids: Tensor
    advantages: Tensor
    leaves: tuple[Tensor, ...]

    @classmethod
    def random(cls, case: Case) -> Inputs:
        torch.manual_seed(0)
        shape = (4, case.rows // 4)
        ids, advantages = torch.randint(0, case.vocabulary, shape), torch.randn(4)
        leaves = [torch.randn(*shape, case.hidden or case.vocabulary).requires_grad_()]
        if case.hidden:
            leaves.append((torch.randn(case.vocabulary, case.hidden) / case.hidden**0.5).requires_grad_())
        return cls(ids, advantages, tuple(leaves))

    def logits(self) -> Tensor:
        return self.leaves[0] if len(self.leaves) == 1 else self.leaves[0] @ self.leaves[1].T

    def reference(self) -> tuple[Tensor, ...]:
        """(loss, gradients) of grpo_fast."""
        if len(self.leaves) == 1:
            loss = grpo_loss(self.leaves[0], self.ids, advantages=self.advantages, impl="torch").loss
        else:
            hidden, weight = self.leaves
            loss = linear_grpo_loss(hidden, weight, self.ids, advantages=self.advantages, impl="torch").loss
        return loss.detach(), *torch.autograd.grad(loss, self.leaves)

    def eager(self) -> tuple[Tensor, ...]:
        """The same of a few lines of torch."""
        logps = torch.log_softmax(self.logits(), -1).gather(-1, self.ids[..., None])[..., 0]
        loss = -((logps - logps.detach()).exp() * self.advantages[:, None]).mean()
        return loss.detach(), *torch.autograd.grad(loss, self.leaves)


LOSS = Task(
    "loss + gradients",
    "a copy of the logits",
    (
        Provider("grpo_fast's reference", lambda x: x.reference(), ours=True),
        Provider("torch eager", lambda x: x.eager()),
    ),
    {"gradient": 1e-4},
)
STEP = Task("a step of the demo", "its sampling", (Provider("grpo_fast", lambda x: x.step(None), ours=True),), {})


def measure(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    if case.step:
        return _measure_step(timer, case, takes_part)
    x = Inputs.random(case)
    doubles = tuple(leaf.detach().double().requires_grad_() for leaf in x.leaves)
    truth = replace(x, leaves=doubles).reference()[1]

    def errors(result: Any) -> dict[str, float]:
        return {"gradient": ((result[1].double() - truth).norm() / truth.norm()).item()}

    original = x.logits().detach()
    copied = torch.empty_like(original)

    def copy() -> None:
        copied.copy_(original)

    return run_task(timer, case, LOSS, x, ceiling=copy, takes_part=takes_part, errors=errors)


def _measure_step(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    from grpo_fast.train.model import quiet_transformers
    from grpo_fast.train.settings import Settings
    from grpo_fast.train.trainer import Run

    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(beta=0.0, device="cpu")
        run = Run(settings, Path(folder))
        problems = run.task.problems("train", 0, settings.prompts)

        def sample() -> None:
            run.sample(problems, settings.group_size)

        return run_task(timer, case, STEP, run, ceiling=sample, takes_part=takes_part)


def title(case: dict[str, Any]) -> str:
    if case["step"]:
        return "the demo's model and batch, untrained"
    source = f"from hidden states of {case['hidden']:,}" if case["hidden"] else "logits"
    return f"{case['rows']:,} x {case['vocabulary']:,}, {source}"


BENCHMARK = Benchmark(
    name="reference",
    summary="the reference path and a step of the training loop, on the CPU",
    notes=NOTES,
    cases=(Case(), Case(vocabulary=32768), Case(hidden=256), Case(step=True)),
    quick=(Case(rows=128), Case(rows=128, hidden=256)),
    headline=Case(),
    measure=measure,
    title=title,
    device="cpu",
)
