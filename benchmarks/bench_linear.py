"""Log-probs, and the GRPO loss with its gradients, from hidden states: logits in chunks, or not at all."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_fast import GRPOLossConfig, linear_grpo_loss, linear_selective_log_softmax

from .harness import DEVICE, Benchmark, Provider, Record, Task, Timer, run_task

SEQUENCES = 8
CHECKED = 64  # hidden states, and rows of the head, whose gradients are held against float64
CHECKED_ROWS = 8192  # float64 takes its time
PRODUCT_ROWS = 8192  # that the bare products take at a time
NOTES = """\
The ceiling is the matrix products alone, in bfloat16 by cuBLAS: three for loss and gradients, two with a frozen head,
one for log-probs, always over all rows, so that with padding or dead rows (advantage 0, no KL) a time can be below
it. Inputs are bfloat16. Rows are peaked: logits to 40, and 80 % of the rows nearly sure of their token. Errors are
against float64: the largest of a log-prob in nats, and, relative in the Frobenius norm, those of the gradients of 64
hidden states and of 64 rows of the head. "TFLOP/s" are the operations of these products by the time, but for those of
masked rows and the gradients of dead ones, whoever does more. "MiB" in a title is grpo_fast's `workspace_bytes`;
memory is the peak beyond inputs, gradients included, of which 4 V H bytes are the head's gradient while it is added
up in float32. Peers that give log-probs are given the loss in plain torch, as are grpo_fast's own in "log-probs +
torch loss"."""


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


def columns(record: Record) -> dict[str, str]:
    """The operations of the products that have to be done, by the time."""
    case = Case(**record["case"])
    of_gradients = {"the product": 0, "the products": 1 if case.frozen_head else 2}[record["ceiling"]]
    rows = case.rows * (1.0 - case.padding)
    flops = 2.0 * (rows + of_gradients * rows * (1.0 - case.dead)) * case.vocabulary * case.hidden
    return {"TFLOP/s": f"{flops / record['ms'] / 1e9:.0f}"}


def title(case: dict[str, Any]) -> str:
    extra = [f"{case['workspace_mib']} MiB"]
    extra += [f"{case['padding']:.0%} padding"] if case["padding"] else []
    extra += [f"{case['dead']:.0%} of the rows dead"] if case["dead"] else []
    extra += ["frozen head"] if case["frozen_head"] else []
    return f"N {case['rows']:,}, H {case['hidden']:,}, V {case['vocabulary']:,}, " + ", ".join(extra)


BASE = Case()
QUICK = (
    BASE,
    replace(BASE, workspace_mib=512, peers=False),
    replace(BASE, padding=0.3, peers=False),
)
FULL = (
    BASE,
    *(replace(BASE, rows=n) for n in (1024, 4096, 32768, 131072)),
    *(replace(BASE, hidden=h) for h in (896, 4096)),
    *(replace(BASE, vocabulary=v) for v in (49152, 128256)),
    *(replace(BASE, workspace_mib=m, peers=False) for m in (256, 512, 1024, 4096)),
    *(replace(BASE, hidden=4096, workspace_mib=m, peers=False) for m in (512, 4096)),
    *(replace(BASE, padding=p) for p in (0.3, 0.6)),
    *(replace(BASE, dead=d, peers=False) for d in (0.25, 0.5, 0.75)),
    replace(BASE, frozen_head=True),
    replace(BASE, hidden=4096, frozen_head=True),
)


class Inputs:
    """A batch of 8 sequences with peaked rows."""

    def __init__(self, case: Case) -> None:
        shape = (SEQUENCES, case.rows // SEQUENCES)
        V, H = case.vocabulary, case.hidden
        self.case = case
        self.weight = (torch.randn(V, H, device=DEVICE) / math.sqrt(H)).bfloat16()
        self.ids = torch.randint(0, V, shape, device=DEVICE)
        # Along the token's row of the head, whose norm is about 1; what is beside it spreads the other logits.
        sure = torch.rand(shape, device=DEVICE) < 0.8
        heights = torch.where(sure, 16 + 24 * torch.rand(shape, device=DEVICE), 10 * torch.rand(shape, device=DEVICE))
        self.hidden = torch.empty(*shape, H, device=DEVICE, dtype=torch.bfloat16)
        for b in range(SEQUENCES):  # one at a time, for what it takes in float32
            states = torch.randn(shape[1], H, device=DEVICE) + heights[b, :, None] * self.weight[self.ids[b]].float()
            self.hidden[b] = states.bfloat16()
        self.weight.requires_grad_(not case.frozen_head)
        self.hidden.requires_grad_()
        self.mask = torch.arange(shape[1], device=DEVICE).expand(shape) < round(shape[1] * (1 - case.padding))
        self.advantages = torch.randn(SEQUENCES, device=DEVICE)
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


def logps_liger_scaled(x: Inputs) -> Any:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    ids = torch.where(x.mask, x.ids, -100).flatten()
    found = LigerFusedLinearScaledCrossEntropyFunction.apply(x.hidden.flatten(0, 1), x.weight, ids, 1.0, -100)
    return -(found[0] if isinstance(found, tuple) else found).view(x.ids.shape)


def logps_cce(x: Inputs) -> Any:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(x.hidden, x.weight, torch.where(x.mask, x.ids, -100), reduction="none")


def logps_unsloth(x: Inputs) -> Any:
    from unsloth_zoo.fused_losses.fused_linear import fused_linear_logprobs

    return fused_linear_logprobs(x.hidden, x.weight, x.ids, mask=x.mask if x.case.padding else None)


def logps_verl(x: Inputs) -> Any:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    hidden, ids = x.compact(x.hidden).flatten(0, -2), x.compact(x.ids).flatten()
    return x.spread(linear_cross_entropy(hidden, x.weight, ids, 1.0, "none")[0])


def logps_eager(x: Inputs) -> Tensor:
    return _plain(x.hidden, x.weight, x.ids)


def _plain(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, ids[..., None])[..., 0]


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_plain)


def logps_compiled(x: Inputs) -> Tensor:
    return _compiled()(x.hidden, x.weight, x.ids)


def loss_liger_linear(x: Inputs) -> Any:
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


def _loss_from(logps: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Any]:
    """Loss and gradients, the loss in plain torch."""
    return lambda x: x.gradients(x.torch_loss(logps(x)))


def _all_logits(bytes_each: int) -> Callable[[Case], float]:
    return lambda case: bytes_each * case.rows * case.vocabulary


PEERS: tuple[tuple[str, Callable[[Inputs], Tensor], dict[str, Any]], ...] = (
    ("TRL", logps_trl, {}),
    ("Liger scaled cross entropy", logps_liger_scaled, {}),
    ("Unsloth", logps_unsloth, {}),
    ("cut-cross-entropy", logps_cce, {}),
    ("verl", logps_verl, {}),
    ("torch eager", logps_eager, {"bytes_of": _all_logits(12)}),
    ("torch.compile", logps_compiled, {"bytes_of": _all_logits(8), "only_in": BASE}),
)
LOSS = Task(
    "loss + gradients",
    "the products",
    (
        Provider("grpo_fast", lambda x: x.gradients(loss_ours(x)), ours=True),
        Provider("grpo_fast log-probs + torch loss", _loss_from(logps_ours), ours=True),
        *(Provider(name, _loss_from(logps), **options) for name, logps, options in PEERS),
        Provider("Liger fused linear GRPO", lambda x: x.gradients(loss_liger_linear(x)), only_in=BASE),
    ),
    {"d hidden": 0.1, "d weight": 0.1},
)
LOG_PROBS = Task(
    "log-probs",
    "the product",
    (
        Provider("grpo_fast", logps_ours, ours=True),
        *(Provider(name, logps, **options) for name, logps, options in PEERS),
    ),
    {"log-prob": 0.1},
)


# Measuring -------------------------------------------------------------------------------------------------------


def products(x: Inputs, task: Task) -> Callable[[], None]:
    """The matrix products alone, over all rows."""
    hidden, weight = x.hidden.detach().flatten(0, 1), x.weight.detach()
    count = min(PRODUCT_ROWS, x.case.rows)
    logits = torch.empty(count, x.case.vocabulary, device=DEVICE, dtype=hidden.dtype)
    d_hidden, d_weight = (
        torch.empty(count, x.case.hidden, device=DEVICE, dtype=hidden.dtype),
        torch.empty_like(weight),
    )

    def run() -> None:
        for rows in hidden.split(count):
            torch.mm(rows, weight.T, out=logits[: len(rows)])
            if task is LOG_PROBS:
                continue
            torch.mm(logits[: len(rows)], weight, out=d_hidden[: len(rows)])
            if not x.case.frozen_head:
                torch.mm(logits[: len(rows)].T, rows, out=d_weight)

    return run


def truth(x: Inputs) -> dict[str, Tensor]:
    """Log-probs (8, T), and the gradients of some hidden states and some rows of the head, in float64."""
    hidden, ids, weight = x.hidden.detach().flatten(0, 1), x.ids.flatten(), x.weight.detach().double()
    some = torch.linspace(0, len(ids) - 1, CHECKED, device=DEVICE).long()
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


def measure(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    torch.manual_seed(0)
    x = Inputs(case)
    expected = truth(x) if case.rows <= CHECKED_ROWS else None

    def gradient_errors(result: Any) -> dict[str, float]:
        assert expected is not None
        pairs = {"d hidden": (result[1].flatten(0, -2)[expected["some"]], expected["d_hidden"])}
        if not case.frozen_head:
            pairs["d weight"] = (result[2][expected["words"]], expected["d_weight"])
        return {name: ((got.double() - true).norm() / true.norm()).item() for name, (got, true) in pairs.items()}

    def logps_error(result: Any) -> dict[str, float]:
        assert expected is not None
        return {"log-prob": ((result.double() - expected["logps"]) * x.mask).abs().max().item()}

    records = []
    for task, errors in ((LOSS, gradient_errors), (LOG_PROBS, logps_error)):
        with torch.set_grad_enabled(task is LOSS):
            records += run_task(
                timer,
                case,
                task,
                x,
                ceiling=products(x, task),
                takes_part=lambda provider: takes_part(provider) and (provider.ours or case.peers),
                errors=errors if expected is not None else None,
            )
        torch.cuda.empty_cache()
    return records


BENCHMARK = Benchmark(
    name="linear",
    summary="log-probs and the GRPO loss with its gradients, from hidden states",
    notes=NOTES,
    cases=FULL,
    quick=QUICK,
    headline=BASE,
    measure=measure,
    title=title,
    axes=("rows", "vocabulary", "hidden", "workspace_mib"),
    columns=columns,
)
