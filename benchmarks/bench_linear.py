"""The GRPO loss with its gradients, and log-probs, from hidden states: time, memory and error beside peers.

    python benchmarks/bench_linear.py --quick                              # a few cases
    python benchmarks/bench_linear.py --out docs/results/linear-h200.json  # every case and peer
    python benchmarks/bench_linear.py --show docs/results/linear-h200.json # the tables of an earlier run

"of the products" is the time beside that of the matrix products alone, in bfloat16 by cuBLAS, which take turns with
what is measured: three for loss and gradients, two with a frozen head, one for log-probs, always over all rows.
Rows are peaked: logits to 40, and 80 % of the rows nearly sure of their token. Errors are against float64: the
largest of a log-prob in nats, and, relative in the Frobenius norm, those of the gradients of 64 hidden states and 64
rows of the head. Every provider gets the same inputs; one that fails is recorded with its reason. Peers are run where
they are installed: pip install trl liger-kernel cut-cross-entropy verl.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import Timer, attempt, environment, peak_memory, write_json
from torch import Tensor

from grpo_fast import GRPOLossConfig, linear_grpo_loss, linear_selective_log_softmax

SEQUENCES = 8
CHECKED = 64  # hidden states, and rows of the head, whose gradients are held against float64
CHECKED_ROWS = 8192  # float64 takes its time
PRODUCT_ROWS = 8192  # that the bare products take at a time
EAGER_BYTES = 48 * 2**30  # what providers that hold all logits in float32, with their gradient, may take


@dataclass(frozen=True)
class Case:
    rows: int = 8192
    hidden: int = 2048
    vocabulary: int = 151936
    workspace_mib: int = 2048
    padding: float = 0.0  # share of rows that the mask drops
    dead: float = 0.0  # share of sequences of advantage 0; then without KL
    frozen_head: bool = False
    peers: bool = True  # whether they differ from those of another case

    @property
    def title(self) -> str:
        extra = [f"{self.workspace_mib} MiB"]
        extra += [f"{self.padding:.0%} padding"] if self.padding else []
        extra += [f"{self.dead:.0%} of the rows dead"] if self.dead else []
        extra += ["frozen head"] if self.frozen_head else []
        return f"N {self.rows:,}, H {self.hidden:,}, V {self.vocabulary:,}, " + ", ".join(extra)


BASE = Case()
QUICK = [
    BASE,
    replace(BASE, workspace_mib=512, peers=False),
    replace(BASE, padding=0.3, peers=False),
    replace(BASE, dead=0.5, peers=False),
    replace(BASE, frozen_head=True),
]
FULL = [
    BASE,
    *(replace(BASE, rows=n) for n in (1024, 4096, 32768)),
    replace(BASE, rows=131072, peers=False),
    *(replace(BASE, hidden=h) for h in (896, 4096)),
    *(replace(BASE, vocabulary=v) for v in (49152, 128256)),
    *(replace(BASE, workspace_mib=m, peers=False) for m in (256, 512, 1024, 4096)),
    *(replace(BASE, hidden=4096, workspace_mib=m, peers=False) for m in (512, 4096)),
    *(replace(BASE, padding=p) for p in (0.3, 0.6)),
    *(replace(BASE, dead=d, peers=False) for d in (0.25, 0.5, 0.75)),
    replace(BASE, frozen_head=True),
    replace(BASE, hidden=4096, frozen_head=True),
]


class Inputs:
    """A batch of 8 sequences with peaked rows."""

    def __init__(self, case: Case) -> None:
        shape = (SEQUENCES, case.rows // SEQUENCES)
        V, H = case.vocabulary, case.hidden
        self.case = case
        self.weight = (torch.randn(V, H, device="cuda") / math.sqrt(H)).bfloat16()
        self.ids = torch.randint(0, V, shape, device="cuda")
        # Along the token's row of the head, whose norm is about 1; what is beside it spreads the other logits.
        sure = torch.rand(shape, device="cuda") < 0.8
        heights = torch.where(sure, 16 + 24 * torch.rand(shape, device="cuda"), 10 * torch.rand(shape, device="cuda"))
        self.hidden = torch.empty(*shape, H, device="cuda", dtype=torch.bfloat16)
        for b in range(SEQUENCES):  # one at a time, for what it takes in float32
            states = torch.randn(shape[1], H, device="cuda") + heights[b, :, None] * self.weight[self.ids[b]].float()
            self.hidden[b] = states.bfloat16()
        self.weight.requires_grad_(not case.frozen_head)
        self.hidden.requires_grad_()
        self.mask = torch.arange(shape[1], device="cuda").expand(shape) < round(shape[1] * (1 - case.padding))
        self.advantages = torch.randn(SEQUENCES, device="cuda")
        self.advantages[: round(SEQUENCES * case.dead)] = 0.0
        self.beta = 0.0 if case.dead else 0.04
        with torch.no_grad():
            logps = linear_selective_log_softmax(self.hidden, self.weight, self.ids)
        assert isinstance(logps, Tensor)
        self.old_logps, self.ref_logps = (logps + 0.1 * torch.randn_like(logps) for _ in range(2))
        self.where = self.mask.nonzero(as_tuple=True)  # ahead, so that peers need not wait for it

    def compact(self, x: Tensor) -> Tensor:
        """The rows that count."""
        return x if not self.case.padding else x[self.where]

    def spread(self, x: Tensor) -> Tensor:
        """What ``compact`` left, back in its place."""
        if not self.case.padding:
            return x.view(self.ids.shape)
        return x.new_zeros(self.ids.shape).index_put(self.where, x)

    def torch_loss(self, logps: Tensor) -> Tensor:
        """From (8, T) log-probs, in plain torch."""
        dtype = logps.dtype
        ratio = (logps - self.old_logps.to(dtype)).exp()
        advantages = self.advantages.to(dtype)[:, None]
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        d = self.ref_logps.to(dtype) - logps
        loss = loss + self.beta * (d.exp() - d - 1)
        return (loss * self.mask).sum() / self.mask.sum()

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """(loss, d_hidden[, d_weight])."""
        leaves = [self.hidden] if self.case.frozen_head else [self.hidden, self.weight]
        return loss.detach(), *torch.autograd.grad(loss, leaves)


# Providers: log-probs (8, T) of the inputs, or a loss ------------------------------------------------------------


def loss_ours(x: Inputs) -> Tensor:
    return linear_grpo_loss(
        x.hidden,
        x.weight,
        x.ids,
        completion_mask=x.mask if x.case.padding else None,
        advantages=x.advantages,
        old_logps=x.old_logps,
        ref_logps=x.ref_logps,
        config=GRPOLossConfig(beta=x.beta, use_bias_correction_kl=False),
        workspace_bytes=x.case.workspace_mib * 2**20,
    ).loss


def logps_ours(x: Inputs) -> Tensor:
    mask = x.mask if x.case.padding else None
    logps = linear_selective_log_softmax(
        x.hidden, x.weight, x.ids, mask=mask, workspace_bytes=x.case.workspace_mib * 2**20
    )
    assert isinstance(logps, Tensor)
    return logps


def logps_trl(x: Inputs) -> Tensor:
    """What the fused head of every trainer calls, without the optional outputs."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    hidden, ids = x.compact(x.hidden).flatten(0, -2), x.compact(x.ids).flatten()
    found = _ChunkedLogProbFunction.apply(
        hidden, x.weight, None, ids, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )
    return x.spread(found[0])


def logps_liger_scaled(x: Inputs) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    ids = torch.where(x.mask, x.ids, -100).flatten()
    found = LigerFusedLinearScaledCrossEntropyFunction.apply(x.hidden.flatten(0, 1), x.weight, ids, 1.0, -100)
    return -(found[0] if isinstance(found, tuple) else found).view(x.ids.shape)


def logps_cce(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(x.hidden, x.weight, torch.where(x.mask, x.ids, -100), reduction="none")


def logps_unsloth(x: Inputs) -> Tensor:
    from unsloth_zoo.fused_losses.fused_linear import fused_linear_logprobs

    return fused_linear_logprobs(x.hidden, x.weight, x.ids, mask=x.mask if x.case.padding else None)


def logps_verl(x: Inputs) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    hidden, ids = x.compact(x.hidden).flatten(0, -2), x.compact(x.ids).flatten()
    return x.spread(linear_cross_entropy(hidden, x.weight, ids, 1.0, "none")[0])


def logps_eager(x: Inputs) -> Tensor:
    return _plain(x.hidden, x.weight, x.ids)


def _plain(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, ids[..., None])[..., 0]


_compiled = torch.compile(_plain)


def logps_compiled(x: Inputs) -> Tensor:
    return _compiled(x.hidden, x.weight, x.ids)


def loss_liger_linear(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(beta=x.beta, use_ref_model=True, loss_type="bnpo")
    return module(
        x.hidden,
        x.weight,
        x.ids,
        x.mask.to(x.hidden.dtype),
        x.advantages,
        ref_per_token_logps=x.ref_logps,
        old_per_token_logps=x.old_logps,
    )[0]


@dataclass(frozen=True)
class Provider:
    name: str
    logps: Callable[[Inputs], Tensor] | None = None
    loss: Callable[[Inputs], Tensor] | None = None  # None: the loss in plain torch, from its log-probs
    peer: bool = True
    slow: bool = False  # to compile, or to run: only in the first case
    materializes: bool = False

    def loss_of(self, x: Inputs) -> Tensor:
        if self.loss is not None:
            return self.loss(x)
        assert self.logps is not None
        return x.torch_loss(self.logps(x))


PROVIDERS = (
    Provider("grpo_fast", logps_ours, loss_ours, peer=False),
    Provider("TRL", logps_trl),
    Provider("Liger scaled cross entropy", logps_liger_scaled),
    Provider("Unsloth", logps_unsloth),
    Provider("cut-cross-entropy", logps_cce),
    Provider("verl", logps_verl),
    Provider("Liger fused linear GRPO", loss=loss_liger_linear, slow=True),
    Provider("torch eager", logps_eager, materializes=True),
    Provider("torch.compile", logps_compiled, slow=True, materializes=True),
)


# Measuring -------------------------------------------------------------------------------------------------------


def products(x: Inputs, task: str) -> Callable[[], None]:
    """The matrix products alone, over all rows."""
    hidden, weight = x.hidden.detach().flatten(0, 1), x.weight.detach()
    count = min(PRODUCT_ROWS, x.case.rows)
    logits = torch.empty(count, x.case.vocabulary, device="cuda", dtype=hidden.dtype)
    d_hidden, d_weight = (
        torch.empty(count, x.case.hidden, device="cuda", dtype=hidden.dtype),
        torch.empty_like(weight),
    )

    def run() -> None:
        for rows in hidden.split(count):
            torch.mm(rows, weight.T, out=logits[: len(rows)])
            if task == "log-probs":
                continue
            torch.mm(logits[: len(rows)], weight, out=d_hidden[: len(rows)])
            if not x.case.frozen_head:
                torch.mm(logits[: len(rows)].T, rows, out=d_weight)

    return run


def truth(x: Inputs) -> dict[str, Tensor]:
    """Log-probs (8, T), and the gradients of some hidden states and some rows of the head, in float64."""
    hidden, ids, weight = x.hidden.detach().flatten(0, 1), x.ids.flatten(), x.weight.detach().double()
    some = torch.linspace(0, len(ids) - 1, CHECKED, device="cuda").long()
    words = ids[some]  # tokens that were sampled: their rows have a gradient of some size
    logps, at_words = [], []
    for h, y in zip(hidden.split(512), ids.split(512), strict=True):
        log_p = torch.log_softmax(h.double() @ weight.T, -1)
        logps.append(log_p.gather(-1, y[:, None])[:, 0])
        at_words.append(log_p[:, words].exp())
    found = torch.cat(logps).view(x.ids.shape).requires_grad_()
    (slope,) = torch.autograd.grad(x.torch_loss(found), found)
    slope = slope.flatten()
    hits = (ids[:, None] == words).double()
    d_words = (slope[:, None] * (hits - torch.cat(at_words))).T @ hidden.double()
    p = torch.log_softmax(hidden[some].double() @ weight.T, -1).exp()
    d_some = slope[some, None] * (weight[words] - p @ weight)
    return {"logps": found.detach(), "some": some, "words": words, "d_hidden": d_some, "d_weight": d_words}


def errors(x: Inputs, provider: Provider, task: str, result: Any, expected: dict[str, Tensor]) -> dict[str, float]:
    if task == "log-probs":
        return {"logps_error": ((result.double() - expected["logps"]) * x.mask).abs().max().item()}
    pairs = [("d_hidden", result[1].flatten(0, -2)[expected["some"]])]
    if not x.case.frozen_head:
        pairs.append(("d_weight", result[2][expected["words"]]))
    relative = {name: (got.double() - expected[name]).norm() / expected[name].norm() for name, got in pairs}
    return {f"{name}_error": value.item() for name, value in relative.items()}


def measure(timer: Timer, case: Case, providers: list[Provider]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x = Inputs(case)
    expected = truth(x) if case.rows <= CHECKED_ROWS else None
    records = []
    for task in ("loss + gradients", "log-probs"):
        count = 1 if task == "log-probs" else 2 if case.frozen_head else 3
        flop = 2.0 * count * case.rows * case.hidden * case.vocabulary
        base = products(x, task)
        records.append(asdict(case) | {"task": task, "provider": "the matrix products", **timer(base)})
        for provider in providers:
            if provider.peer and (not case.peers or (provider.slow and case != BASE)):
                continue
            if task == "log-probs" and provider.logps is None:
                continue
            record = asdict(case) | {"task": task, "provider": provider.name}
            needed = 6 * case.rows * case.vocabulary if task == "log-probs" else 12 * case.rows * case.vocabulary
            if provider.materializes and needed > EAGER_BYTES:
                records.append(record | {"skipped": "copies of the logits do not fit"})
                continue

            def run(provider: Provider = provider, task: str = task) -> Any:
                if task == "log-probs":
                    assert provider.logps is not None
                    with torch.no_grad():
                        return provider.logps(x)
                return x.gradients(provider.loss_of(x))

            def results(provider: Provider = provider, task: str = task, base: Any = base, run: Any = run) -> Any:
                found = {} if expected is None else errors(x, provider, task, run(), expected)
                found["peak_bytes"] = peak_memory(run)
                alone, whole = timer.interleaved(base, run)
                return found | whole | {"of_the_products": whole["ms"] / alone["ms"]}

            record |= attempt(results)
            if "ms" in record:
                record["tflop_per_s"] = flop / record["ms"] / 1e9
            records.append(record)
        del base
        torch.cuda.empty_cache()
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a table a case and task. Useful TFLOP/s: the products' work over the time."""
    lines: list[str] = []
    previous = None
    for r in records:
        case = Case(**{name: r[name] for name in asdict(BASE)})
        if (r["task"], case) != previous:
            lines += ["", f"**{r['task']}**: {case.title}", ""]
            lines += ["| | ms | of the products | TFLOP/s | peak MiB | log-prob | d hidden | d weight |"]
            lines += ["|---|--:|--:|--:|--:|--:|--:|--:|"]
            previous = r["task"], case
        if "skipped" in r:
            lines.append(f"| {r['provider']} | {r['skipped']} | | | | | | |")
            continue
        cells = [
            f"{r['ms']:.2f}",
            f"{r['of_the_products']:.2f}" if "of_the_products" in r else "1",
            f"{r['tflop_per_s']:.0f}" if "tflop_per_s" in r else "",
            f"{r['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in r else "",
            *(f"{r[name]:.1e}" if name in r else "" for name in ("logps_error", "d_hidden_error", "d_weight_error")),
        ]
        lines.append(f"| {r['provider']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases, without what takes long to compile")
    parser.add_argument("--only", nargs="+", metavar="PROVIDER", help="providers by name, for instance grpo_fast TRL")
    parser.add_argument("--runs", type=int, default=10, help="timed runs of each; the median is reported")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the tables of an earlier run, and exit")
    args = parser.parse_args()
    if args.show is not None:
        print(table(json.loads(args.show.read_text())["records"]))
        return
    known = [p.name for p in PROVIDERS]
    if args.only is not None and not set(args.only) <= set(known):
        parser.error(f"--only: got {args.only}, want some of {known}")
    if not torch.cuda.is_available():
        parser.exit(1, "needs an NVIDIA GPU\n")

    providers = [p for p in PROVIDERS if (args.only is None or p.name in args.only) and not (args.quick and p.slow)]
    timer = Timer(args.runs, warmup=2)
    where = environment()
    print(" ".join(f"{name} {value}" for name, value in where.items()))
    records: list[dict[str, Any]] = []
    for case in QUICK if args.quick else FULL:
        new = attempt(lambda case=case: {"records": measure(timer, case, providers)})  # type: ignore[misc]
        torch.cuda.empty_cache()
        if "skipped" in new:
            print(f"\n{case.title}: {new['skipped']}", flush=True)
            continue
        print(table(new["records"]), flush=True)
        records += new["records"]
        if args.out is not None:
            write_json(args.out, {"environment": where, "records": records})


if __name__ == "__main__":
    main()
