"""Divergence between a student's and a teacher's distributions, with its gradients, from hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_fast import linear_distillation_loss

from .harness import DEVICE, Benchmark, Provider, Record, Task, Timer, run_task

NOTES = """\
The ceiling is the matrix products alone, by cuBLAS in the inputs' precision: the student's logits, the teacher's, and
two for the student's gradients. `beta` 0 is the forward KL, 1 the reverse KL, between them the generalized
Jensen-Shannon divergence (GKD). Errors are relative: of the loss, and of the gradient of hidden states in the
Frobenius norm, against float64. The reference path, plain PyTorch, takes part in the smallest case only."""


@dataclass(frozen=True)
class Case:
    rows: int = 4096
    student_hidden: int = 1024
    teacher_hidden: int = 4096
    vocabulary: int = 151936
    beta: float = 0.5
    dtype: str = "bfloat16"


BASE = Case()
SMALLEST = replace(BASE, rows=1024)


class Inputs:
    """A student that leans the teacher's way."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        V, dtype = case.vocabulary, getattr(torch, case.dtype)

        def states_and_head(size: int) -> list[Tensor]:
            return [
                torch.randn(case.rows, size, device=DEVICE).to(dtype),
                (torch.randn(V, size, device=DEVICE) * 2 / math.sqrt(size)).to(dtype),
            ]

        self.case = case
        self.student = tuple(x.requires_grad_() for x in states_and_head(case.student_hidden))
        self.teacher = tuple(states_and_head(case.teacher_hidden))

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, self.student)


def _plain(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """From (N, V) logits."""
    s, t = (torch.log_softmax(x, -1) for x in (student, teacher))
    if beta == 0.0:
        return (t.exp() * (t - s)).sum(-1).mean()
    if beta == 1.0:
        return (s.exp() * (s - t)).sum(-1).mean()
    m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    return (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1).mean()


def ours(x: Inputs, impl: str | None = None) -> Any:
    return x.gradients(linear_distillation_loss(*x.student, *x.teacher, beta=x.case.beta, impl=impl))


def trl(x: Inputs) -> Any:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    (hidden, weight), (teacher_hidden, teacher_weight) = x.student, x.teacher
    mask = torch.ones(1, x.case.rows, device=DEVICE)
    found = _chunked_divergence_loss(hidden[None], teacher_hidden[None], weight, teacher_weight, mask, x.case.beta)
    return x.gradients(found[0])


def liger(x: Inputs) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=x.case.beta)
    labels = torch.zeros(x.case.rows, dtype=torch.int64, device=DEVICE)
    return x.gradients(module(*x.student, *x.teacher, labels))


def eager(x: Inputs) -> Any:
    student, teacher = (hidden @ weight.T for hidden, weight in (x.student, x.teacher))
    return x.gradients(_plain(student.float(), teacher.float(), x.case.beta))


TASK = Task(
    "divergence + gradients",
    "the products",
    (
        Provider("grpo_fast", ours, ours=True),
        Provider("grpo_fast's reference", partial(ours, impl="torch"), ours=True, only_in=SMALLEST),
        Provider("TRL", trl),
        Provider("Liger fused linear JSD", liger),
        Provider("torch eager", eager, bytes_of=lambda case: 40 * case.rows * case.vocabulary),
    ),
    {"loss": 0.02, "d hidden": 0.1},
)


def products(x: Inputs) -> Callable[[], None]:
    (hidden, weight), (teacher_hidden, teacher_weight) = (
        (y.detach() for y in pair) for pair in (x.student, x.teacher)
    )
    logits = torch.empty(x.case.rows, x.case.vocabulary, device=DEVICE, dtype=hidden.dtype)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(teacher_hidden, teacher_weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return run


def truth(x: Inputs) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by hidden states, in float64, some rows at a time."""
    weight, teacher_weight = x.student[1].detach().double(), x.teacher[1].double()
    total, parts = torch.zeros((), dtype=torch.float64, device=DEVICE), []
    for h, t in zip(x.student[0].detach().split(256), x.teacher[0].split(256), strict=True):
        hidden = h.double().requires_grad_()
        share = len(h) / x.case.rows
        loss = share * _plain(hidden @ weight.T, t.double() @ teacher_weight.T, x.case.beta)
        parts.append(torch.autograd.grad(loss, hidden)[0])
        total += loss.detach()
    return total, torch.cat(parts)


def measure(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    x = Inputs(case)
    loss, d_hidden = truth(x)

    def errors(result: Any) -> dict[str, float]:
        return {
            "loss": abs((result[0].double() - loss) / loss).item(),
            "d hidden": ((result[1].double() - d_hidden).norm() / d_hidden.norm()).item(),
        }

    return run_task(timer, case, TASK, x, ceiling=products(x), takes_part=takes_part, errors=errors)


BENCHMARK = Benchmark(
    name="distillation",
    summary="the divergence from a teacher with its gradients, from both models' hidden states",
    notes=NOTES,
    cases=(BASE, replace(BASE, beta=0.0), replace(BASE, beta=1.0), SMALLEST, replace(BASE, rows=16384)),
    quick=(SMALLEST,),
    headline=BASE,
    measure=measure,
    title=lambda case: (
        f"N {case['rows']:,}, H {case['student_hidden']:,} and {case['teacher_hidden']:,}, V {case['vocabulary']:,}, "
        f"beta {case['beta']:g}, {case['dtype']}"
    ),
    axes=("rows",),
)
