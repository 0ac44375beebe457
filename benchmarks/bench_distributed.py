"""On several GPUs: the loss over a vocabulary in shards, and a training step under FSDP2.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m grpo_fast.benchmarks.bench_distributed --out docs/results

NCCL_NVLS_ENABLE=0 leaves NVLink multicast off. Without GPUs the ranks talk over gloo, about tiny sizes, to be tested.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast import GRPOLossConfig, linear_grpo_loss
from grpo_fast.train.ranks import Ranks

from . import bench_fsdp, bench_linear
from .harness import DEVICE, Benchmark, Provider, Record, Task, Timer, run_task
from .measure import Chosen, measure_cases
from .ranks import TimerTogether, merged

NOTES = """\
One problem, of N tokens in all, on the number of GPUs that the table's title says, which start each run together; a
time is that of the slowest. "One GPU" has the whole head, and every GPU does all of the work. In shards, each
has 1/R of the vocabulary and all hidden states. The ceiling of the loss is a shard's matrix products alone: three.
"its collectives alone" are the messages of one step without the products, beside a single all-reduce of the hidden
states' gradient in bfloat16. verl returns that gradient by shard; the all-reduce that its caller has to add is in its
time. Errors are against float64 on one GPU: the loss, and, relative in the Frobenius norm, the gradients of
64 hidden states and of up to 64 rows of this rank's part of the head, the largest of all ranks. Memory is the peak of
a GPU beyond inputs; of these the head is 2 V H bytes whole, and 1/R of it in shards."""


@dataclass(frozen=True)
class Case:
    rows: int = 8192
    hidden: int = 2048
    vocabulary: int = 151936
    ranks: int = 2


class Inputs(bench_linear.Inputs):
    """The same on every rank, and this rank's shard of the head."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        super().__init__(bench_linear.Case(case.rows, case.hidden, case.vocabulary))
        for x in (self.hidden, self.weight, self.ids, self.advantages, self.old_logps, self.ref_logps):
            dist.broadcast(x.detach(), 0)
        self.bounds = [case.vocabulary * r // case.ranks for r in range(case.ranks + 1)]
        begin, end = self.bounds[dist.get_rank() :][:2]
        self.shard = self.weight.detach()[begin:end].requires_grad_()

    def shard_gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """(loss, d_hidden, gradient of the shard)."""
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.shard))


def one_gpu(x: Inputs) -> tuple[Tensor, ...]:
    return x.gradients(bench_linear.loss_ours(x))


def in_shards(x: Inputs) -> tuple[Tensor, ...]:
    loss = linear_grpo_loss(
        x.hidden,
        x.shard,
        x.ids,
        advantages=x.advantages,
        old_logps=x.old_logps,
        ref_logps=x.ref_logps,
        config=GRPOLossConfig(beta=x.beta, use_bias_correction_kl=False),
        process_group=dist.group.WORLD,
    ).loss
    return x.shard_gradients(loss)


def verl_in_shards(x: Inputs) -> tuple[Tensor, ...]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    hidden = x.hidden.flatten(0, 1)
    found = linear_cross_entropy(hidden, x.shard, x.ids.flatten(), 1.0, "none", dist.group.WORLD)
    loss, d_hidden, d_shard = x.shard_gradients(x.torch_loss(found[0].view(x.ids.shape)))
    dist.all_reduce(d_hidden)
    return loss, d_hidden, d_shard


def messages_ours(x: Inputs) -> None:
    """Sizes as docs/distributed.md has them."""
    N = x.ids.numel()
    mine = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    dist.all_gather([torch.empty_like(mine) for _ in range(dist.get_world_size())], mine)
    dist.all_reduce(torch.zeros(N, dtype=torch.float64, device=DEVICE), dist.ReduceOp.MAX)
    dist.all_reduce(torch.zeros(3, N, dtype=torch.float64, device=DEVICE))
    dist.all_reduce(torch.zeros(N, x.hidden.size(-1), device=DEVICE))


def messages_verl(x: Inputs) -> None:
    """A maximum for each 1,024 columns of a shard, three statistics, and the caller's d_hidden."""
    N, splits = x.ids.numel(), -(-x.shard.size(0) // 1024)
    dist.all_reduce(torch.zeros(splits, N, device=DEVICE), dist.ReduceOp.MAX)
    dist.all_reduce(torch.zeros(N, device=DEVICE))
    dist.all_reduce(torch.zeros(2, N, device=DEVICE))
    dist.all_reduce(torch.zeros_like(x.hidden))


LOSS = Task(
    "loss + gradients",
    "a shard's products",
    (
        Provider("grpo_fast, one GPU", one_gpu, ours=True),
        Provider("grpo_fast, in shards", in_shards, ours=True),
        Provider("verl, in shards", verl_in_shards),
    ),
    {"loss": 1e-3, "d hidden": 0.1, "d weight": 0.1},
)
MESSAGES = Task(
    "its collectives alone",
    "all-reduce of d_hidden",
    (
        Provider("grpo_fast, in shards", messages_ours, ours=True, comparable=False),
        Provider("verl, in shards", messages_verl, comparable=False),
    ),
    {},
)


def products(x: Inputs) -> Callable[[], None]:
    """The three matrix products of a shard."""
    hidden, weight = x.hidden.detach().flatten(0, 1), x.shard.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return run


def measure(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    x = Inputs(case)
    expected = bench_linear.truth(x)
    true_loss = x.torch_loss(expected["logps"])
    words = expected["words"]

    def errors(result: Any) -> dict[str, float]:
        loss, d_hidden, d_weight = result
        begin, end = (0, case.vocabulary) if len(d_weight) == case.vocabulary else x.bounds[dist.get_rank() :][:2]
        here = (words >= begin) & (words < end)
        pairs = {
            "d hidden": (d_hidden.flatten(0, -2)[expected["some"]], expected["d_hidden"]),
            "d weight": (d_weight[words[here] - begin], expected["d_weight"][here]),
        }
        norms = {k: ((got.double() - true).norm() / true.norm()).item() for k, (got, true) in pairs.items()}
        return {"loss": abs(loss.double() - true_loss).item(), **norms}

    records = run_task(timer, case, LOSS, x, ceiling=products(x), takes_part=takes_part, errors=errors)
    d_hidden = torch.zeros_like(x.hidden)
    records += run_task(timer, case, MESSAGES, x, ceiling=lambda: dist.all_reduce(d_hidden), takes_part=takes_part)
    return merged(records)


COMMAND = "NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m grpo_fast.benchmarks.bench_distributed"
BENCHMARK = Benchmark(
    name="distributed",
    summary="the GRPO loss with its gradients from hidden states, the vocabulary in shards",
    notes=NOTES,
    cases=(Case(), Case(hidden=4096)),
    quick=(Case(),),
    headline=Case(),
    measure=measure,
    title=lambda c: f"N {c['rows']:,}, H {c['hidden']:,}, V {c['vocabulary']:,}, {c['ranks']} GPUs",
    device=DEVICE,
    command=COMMAND,
)


def cases(ranks: int) -> tuple[Case, ...]:
    if DEVICE == "cpu":
        return (Case(64, 16, 50, ranks),)
    return tuple(replace(case, ranks=ranks) for case in BENCHMARK.cases)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {BENCHMARK.name: (BENCHMARK, cases), "fsdp": (bench_fsdp.BENCHMARK, bench_fsdp.cases)}
    parser.add_argument("names", nargs="*", metavar="BENCHMARK", help=f"{', '.join(names)} (default: both)")
    parser.add_argument("--runs", type=int, default=10, help="timed runs of each; the median counts (default: 10)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write BENCHMARK.json there")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in names:
            parser.error(f"benchmark: got {name!r}, want {', '.join(names)}")
    ranks = Ranks.join()
    if ranks.count < 2:
        parser.error(f"got {ranks.count} process, want at least 2: {COMMAND}")
    try:
        for name in options.names or names:
            benchmark, cases_of = names[name]
            measure_cases(
                replace(benchmark, cases=cases_of(ranks.count)),
                quick=False,
                takes_part=Chosen(),
                runs=options.runs,
                out=options.out if ranks.first else None,
                timer=TimerTogether(options.runs, device=DEVICE),
                quiet=not ranks.first,
            )
    finally:
        ranks.leave()


if __name__ == "__main__":
    main()
