"""Log-probs, and the GRPO loss with its gradient, over logits in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_fast import GRPOLossConfig, grpo_loss, selective_log_softmax
from grpo_fast.reference import logps_and_entropy_ref

from .harness import (
    DEVICE,
    Benchmark,
    Provider,
    Record,
    Task,
    Timer,
    attempt,
    fastest,
    run_task,
    ways_to_copy,
    ways_to_read,
)

CONFIG = GRPOLossConfig(beta=0.04, use_bias_correction_kl=False)  # what every peer can compute
CHECKED_ROWS = 64
NOTES = """\
Tokens are sampled from the logits, which are normal with standard deviation 2; eight sequences; the loss is the
default (`dapo`) with `beta` 0.04, old and reference log-probs. The ceilings are the fastest of torch's ways to read
the logits once, and a copy of them, which reads and writes. The error of log-probs is the largest, in nats; that of
gradients is relative in the Frobenius norm, where rounding to bfloat16 costs 1.4e-03 by itself. "In place": the
gradient takes the logits' memory. "torch eager" and "torch.compile" compute the loss of ten lines of torch;
"grpo_fast's reference" has the entropy, the metrics and every option, and is made to be read, not to be fast. quack
computes plain cross entropy, not GRPO: what one pass costs at its simplest. Where a time is missing, the logits'
copies do not fit."""


@dataclass(frozen=True)
class Case:
    rows: int = 8192
    vocabulary: int = 151936
    dtype: str = "bfloat16"


BASE = Case()
ROWS = (64, 512, 2048, 8192, 32768, 65536)
VOCABULARIES = (32000, 49152, 128256, 151937, 262144)


@dataclass
class Inputs:
    """A batch of 8 sequences. Liger takes the logits of one position more, which it ignores."""

    logits: Tensor  # (8, T + 1, V)
    ids: Tensor  # (8, T)
    advantages: Tensor  # (8,)
    old_logps: Tensor = field(init=False)
    ref_logps: Tensor = field(init=False)

    @classmethod
    def random(cls, case: Case) -> Inputs:
        torch.manual_seed(0)
        shape = (8, case.rows // 8 + 1, case.vocabulary)
        logits = torch.empty(shape, device=DEVICE, dtype=getattr(torch, case.dtype))
        ids = torch.empty(shape[:2], device=DEVICE, dtype=torch.int64)
        for t in range(shape[1]):  # by the Gumbel trick, a position at a time
            logits[:, t].normal_(0.0, 2.0)
            noise = -torch.empty(8, case.vocabulary, device=DEVICE).exponential_().log()
            ids[:, t] = (logits[:, t].float() + noise).argmax(-1)
        inputs = cls(logits, ids[:, :-1].contiguous(), torch.randn(8, device=DEVICE))
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

    def loss(z: Tensor) -> Any:
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


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_plain)


def grpo_compiled(x: Inputs) -> Any:
    return _with_gradient(lambda z: _compiled()(x, z), x.tokens)


def cross_entropy_quack(x: Inputs) -> Any:
    """Not GRPO: the plain cross entropy with its gradient, in one pass. What that pass costs at its simplest."""
    from quack.cross_entropy import cross_entropy_fwd

    loss, gradient = cross_entropy_fwd(*_rows(x), return_dx=True)
    return loss.sum(), gradient


def _copies(count: float) -> Callable[[Case], float]:
    """Bytes of so many copies of the logits in float32."""
    return lambda case: count * 4 * case.rows * case.vocabulary


LOG_PROBS = Task(
    "log-probs",
    "read",
    (
        Provider("grpo_fast CUDA + entropy", lambda x: logps_ours(x, "cuda"), ours=True),
        Provider("grpo_fast Triton + entropy", lambda x: logps_ours(x, "triton"), ours=True),
        Provider("Liger", logps_liger),
        Provider("TRL + entropy", logps_entropy_trl),
        Provider("quack", logps_quack),
        Provider("torch eager", logps_eager, bytes_of=_copies(2)),
        Provider("grpo_fast's reference + entropy", logps_entropy_reference, ours=True, bytes_of=_copies(5)),
    ),
    {"log-prob": 1e-3},
)
LOSS = Task(
    "loss + gradient",
    "copy",
    (
        Provider("grpo_fast CUDA in place", lambda x: grpo_ours(x, "cuda", True), ours=True, overwrites=True),
        Provider("grpo_fast CUDA", lambda x: grpo_ours(x, "cuda", False), ours=True, bytes_of=_copies(1)),
        Provider("grpo_fast Triton in place", lambda x: grpo_ours(x, "triton", True), ours=True, overwrites=True),
        Provider("Liger in place", grpo_liger_in_place, overwrites=True),
        Provider("TRL log-probs + torch loss", grpo_trl, bytes_of=_copies(1)),
        Provider("torch.compile", grpo_compiled, bytes_of=_copies(2)),
        Provider("torch eager", grpo_eager, bytes_of=_copies(4)),
        Provider("grpo_fast's reference", grpo_reference, ours=True, bytes_of=_copies(6)),
        Provider("quack cross entropy", cross_entropy_quack, comparable=False, bytes_of=_copies(1)),
    ),
    {"gradient": 1e-2},
)
SMALL = "loss + gradient, in a CUDA graph"


# Measuring -------------------------------------------------------------------------------------------------------


def truth(x: Inputs) -> tuple[Tensor, Tensor]:
    """Log-probs, and the gradient of the loss, of the first rows of the first sequence, in float64."""
    rows = min(CHECKED_ROWS, x.ids.size(1))
    z = x.tokens[:1, :rows].double().requires_grad_()
    logps = torch.log_softmax(z, -1).gather(-1, x.ids[:1, :rows, None])[..., 0]
    part = Inputs(z, x.ids[:1, :rows], x.advantages[:1])
    part.old_logps, part.ref_logps = x.old_logps[:1, :rows].double(), x.ref_logps[:1, :rows].double()
    share = rows / x.ids.numel()  # the mean is over all rows
    (gradient,) = torch.autograd.grad(_torch_loss(part, logps) * share, z)
    return logps.detach(), gradient


def measure(timer: Timer, case: Case, takes_part: Callable[[Provider], bool]) -> list[Record]:
    x = Inputs.random(case)
    original = x.logits.clone()
    logps, gradient = truth(x)
    rows = logps.size(1)

    def restore() -> None:
        x.logits.copy_(original)

    def logps_error(result: Any) -> dict[str, float]:
        return {"log-prob": (result[:1, :rows].double() - logps).abs().max().item()}

    def gradient_error(result: Any) -> dict[str, float]:
        return {"gradient": ((result[1][:1, :rows].double() - gradient).norm() / gradient.norm()).item()}

    everyone: dict[str, Any] = {"takes_part": takes_part, "restore": restore}
    with torch.no_grad():
        read = fastest(timer, ways_to_read(x.tokens))
        records = run_task(timer, case, LOG_PROBS, x, ceiling=read, errors=logps_error, **everyone)
    size = x.tokens.numel()  # so many in one piece: a copy from view to view is not the fastest
    copy = fastest(timer, ways_to_copy(x.logits.flatten()[:size], original.flatten()[:size]))
    records += run_task(timer, case, LOSS, x, ceiling=copy, errors=gradient_error, **everyone)
    if case == SMALLEST:
        for impl in ("CUDA", "Triton"):
            record = {"case": vars(case), "task": SMALL, "provider": f"grpo_fast {impl}", "ours": True}
            records.append(record | {"ceiling": "copy"} | attempt(lambda: _small_batch(timer, x, impl.lower())))  # noqa: B023
    return records


def _small_batch(timer: Timer, x: Inputs, impl: str) -> Record:
    """What a call takes in a CUDA graph, and from Python."""
    leaf = x.tokens.contiguous().requires_grad_()

    def step() -> None:
        torch.autograd.grad(_grpo(x, leaf, impl=impl), leaf)

    found: Record = {"wall_ms": timer.wall(step)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    copy = fastest(timer, ways_to_copy(leaf.detach(), torch.empty_like(leaf, requires_grad=False)))
    alone, whole = timer.interleaved(copy, graph.replay)
    return found | whole | {"ceiling_ms": alone["ms"]}


SMALLEST = Case(rows=64)
BENCHMARK = Benchmark(
    name="logits",
    summary="log-probs and the GRPO loss with its gradient, over logits in memory",
    notes=NOTES,
    cases=(
        *(Case(rows=rows) for rows in ROWS),
        *(Case(vocabulary=vocabulary) for vocabulary in VOCABULARIES),
        Case(dtype="float32"),
    ),
    quick=(BASE,),
    headline=BASE,
    measure=measure,
    title=lambda case: f"{case['rows']:,} x {case['vocabulary']:,}, {case['dtype']}",
    axes=("rows", "vocabulary"),
)
