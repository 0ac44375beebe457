"""Log-probs, and the GRPO loss with its gradient, over logits in memory: time, bandwidth, memory and error.

    python benchmarks/bench_logits.py                     # every size, a few minutes on an H200
    python benchmarks/bench_logits.py --sizes 8192x151936 # one of them
    python benchmarks/bench_logits.py --out docs/results/logits-h200.json

Every provider gets the same inputs. Tokens are sampled from the logits; old and reference log-probs lie near the
policy's. Before a provider is timed, its result is held against float64 on some of the rows. "of read" and "of copy"
are the shares of what reading, or reading and writing, the logits once takes at the bandwidth that torch reaches in
the same run. Peers are run when they are installed: pip install trl liger-kernel quack-kernels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Timer, attempt, ceilings, environment, peak_memory, write_json
from torch import Tensor

from grpo_fast import GRPOLossConfig, grpo_loss, selective_log_softmax
from grpo_fast.reference import logps_and_entropy_ref

CONFIG = GRPOLossConfig(beta=0.04, use_bias_correction_kl=False)  # what every peer can compute
ROWS = (64, 512, 2048, 8192, 32768, 65536)
VOCABULARIES = (32000, 49152, 128256, 151937, 262144)
SIZES = [f"{rows}x151936" for rows in ROWS] + [f"8192x{vocabulary}" for vocabulary in VOCABULARIES]
CHECKED_ROWS = 64
# The providers that make a float32 copy of the logits, or several, are not asked at larger sizes.
EAGER_ELEMENTS = 8192 * 151936


@dataclass
class Inputs:
    """A batch of 8 sequences. Liger takes the logits of one position more, which it ignores."""

    logits: Tensor  # (8, T + 1, V)
    ids: Tensor  # (8, T)
    advantages: Tensor  # (8,)
    old_logps: Tensor = field(init=False)
    ref_logps: Tensor = field(init=False)

    @classmethod
    def random(cls, rows: int, vocabulary: int, dtype: torch.dtype) -> Inputs:
        shape = (8, rows // 8 + 1, vocabulary)
        logits = torch.empty(shape, device="cuda", dtype=dtype)
        ids = torch.empty(shape[:2], device="cuda", dtype=torch.int64)
        for t in range(shape[1]):  # by the Gumbel trick, a position at a time
            logits[:, t].normal_(0.0, 2.0)
            noise = -torch.empty(8, vocabulary, device="cuda").exponential_().log()
            ids[:, t] = (logits[:, t].float() + noise).argmax(-1)
        inputs = cls(logits, ids[:, :-1].contiguous(), torch.randn(8, device="cuda"))
        with torch.no_grad():
            logps = selective_log_softmax(inputs.tokens, inputs.ids)
        assert isinstance(logps, Tensor)
        inputs.old_logps, inputs.ref_logps = (logps + 0.1 * torch.randn_like(logps) for _ in range(2))
        return inputs

    @property
    def tokens(self) -> Tensor:
        """The logits of the completion tokens: a view."""
        return self.logits[:, :-1]


# Providers: each a function of the inputs that returns log-probs, or (loss, gradient) ----------------------------


def logps_ours(x: Inputs, impl: str) -> Any:
    return selective_log_softmax(x.tokens, x.ids, return_entropy=True, impl=impl)[0]


def logps_entropy_reference(x: Inputs) -> Any:
    return logps_and_entropy_ref(x.tokens, x.ids)[0]


def logps_eager(x: Inputs) -> Any:
    return torch.log_softmax(x.tokens.float(), -1).gather(-1, x.ids[..., None])[..., 0]


def logps_liger(x: Inputs) -> Any:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return fused_selective_log_softmax(x.logits, x.ids, 1.0)


def logps_entropy_trl(x: Inputs) -> Any:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(x.tokens, x.ids)[0]


def _rows(x: Inputs) -> tuple[Tensor, Tensor]:
    """Logits as rows and a token each, without a copy: those of the position that nothing asks for are there too."""
    return x.logits.flatten(0, 1), torch.nn.functional.pad(x.ids, (0, 1)).flatten()


def logps_quack(x: Inputs) -> Any:
    from quack.cross_entropy import cross_entropy_fwd

    return -cross_entropy_fwd(*_rows(x)).view(x.logits.shape[:2])[:, :-1]


def _grpo(x: Inputs, logits: Tensor, **options: Any) -> Tensor:
    return grpo_loss(
        logits,
        x.ids,
        advantages=x.advantages,
        old_logps=x.old_logps,
        ref_logps=x.ref_logps,
        config=CONFIG,
        **options,
    ).loss


def _with_gradient(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
    leaf = leaf.detach().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def grpo_ours(x: Inputs, impl: str, in_place: bool) -> Any:
    return _with_gradient(lambda z: _grpo(x, z, impl=impl, overwrite_logits=in_place), x.tokens)


def grpo_reference(x: Inputs) -> Any:
    """With entropy and metrics."""
    return _with_gradient(lambda z: _grpo(x, z, impl="torch"), x.tokens)


def grpo_eager(x: Inputs) -> Any:
    return _with_gradient(lambda z: _plain(x, z), x.tokens)


def grpo_liger_in_place(x: Inputs) -> Any:
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    def loss(z: Tensor) -> Tensor:
        return GrpoLossFunction.apply(
            z, x.old_logps, x.ref_logps, x.ids, x.advantages, None, 1.0, CONFIG.beta, 0.2, 0.2, True, "dapo"
        )[0]

    value, gradient = _with_gradient(loss, x.logits)
    return value, gradient[:, :-1]


def grpo_trl(x: Inputs) -> Any:
    """TRL's log-prob kernel and the loss in plain torch."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def loss(z: Tensor) -> Tensor:
        logps, _ = selective_log_softmax_and_entropy(z, x.ids, entropy_requires_grad=False)
        return _torch_loss(x, logps)

    return _with_gradient(loss, x.tokens)


def _torch_loss(x: Inputs, logps: Tensor) -> Tensor:
    ratio, advantages = (logps - x.old_logps).exp(), x.advantages[:, None]
    policy = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    d = x.ref_logps - logps
    return (policy + CONFIG.beta * (d.exp() - d - 1)).mean()


def _plain(x: Inputs, z: Tensor) -> Tensor:
    return _torch_loss(x, torch.log_softmax(z.float(), -1).gather(-1, x.ids[..., None])[..., 0])


_compiled = torch.compile(_plain)


def grpo_compiled(x: Inputs) -> Any:
    return _with_gradient(lambda z: _compiled(x, z), x.tokens)


def cross_entropy_quack(x: Inputs) -> Any:
    """Not GRPO: the plain cross entropy with its gradient, in one pass. What that pass costs at its simplest."""
    from quack.cross_entropy import cross_entropy_fwd

    loss, gradient = cross_entropy_fwd(*_rows(x), return_dx=True)
    return loss.sum(), gradient


@dataclass(frozen=True)
class Provider:
    name: str
    run: Callable[[Inputs], Any]
    overwrites: bool = False
    copies: bool = False  # needs the logits several times over
    comparable: bool = True  # computes what the task asks for


TASKS = {
    "log-probs": (
        Provider("grpo_fast CUDA + entropy", partial(logps_ours, impl="cuda")),
        Provider("grpo_fast Triton + entropy", partial(logps_ours, impl="triton")),
        Provider("Liger", logps_liger),
        Provider("TRL + entropy", logps_entropy_trl),
        Provider("quack", logps_quack),
        Provider("torch eager", logps_eager, copies=True),
        Provider("grpo_fast's reference + entropy", logps_entropy_reference, copies=True),
    ),
    "loss + gradient": (
        Provider("grpo_fast CUDA in place", partial(grpo_ours, impl="cuda", in_place=True), overwrites=True),
        Provider("grpo_fast CUDA", partial(grpo_ours, impl="cuda", in_place=False)),
        Provider("grpo_fast Triton in place", partial(grpo_ours, impl="triton", in_place=True), overwrites=True),
        Provider("Liger in place", grpo_liger_in_place, overwrites=True),
        Provider("TRL log-probs + torch loss", grpo_trl),
        Provider("torch.compile", grpo_compiled, copies=True),
        Provider("torch eager", grpo_eager, copies=True),
        Provider("grpo_fast's reference", grpo_reference, copies=True),
        Provider("quack cross entropy (no GRPO)", cross_entropy_quack, comparable=False),
    ),
}


# Measuring -------------------------------------------------------------------------------------------------------


def truth(x: Inputs) -> dict[str, Tensor]:
    """Log-probs, and the gradient of the loss, of the first rows of the first sequence, in float64."""
    rows = min(CHECKED_ROWS, x.ids.size(1))
    z = x.tokens[:1, :rows].double().requires_grad_()
    logps = torch.log_softmax(z, -1).gather(-1, x.ids[:1, :rows, None])[..., 0]
    part = Inputs(z, x.ids[:1, :rows], x.advantages[:1])
    part.old_logps, part.ref_logps = x.old_logps[:1, :rows].double(), x.ref_logps[:1, :rows].double()
    share = rows / x.ids.numel()  # the mean is over all rows
    (gradient,) = torch.autograd.grad(_torch_loss(part, logps) * share, z)
    return {"logps": logps.detach(), "gradient": gradient}


def error(task: str, result: Any, expected: dict[str, Tensor]) -> float:
    """Largest error of a log-prob in nats, or the gradient's in the Frobenius norm, relative."""
    rows = expected["logps"].size(1)
    if task == "log-probs":
        return (result[:1, :rows].double() - expected["logps"]).abs().max().item()
    difference = result[1][:1, :rows].double() - expected["gradient"]
    return (difference.norm() / expected["gradient"].norm()).item()


def measure(timer: Timer, size: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    rows, vocabulary = map(int, size.split("x"))
    torch.manual_seed(0)
    x = Inputs.random(rows, vocabulary, dtype)
    bounds = ceilings(timer, x.logits)
    fraction = rows / x.logits[..., 0].numel()  # of the logits, one position is not used
    original = x.logits.clone()
    expected = truth(x)
    records = []
    for task, providers in TASKS.items():
        floor = fraction * bounds["read_ms" if task == "log-probs" else "copy_ms"]
        traffic = (1 if task == "log-probs" else 2) * rows * vocabulary * original.element_size()
        for provider in providers:
            record = {"task": task, "rows": rows, "vocabulary": vocabulary, "provider": provider.name, **bounds}
            if provider.copies and rows * vocabulary > EAGER_ELEMENTS:
                record["skipped"] = "copies of the logits do not fit"
            else:
                with torch.set_grad_enabled(task != "log-probs"):
                    record |= measure_one(timer, task, provider, x, original, expected)
            if "ms" in record:
                record["share_of_ceiling"] = floor / record["ms"]
                record["gb_per_s"] = traffic / record["ms"] / 1e6
            records.append(record)
    return records


def measure_one(
    timer: Timer, task: str, provider: Provider, x: Inputs, original: Tensor, expected: dict[str, Tensor]
) -> dict[str, Any]:
    """Error, memory and time of one provider, or why it has none. Leaves the logits as they were."""

    def run() -> Any:
        return provider.run(x)

    def restore() -> None:
        x.logits.copy_(original)

    def results() -> dict[str, Any]:
        record: dict[str, Any] = {}
        if provider.comparable:
            record["error"] = error(task, run(), expected)
            restore()
        record["peak_bytes"] = peak_memory(run)
        return record | timer(run, restore if provider.overwrites else None)

    record = attempt(results)
    restore()
    return record


def small_batch(timer: Timer, impl: str) -> dict[str, float]:
    """64 rows: what a call takes on the host and in a CUDA graph."""
    torch.manual_seed(0)
    x = Inputs.random(64, 151936, torch.bfloat16)
    leaf = x.tokens.contiguous().requires_grad_()

    def step() -> None:
        torch.autograd.grad(_grpo(x, leaf, impl=impl), leaf)

    times = {"eager_wall_ms": timer.wall(step)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times["graph_ms"] = timer(graph.replay)["ms"]
    tiny = torch.zeros(1, device="cuda")
    empty = torch.cuda.CUDAGraph()
    with torch.cuda.graph(empty):
        tiny.add_(1)
        tiny.add_(1)
    times["two_tiny_kernels_in_a_graph_ms"] = timer(empty.replay)["ms"]
    times["copy_ms"] = ceilings(timer, leaf.detach())["copy_ms"]
    return times


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a table a task and size."""
    lines: list[str] = []
    previous = None
    for r in records:
        key = (r["task"], r["rows"], r["vocabulary"])
        if key != previous:
            ceiling = "read" if r["task"] == "log-probs" else "copy"
            lines += ["", f"**{r['task']}**, {r['rows']:,} x {r['vocabulary']:,}", ""]
            lines += [f"| | ms | of {ceiling} | GB/s | extra memory, MiB | error |", "|---|--:|--:|--:|--:|--:|"]
            previous = key
        if "skipped" in r:
            lines.append(f"| {r['provider']} | {r['skipped']} | | | | |")
            continue
        error = f"{r['error']:.1e}" if "error" in r else ""
        memory = f"{r['peak_bytes'] / 2**20:,.1f}"
        share = f"{r['share_of_ceiling']:.0%}"
        lines.append(f"| {r['provider']} | {r['ms']:.3f} | {share} | {r['gb_per_s']:,.0f} | {memory} | {error} |")
    return "\n".join(lines)


def summary(records: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds of every provider by size, a table a task."""
    lines: list[str] = []
    for task in TASKS:
        mine = [r for r in records if r["task"] == task]
        providers = list(dict.fromkeys(r["provider"] for r in mine if "ms" in r))
        lines += ["", f"| {task}, ms | " + " | ".join(providers) + " |", "|---|" + "--:|" * len(providers)]
        for size in dict.fromkeys((r["rows"], r["vocabulary"]) for r in mine):
            found = {r["provider"]: r["ms"] for r in mine if (r["rows"], r["vocabulary"]) == size and "ms" in r}
            cells = [f"{found[name]:.3f}" if name in found else "" for name in providers]
            lines.append(f"| {size[0]:,} x {size[1]:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="ROWSxVOCABULARY")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each; the median is reported")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the tables of an earlier run, and exit")
    args = parser.parse_args()
    if args.show is not None:
        records = json.loads(args.show.read_text())["records"]
        print(summary(records) + "\n" + table(records))
        return
    if not torch.cuda.is_available():
        parser.exit(1, "needs an NVIDIA GPU\n")

    timer = Timer(args.runs)
    where = environment()
    print(" ".join(f"{name} {value}" for name, value in where.items()))
    records: list[dict[str, Any]] = []
    for size in args.sizes:
        new = measure(timer, size, getattr(torch, args.dtype))
        print(table(new), flush=True)
        records += new
        torch.cuda.empty_cache()
        if args.out is not None:
            write_json(args.out, {"environment": where, "dtype": args.dtype, "records": records})
    small = {impl: attempt(partial(small_batch, timer, impl)) for impl in ("cuda", "triton")}
    for impl, times in small.items():
        print(f"\n64 rows, {impl}:", " ".join(f"{name} {value}" for name, value in times.items()))
    if args.out is not None:
        write_json(args.out, {"environment": where, "dtype": args.dtype, "records": records, "small_batch": small})


if __name__ == "__main__":
    main()
