"""The GRPO loss and its gradients from hidden states with ``sparse_grad_tol``: time and error by tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_fast import linear_grpo_loss, linear_selective_log_softmax

from . import bench_linear
from .bench_linear import SEQUENCES, logps_trl, truth
from .harness import DEVICE, Benchmark, Provider, Record, Task, Timer, run_task

NOTES = """\
The ceiling is the three matrix products alone, in bfloat16 by cuBLAS: "dense" is at or above it, a tolerance below it
where rows are peaked. A row is sure of its token (a logit of 16 to 40 above a spread of 2), open between 8 tokens,
or flat; the title has the shares. Errors are against float64, as in the benchmark `linear`. The error of "dense", the
rounding of bfloat16, is what a tolerance is to be held against."""
TOLERANCES = (1e-2, 3e-3, 1e-3)


@dataclass(frozen=True)
class Case:
    rows: int = 8192
    hidden: int = 2048
    vocabulary: int = 151936
    open: float = 0.2  # share of rows between 8 tokens
    flat: float = 0.0  # share of rows with none that stands out

    # What bench_linear's tasks ask of a case.
    padding: float = 0.0
    frozen_head: bool = False
    workspace_mib: int = 2048


def title(case: dict[str, Any]) -> str:
    shares = f"{case['open']:.0%} of the rows open, {case['flat']:.0%} flat"
    return f"N {case['rows']:,}, H {case['hidden']:,}, V {case['vocabulary']:,}, {shares}"


BASE = Case()
FULL = (
    BASE,
    replace(BASE, hidden=4096),
    replace(BASE, open=0.0),
    replace(BASE, open=0.8),
    replace(BASE, flat=0.1),
    replace(BASE, open=0.0, flat=1.0),
)


class Inputs(bench_linear.Inputs):
    """A batch of 8 sequences whose rows are sure, open or flat."""

    def __init__(self, case: Case) -> None:
        shape = (SEQUENCES, case.rows // SEQUENCES)
        V, H = case.vocabulary, case.hidden
        self.case = case  # type: ignore[assignment]
        self.weight = (torch.randn(V, H, device=DEVICE) / math.sqrt(H)).bfloat16()
        self.ids = torch.randint(0, V, shape, device=DEVICE)
        kind = torch.rand(shape, device=DEVICE)
        flat, is_open = kind < case.flat, kind >= 1 - case.open
        heights = torch.where(flat, 0.0, 16 + 24 * torch.rand(shape, device=DEVICE))
        self.hidden = torch.empty(*shape, H, device=DEVICE, dtype=torch.bfloat16)
        for b in range(SEQUENCES):
            others = self.weight[torch.randint(0, V, (shape[1], 7), device=DEVICE)].float()
            near = torch.where(is_open[b, :, None], 18 + torch.randn(shape[1], 7, device=DEVICE), 0.0)
            height = torch.where(is_open[b], 18.0, heights[b])
            states = 2 * torch.randn(shape[1], H, device=DEVICE) + height[:, None] * self.weight[self.ids[b]].float()
            self.hidden[b] = (states + torch.einsum("tk,tkh->th", near, others)).bfloat16()
        self.weight.requires_grad_()
        self.hidden.requires_grad_()
        self.mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
        self.advantages = torch.randn(SEQUENCES, device=DEVICE)
        self.beta = 0.0
        with torch.no_grad():
            logps = linear_selective_log_softmax(self.hidden, self.weight, self.ids)
        assert isinstance(logps, Tensor)
        self.old_logps = logps + 0.1 * torch.randn_like(logps)
        self.ref_logps = self.old_logps
        self.where = self.mask.nonzero(as_tuple=True)


def loss(x: Inputs, tolerance: float | None) -> tuple[Tensor, ...]:
    """(loss, d_hidden, d_weight)."""
    found = linear_grpo_loss(
        x.hidden, x.weight, x.ids, advantages=x.advantages, old_logps=x.old_logps, sparse_grad_tol=tolerance
    )
    return x.gradients(found.loss)


LOSS = Task(
    "loss + gradients",
    "the products",
    (
        Provider("grpo_fast, dense", lambda x: loss(x, None), ours=True),
        *(Provider(f"grpo_fast, {t:.0e}", partial(loss, tolerance=t), ours=True) for t in TOLERANCES),
        Provider("TRL", lambda x: x.gradients(x.torch_loss(logps_trl(x)))),
    ),
    {"d hidden": 0.1, "d weight": 0.1},
)


def measure(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    torch.manual_seed(0)
    x = Inputs(case)
    expected = truth(x)

    def errors(result: Any) -> dict[str, float]:
        pairs = {
            "d hidden": (result[1].flatten(0, -2)[expected["some"]], expected["d_hidden"]),
            "d weight": (result[2][expected["words"]], expected["d_weight"]),
        }
        return {name: ((got.double() - true).norm() / true.norm()).item() for name, (got, true) in pairs.items()}

    ceiling = bench_linear.products(x, bench_linear.LOSS)
    return run_task(timer, case, LOSS, x, ceiling=ceiling, takes_part=takes_part, errors=errors)


BENCHMARK = Benchmark(
    name="sparse",
    summary="the GRPO loss with its gradients from hidden states, with sparse_grad_tol",
    notes=NOTES,
    cases=FULL,
    quick=FULL[:1],
    headline=BASE,
    measure=measure,
    title=title,
)
