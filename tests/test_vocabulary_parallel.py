"""The ops over shards of the vocabulary, and over shares of a batch: equal to one process with everything.

Each world of processes is started once and runs all of its cases; a test is the verdict of its ranks on one case.
The ranks have a GPU each, over NCCL, or, where there is none, the CPU, over gloo.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import KERNELS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.library import opcheck
from torch.nn.parallel import DistributedDataParallel

from grpo_fast import (
    GRPOLossConfig,
    GRPOLossOutput,
    grpo_loss,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)
from grpo_fast.ops._linear_logps import _linear_logps, _linear_logps_backward
from grpo_fast.ops._vocabulary_parallel import shard_index
from grpo_fast.ops.selective_log_softmax import _selective_log_softmax

B, T, V, H = 4, 5, 37, 8
N = B * T
#: Where shards begin and end; one of them is a single token, and sections of hidden states differ between ranks.
BOUNDS = {2: (0, 23, V), 4: (0, 11, 12, 32, V)}
WORKSPACE = 3 * 40 * 6  # bytes: several chunks and sections, and an odd last one
UPSTREAM = 1.7
#: Implementation, dtype, and how far from float64: absolute in log-probs, relative in a gradient's norm.
DOUBLE = ("torch", torch.float64, 1e-10, 1e-10)
PRECISIONS = {
    "float64": DOUBLE,
    "float32": ("torch", torch.float32, 1e-5, 2e-5),
    "bfloat16": ("torch", torch.bfloat16, 1e-5, 8e-3),
    **{f"{k}-float32": (k, torch.float32, 1e-5, 2e-5) for k in KERNELS},
    **{f"{k}-bfloat16": (k, torch.bfloat16, 1e-5, 1.2e-2) for k in KERNELS},
}
Precision = tuple[str, torch.dtype, float, float]
GPUS = torch.cuda.device_count()


class World:
    """This rank, and the same inputs on all of them."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.group = dist.group.WORLD
        self.alone = [dist.new_group([r]) for r in range(size)][rank]
        bounds = BOUNDS[size]
        self.shard = slice(bounds[rank], bounds[rank + 1])
        self.mask = self.to(torch.arange(T) < torch.tensor([5, 0, 2, 4])[:, None])
        self.ids = self.integers(V, B, T)
        self.hidden, self.weight = self.rand(B, T, H, seed=1), self.rand(V, H, seed=2, scale=0.4)
        self.bias = self.rand(V, seed=3, scale=0.5)

    def to(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def rand(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        """Such as every dtype represents, so that all precisions have the same inputs."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
        return self.to(x.bfloat16().double())

    def integers(self, high: int, *shape: int) -> Tensor:
        return self.to(torch.randint(0, high, shape, generator=torch.Generator().manual_seed(9)))

    def batch(self, **changes: Any) -> dict[str, Any]:
        return {
            "completion_ids": self.ids,
            "completion_mask": self.mask,
            "rewards": self.to(torch.tensor([0.0, 1.0, 0.5, 0.25])),
            "group_size": 2,
            "old_logps": self.rand(B, T, seed=4, scale=0.4) - 4.0,
            "ref_logps": self.rand(B, T, seed=5, scale=0.4) - 4.0,
            **changes,
        }

    def packed(self, **changes: Any) -> dict[str, Any]:
        """The last two rows are padding; the second sequence is empty."""
        flat = {k: self.batch()[k].reshape(N) for k in ("completion_ids", "old_logps", "ref_logps")}
        ends = self.to(torch.tensor([0, 6, 6, 13, N - 2]))
        return {**self.batch(), "completion_mask": None, **flat, "cu_seqlens": ends, **changes}

    def everywhere(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous())
        return found

    def sum(self, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total


def values(out: Any) -> dict[str, Tensor]:
    """What an op returns, by name."""
    if isinstance(out, GRPOLossOutput):
        return {"loss": out.loss, "logps": out.logps, "entropy": out.entropy, **out.metrics}
    return dict(enumerate(out)) if isinstance(out, tuple) else {"value": out}


def differentiate(op: Callable[..., Any], leaves: tuple[Tensor, ...], **inputs: Any) -> tuple[Any, list[Tensor]]:
    """What ``op`` returns, and the gradients by the leaves of its loss, or of the sum of what it returns."""
    x = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = op(*x, **inputs)
    value = out.loss if isinstance(out, GRPOLossOutput) else sum(out) if isinstance(out, tuple) else out
    return out, list(torch.autograd.grad((value * UPSTREAM).sum(), x))


def with_bias(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda hidden, weight, bias, **inputs: op(hidden, weight, bias=bias, **inputs)


def assert_near(got: Tensor, truth: Tensor, tolerance: float, what: object) -> None:
    """In the Frobenius norm; NaN where the truth has it."""
    assert torch.equal(got.isnan(), truth.isnan()), what
    error = (got.double() - truth).nan_to_num().norm()
    assert error <= tolerance * truth.nan_to_num().norm() + 1e-12, f"{what}: off by {error:.1e}"


def compare(
    world: World,
    precision: Precision,
    op: Callable[..., Any],
    leaves: tuple[Tensor, ...],
    sharded: int,
    **inputs: Any,
) -> None:
    """``op`` over shards is ``op`` over all; of ``leaves`` the last ``sharded`` have the vocabulary."""
    impl, dtype, close, gradient_close = precision
    leaves = tuple(x.to(dtype) for x in leaves)
    first = len(leaves) - sharded
    cut = (lambda x: x[..., world.shard]) if first == 0 else (lambda x: x[world.shard])
    mine = tuple(cut(x) if i >= first else x for i, x in enumerate(leaves))
    shared = {k: v for k, v in inputs.items() if k not in ("workspace_bytes", "allow_sync", "overwrite_logits")}
    ref = {k: cut(inputs[k].to(dtype)) for k in ("ref_weight", "ref_bias") if k in inputs}
    out, grads = differentiate(op, mine, impl=impl, process_group=world.group, **{**inputs, **ref})
    truth, true_grads = differentiate(op, tuple(x.double() for x in leaves), impl="torch", **shared)

    got, wanted = values(out), values(truth)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=10 * close, atol=close, equal_nan=True, msg=f"{name}"
        )
        for other in world.everywhere(got[name].detach()):  # bit for bit
            assert torch.equal(other.nan_to_num(), got[name].nan_to_num()), f"{name} differs between ranks"
    for i, (x, truth) in enumerate(zip(grads, true_grads, strict=True)):
        assert x.dtype == leaves[i].dtype
        assert_near(x, cut(truth) if i >= first else truth, gradient_close, f"gradient {i}")
        if i < first:
            for other in world.everywhere(x):
                assert torch.equal(other.nan_to_num(), x.nan_to_num()), f"gradient {i} differs between ranks"


# Cases: each runs on every rank of a world ------------------------------------------------------------------------

LOSSES: dict[str, dict[str, Any]] = {
    "dapo": {"config": GRPOLossConfig(beta=0.1)},
    "grpo": {"config": GRPOLossConfig(loss_type="grpo", delta=1.5)},
    "dr_grpo": {"config": GRPOLossConfig(loss_type="dr_grpo")},
    "luspo": {"config": GRPOLossConfig(loss_type="luspo", importance_sampling_level="sequence")},
    "cispo": {"config": GRPOLossConfig(loss_type="cispo", epsilon_high=1.2)},
    "sapo": {"config": GRPOLossConfig(loss_type="sapo")},
    "vespo": {"config": GRPOLossConfig(loss_type="vespo")},
    "gspo": {"config": GRPOLossConfig(importance_sampling_level="sequence", beta=0.1, entropy_coef=0.05)},
    "off_policy": {"config": GRPOLossConfig(off_policy_mask_threshold=0.2)},
    "entropy": {"config": GRPOLossConfig(entropy_coef=0.3)},
    "threshold": {"config": GRPOLossConfig(entropy_coef=0.3), "entropy_threshold": 3.2},
    "items": {"num_items_in_batch": 7},
    "on_policy": {"old_logps": None, "completion_mask": None},
    "nothing": {"completion_mask": torch.zeros(B, T)},
    "active": {"metrics": "active"},
}
LOGITS: dict[str, Any] = {"temperature": 0.7, "logit_scale": 1.3, "softcap": 4.0}


def loss_case(world: World, precision: Precision, name: str) -> None:
    changes = {k: world.to(v) if isinstance(v, Tensor) else v for k, v in LOSSES[name].items()}
    inputs = world.batch(temperature=1.3, workspace_bytes=WORKSPACE, **changes)
    compare(world, precision, linear_grpo_loss, (world.hidden, world.weight), 1, **inputs)


def everything_case(world: World, precision: Precision, **changes: Any) -> None:
    """Every input at once: bias, softcap, KL, entropy bonus, a sequence-level ratio, a mask over NaN."""
    hidden = world.hidden.masked_fill(~world.mask.unsqueeze(-1), torch.nan)
    ids = world.ids.masked_fill(~world.mask, -100)
    inputs = world.batch(completion_ids=ids, workspace_bytes=WORKSPACE, **LOSSES["gspo"], **LOGITS, **changes)
    compare(world, precision, with_bias(linear_grpo_loss), (hidden, world.weight, world.bias), 2, **inputs)


def packed_case(world: World, precision: Precision) -> None:
    for name in ("gspo", "dapo"):
        inputs = world.packed(workspace_bytes=WORKSPACE, **LOSSES[name])
        compare(world, precision, linear_grpo_loss, (world.hidden.reshape(N, H), world.weight), 1, **inputs)


def no_target_case(world: World, precision: Precision) -> None:
    """The last rank has none of the tokens, then all."""
    start = BOUNDS[world.size][-2]
    for ids in (world.ids % start, start + world.ids % (V - start)):
        inputs = world.batch(completion_ids=ids, **LOSSES["entropy"])
        compare(world, precision, linear_grpo_loss, (world.hidden, world.weight), 1, **inputs)


def reference_case(world: World, precision: Precision) -> None:
    inputs = world.batch(config=GRPOLossConfig(beta=0.5), ref_logps=None, ref_hidden=world.rand(B, T, 4, seed=6))
    inputs |= {"ref_weight": world.rand(V, 4, seed=7), "ref_bias": world.rand(V, seed=8)}
    inputs = {k: v.to(precision[1]) if k.startswith("ref_") and v is not None else v for k, v in inputs.items()}
    compare(world, precision, linear_grpo_loss, (world.hidden, world.weight), 1, **inputs)


def logps_case(world: World, precision: Precision) -> None:
    """Log-probs alone, then with an entropy that has a gradient; an id outside of the vocabulary is NaN."""
    ids = world.ids.clone()
    ids[0, 0], ids[2, 0] = V, -1
    for inputs in ({}, {"return_entropy": True}, {"return_entropy": True, "mask": world.mask, **LOGITS}):
        options = {"workspace_bytes": WORKSPACE, "allow_sync": "mask" in inputs}
        compare(
            world,
            precision,
            with_bias(linear_selective_log_softmax),
            (world.hidden, world.weight, world.bias),
            2,
            index=ids,
            **inputs,
            **options,
        )


def logits_case(world: World, precision: Precision) -> None:
    logits = world.rand(B, T, V, seed=11, scale=2.0)
    for inputs in ({}, {"return_entropy": True, "mask": world.mask, "overwrite_logits": True, **LOGITS}):
        compare(world, precision, selective_log_softmax, (logits,), 1, index=world.ids, **inputs)
    logits = logits.masked_fill(~world.mask.unsqueeze(-1), torch.nan)
    for name in ("dapo", "gspo"):
        compare(world, precision, grpo_loss, (logits,), 1, **world.batch(**LOSSES[name]))


def extreme_case(world: World, precision: Precision) -> None:
    """A shard of banned tokens; one that is far below the others and has the token."""
    start = BOUNDS[world.size][-2]
    last = torch.arange(V, device=world.device) >= start
    logits = world.rand(B, T, V, seed=12, scale=3.0)
    below = world.ids % start
    for changed, ids in (
        (logits.masked_fill(last, -torch.inf), below),
        (torch.where(last, logits - 300.0, logits), start + world.ids % (V - start)),
    ):
        compare(world, precision, selective_log_softmax, (changed,), 1, index=ids, return_entropy=True)


def sure_case(world: World, precision: Precision) -> None:
    """The gradient of a token that is sure to about 1e-8 is right to four digits."""
    logits = world.rand(1, T, V, seed=12, scale=0.5)
    ids = world.ids[:1]
    logits = logits.scatter_add(-1, ids.unsqueeze(-1), torch.full((1, T, 1), 20.0).to(logits))
    mine = (logits[..., world.shard].to(precision[1]),)
    _, (got,) = differentiate(selective_log_softmax, mine, index=ids, process_group=world.group, impl=precision[0])
    _, (truth,) = differentiate(selective_log_softmax, (logits,), index=ids, impl="torch")
    torch.testing.assert_close(got.double(), truth[..., world.shard], rtol=1e-4, atol=0.0)


def cross_entropy_case(world: World, precision: Precision) -> None:
    labels = world.ids.masked_fill(~world.mask, -100)
    for inputs in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"num_items_in_batch": 7}):
        leaves = (world.hidden, world.weight, world.bias)
        compare(world, precision, with_bias(linear_cross_entropy), leaves, 2, labels=labels, **inputs, **LOGITS)


def dtensor_case(world: World, precision: Precision) -> None:
    """Weights, and logits, as DTensors: their mesh has the group, and the gradient is placed alike."""
    impl, dtype, close, gradient_close = precision
    mesh = DeviceMesh(world.device.type, list(range(world.size)))

    def distributed(x: Tensor, dim: int) -> DTensor:
        return distribute_tensor(x.to(dtype), mesh, (Shard(dim),)).requires_grad_()

    hidden = world.hidden.to(dtype).requires_grad_()
    weight, bias = distributed(world.weight, 0), distributed(world.bias, 0)
    inputs = world.batch(**LOSSES["gspo"])
    out = linear_grpo_loss(hidden, weight, bias=bias, **inputs, impl=impl)
    (out.loss * UPSTREAM).backward()
    whole = (world.hidden, world.weight, world.bias)
    truth, true_grads = differentiate(with_bias(linear_grpo_loss), whole, impl="torch", **inputs)
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=close, atol=close)
    for x, true in zip((hidden, weight, bias), true_grads, strict=True):
        if isinstance(x, DTensor):
            assert isinstance(x.grad, DTensor)
            assert x.grad.placements == x.placements
        assert_near(x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad, true, gradient_close, "gradient")

    logits = distributed(world.rand(B, T, V, seed=11), 2)
    out = grpo_loss(logits, **inputs, process_group=mesh.get_group(), impl=impl)
    (out.loss * UPSTREAM).backward()
    truth, (true,) = differentiate(grpo_loss, (world.rand(B, T, V, seed=11),), impl="torch", **inputs)
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=close, atol=close)
    assert_near(logits.grad.full_tensor(), true, gradient_close, "gradient")


def compiled_case(world: World, precision: Precision) -> None:
    """Without a graph break, and bit for bit the same."""
    impl, dtype = precision[:2]
    inputs = world.batch(workspace_bytes=WORKSPACE, process_group=world.group, impl=impl, **LOSSES["gspo"])
    leaves = [x.to(dtype).requires_grad_() for x in (world.hidden, world.weight[world.shard].clone())]

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_grpo_loss(hidden, weight, **inputs).loss * UPSTREAM

    eager, compiled = (
        torch.autograd.grad(fn(*leaves), leaves)
        for fn in (value, torch.compile(value, fullgraph=True, backend="aot_eager"))
    )
    assert all(map(torch.equal, eager, compiled))


def registered_case(world: World, precision: Precision) -> None:
    """Schema and fake implementation, by torch's own checker."""
    group, size = world.group.group_name, world.shard.stop - world.shard.start
    opcheck(shard_index, (world.ids, size, H, True, True, group))
    index, kept = shard_index(world.ids, size, H, True, True, group), world.mask
    flat = (index.view(N), kept.view(N))
    hidden, weight = world.hidden.float(), world.weight[world.shard].float()
    options = (0.7, 1.3, 4.0)
    chunks = (WORKSPACE, True, precision[0], group, None)
    needs = [True, True, False]
    inputs = (hidden, weight, None, *flat, *options, 0.0, True, needs, *chunks)
    opcheck(_linear_logps, inputs)
    *found, kept, borrowed, bases = _linear_logps(*inputs)
    assert kept.numel() == borrowed.numel() == bases.numel() == 0
    upstream = world.rand(2, N, seed=15).float().unbind()
    saved = (None, None, None, hidden, weight, None, *flat, *found, *upstream)
    opcheck(_linear_logps_backward, (*saved, needs, *options, 0.0, *chunks))
    logits = world.rand(B, T, size, seed=11).float()
    opcheck(_selective_log_softmax, (logits, index, None, *options, True, False, precision[0], group))


# What is said, and by whom ----------------------------------------------------------------------------------------


@contextmanager
def recorded() -> Iterator[list[tuple[str, torch.dtype, int]]]:
    """Every collective of this rank: its name, and dtype and number of what it takes."""
    calls: list[tuple[str, torch.dtype, int]] = []
    names = [name for name in dir(dist) if name.startswith(("all_", "reduce", "broadcast", "gather", "barrier"))]
    originals = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}

    def recording(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            x = next((a for a in reversed(args) if isinstance(a, Tensor)), torch.empty(0))
            calls.append((name, x.dtype, x.numel()))
            return original(*args, **kwargs)

        return collective

    for name, original in originals.items():
        setattr(dist, name, recording(name, original))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def volume_case(world: World, precision: Precision) -> None:
    """docs/distributed.md has these sizes; they depend on nothing that could differ between ranks."""
    impl, dtype = precision[:2]
    weight = world.weight[world.shard].to(dtype).requires_grad_()
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for trained, mask in ((True, world.mask), (True, torch.zeros_like(world.mask)), (False, world.mask)):
        hidden = world.hidden.to(dtype).requires_grad_(trained)
        options = {"workspace_bytes": WORKSPACE, "process_group": world.group, "impl": impl}
        with recorded() as calls:
            out = linear_grpo_loss(hidden, weight, **world.batch(completion_mask=mask), **options)
        statistics = [("all_reduce", torch.float64, N), ("all_reduce", torch.float64, 3 * N)]
        assert calls == [("all_gather", torch.int64, 5), *statistics]
        with recorded() as calls:
            out.loss.backward()
        assert calls == ([("all_reduce", sums, N * H)] if trained else [])


def one_rank_group_case(world: World, precision: Precision) -> None:
    """A group of one rank has the whole vocabulary, and everything that there is without a group."""
    impl, dtype = precision[:2]
    leaves = (world.hidden.to(dtype), world.weight.to(dtype))
    with recorded() as calls:
        alone, grads = differentiate(linear_grpo_loss, leaves, impl=impl, process_group=world.alone, **world.batch())
    assert calls == []
    out, same = differentiate(linear_grpo_loss, leaves, impl=impl, **world.batch())
    assert torch.equal(alone.loss, out.loss)
    assert all(map(torch.equal, grads, same))


def data_parallel_case(world: World, precision: Precision) -> None:
    """Shares of the batch, weights whole: with global normalizers the sum over ranks is one process.

    The first rank has no token that counts. Nobody says anything within the op.
    """
    impl, dtype, close, gradient_close = precision
    leaves = (world.hidden.to(dtype), world.weight.to(dtype))
    rows = slice(B * world.rank // world.size, B * (world.rank + 1) // world.size)
    mask = world.mask.clone()
    mask[: B // world.size] = False
    advantages = world.rand(B, seed=14)
    inputs = {k: v for k, v in world.batch().items() if k not in ("rewards", "group_size")}
    inputs |= {"completion_mask": mask, "advantages": advantages}
    for config, items, mean in (
        (GRPOLossConfig(beta=0.1), int(mask.sum()), False),
        (GRPOLossConfig(loss_type="cispo", epsilon_high=1.2), mask.sum(), False),
        (GRPOLossConfig(loss_type="dapo", importance_sampling_level="sequence"), mask.sum(), False),
        (GRPOLossConfig(loss_type="grpo"), None, True),
        (GRPOLossConfig(loss_type="dr_grpo", max_completion_length=T), None, True),
    ):
        share = {k: v[rows] for k, v in inputs.items()}
        options = {"config": config, "num_items_in_batch": items}
        with recorded() as calls:
            out, grads = differentiate(linear_grpo_loss, (leaves[0][rows], leaves[1]), impl=impl, **share, **options)
        assert calls == []
        assert world.rank > 0 or out.metrics["num_active_tokens"] == 0
        truth, true_grads = differentiate(
            linear_grpo_loss, tuple(x.double() for x in leaves), impl="torch", **inputs, **options
        )
        scale = 1.0 / world.size if mean else 1.0
        torch.testing.assert_close(world.sum(out.loss.detach()).double() * scale, truth.loss, rtol=close, atol=close)
        assert_near(grads[0] * scale, true_grads[0][rows], gradient_close, "hidden")
        assert_near(world.sum(grads[1]) * scale, true_grads[1], gradient_close, "weight")


def sequence_parallel_case(world: World, precision: Precision) -> None:
    """Tokens of a sequence on several ranks: packed, with advantages by token."""
    impl, dtype, close, gradient_close = precision
    leaves = (world.hidden.to(dtype), world.weight.to(dtype))
    tokens = slice(N * world.rank // world.size, N * (world.rank + 1) // world.size)
    advantages = world.rand(B, 1, seed=14).expand(B, T)
    inputs = {k: world.batch()[k] for k in ("completion_ids", "old_logps", "completion_mask")}
    inputs |= {"advantages": advantages}
    items = world.mask.sum()
    truth, true_grads = differentiate(
        linear_grpo_loss, tuple(x.double() for x in leaves), impl="torch", num_items_in_batch=items, **inputs
    )
    mine = {k: v.reshape(N)[tokens] for k, v in inputs.items()}
    mine["cu_seqlens"] = world.to(torch.tensor([0, mine["advantages"].numel()]))
    hidden = leaves[0].reshape(N, H)[tokens]
    out, grads = differentiate(linear_grpo_loss, (hidden, leaves[1]), impl=impl, num_items_in_batch=items, **mine)
    torch.testing.assert_close(world.sum(out.loss.detach()).double(), truth.loss, rtol=close, atol=close)
    assert_near(grads[0], true_grads[0].reshape(N, H)[tokens], gradient_close, "hidden")
    assert_near(world.sum(grads[1]), true_grads[1], gradient_close, "weight")


class Head(nn.Module):
    """What FSDP2 and DDP wrap."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, hidden: Tensor, **inputs: Any) -> Tensor:
        return linear_grpo_loss(hidden, self.weight, **inputs).loss


def wrapped_case(world: World, precision: Precision) -> None:
    """Under FSDP2 and DDP, which average gradients; FSDP2's shards outside of its module are refused."""
    impl, dtype, _, gradient_close = precision
    rows = slice(B * world.rank // world.size, B * (world.rank + 1) // world.size)
    inputs = {k: world.batch()[k] for k in ("completion_ids", "old_logps", "completion_mask")}
    inputs |= {"advantages": world.rand(B, seed=14)}
    mine = {k: v[rows] for k, v in inputs.items()}
    options = {"num_items_in_batch": world.mask.sum(), "config": GRPOLossConfig()}
    _, (_, truth) = differentiate(linear_grpo_loss, (world.hidden, world.weight), impl="torch", **inputs, **options)
    fsdp, ddp = (Head(world.weight.to(dtype)) for _ in range(2))
    fully_shard(fsdp)
    for model in (fsdp, DistributedDataParallel(ddp)):
        loss = model(world.hidden[rows].to(dtype), **mine, **options, impl=impl)
        (loss * world.size * UPSTREAM).backward()
    assert_near(fsdp.weight.grad.full_tensor(), truth, gradient_close, "FSDP2")
    assert_near(ddp.weight.grad, truth, gradient_close, "DDP")
    with pytest.raises(ValueError, match="process_group: got token ids with checksums of"):
        linear_grpo_loss(world.hidden[rows].to(dtype), fsdp.weight, **mine, impl=impl)


def two_dimensions_case(world: World, precision: Precision) -> None:
    """Two shares of the batch, and for each the vocabulary on two ranks."""
    impl, dtype, close, gradient_close = precision
    mesh = DeviceMesh(world.device.type, [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    share, shard = world.rank // 2, world.rank % 2
    rows, part = slice(2 * share, 2 * share + 2), (slice(0, 23), slice(23, V))[shard]
    leaves = (world.hidden.to(dtype), world.weight.to(dtype))
    inputs = world.batch(num_items_in_batch=None)
    items = world.mask.sum()
    truth, true_grads = differentiate(
        linear_grpo_loss,
        tuple(x.double() for x in leaves),
        impl="torch",
        **{**inputs, "num_items_in_batch": items},
    )
    mine = {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    out, grads = differentiate(
        linear_grpo_loss,
        (leaves[0][rows], leaves[1][part]),
        impl=impl,
        process_group=mesh.get_group("tp"),
        **{**mine, "num_items_in_batch": items},
    )
    loss, d_weight = out.loss.detach().clone(), grads[1].clone()
    for x in (loss, d_weight):
        dist.all_reduce(x, group=mesh.get_group("dp"))
    torch.testing.assert_close(loss.double(), truth.loss, rtol=close, atol=close)
    assert_near(grads[0], true_grads[0][rows], gradient_close, "hidden")
    assert_near(d_weight, true_grads[1][part], gradient_close, "weight")


def refusal_case(world: World, precision: Precision) -> None:
    """Every rank raises, so nobody waits for one that has."""
    impl, dtype = precision[:2]
    leaves = {"hidden": world.hidden.to(dtype), "weight": world.weight[world.shard].to(dtype)}
    inputs = {**leaves, "index": world.ids}
    last = world.rank == world.size - 1
    mesh = DeviceMesh(world.device.type, list(range(world.size)))

    def placed(weight: Tensor, placement: Any) -> DTensor:
        return distribute_tensor(weight.to(dtype), mesh, (placement,))

    few = {"hidden": leaves["hidden"][: 3 if last else 4], "index": world.ids[: 3 if last else 4]}
    narrow = {"hidden": leaves["hidden"][..., :7], "weight": leaves["weight"][:, :7]} if last else {}
    other = {"index": world.ids + 1} if last else {}
    trained = {"hidden": leaves["hidden"].clone().requires_grad_()} if last else {}
    empty = {"weight": leaves["weight"][:0]} if last else {}
    for op, changes, error, message in (
        (
            linear_selective_log_softmax,
            few,
            ValueError,
            r"process_group: got a number of rows of \[20, .*15\] by rank",
        ),
        (linear_selective_log_softmax, narrow, ValueError, r"process_group: got a hidden size of \[8, .*7\] by rank"),
        (linear_selective_log_softmax, other, ValueError, "process_group: got token ids with checksums of"),
        (linear_selective_log_softmax, trained, ValueError, r"got hidden.requires_grad \[0, .*1\] by rank"),
        (linear_selective_log_softmax, empty, ValueError, r"process_group: got shards of \[.* 0\] tokens by rank"),
        (linear_selective_log_softmax, {"process_group": "tp"}, TypeError, "process_group: got str, want a torch"),
        (
            linear_selective_log_softmax,
            {"weight": placed(world.weight, Replicate())},
            ValueError,
            "weight: got a DTensor placed as .*Replicate.* on a 1-D mesh, want .*Shard",
        ),
        (
            linear_selective_log_softmax,
            {"weight": placed(world.weight, Shard(0)), "process_group": world.alone},
            ValueError,
            "process_group: got another group than that of the mesh of weight",
        ),
        (
            linear_cross_entropy,
            {"labels": world.ids, "label_smoothing": 0.1},
            ValueError,
            "label_smoothing: got 0.1 with a process_group, want 0",
        ),
        (
            linear_grpo_loss,
            {**world.batch(), "weight_grad_out": torch.zeros_like(leaves["weight"], dtype=torch.float32)},
            ValueError,
            "weight_grad_out: got one, want None where .* all of these on one rank",
        ),
    ):
        arguments = {**(inputs if op is linear_selective_log_softmax else leaves), "process_group": world.group}
        with pytest.raises(error, match=message):
            op(**{**arguments, **changes}, impl=impl)


#: Which cases run in a world of so many ranks, by name.
Case = Callable[[World], None]


def cases(size: int) -> dict[str, Case]:
    """Interpreted kernels are slow, so a large world has few cases of them."""
    found: dict[str, Case] = {}
    for name, precision in PRECISIONS.items():
        kernels = precision[0] != "torch"
        for case in (everything_case, packed_case, logps_case, logits_case):
            if size == 2 or not kernels or case in (everything_case, logits_case):
                found[f"{case.__name__}-{name}"] = partial(case, precision=precision)
        if precision[1] != torch.bfloat16:
            for case in (no_target_case, extreme_case, reference_case, cross_entropy_case, dtensor_case):
                if size == 2 or not kernels:
                    found[f"{case.__name__}-{name}"] = partial(case, precision=precision)
            for case in (volume_case, data_parallel_case, sequence_parallel_case, wrapped_case, one_rank_group_case):
                found[f"{case.__name__}-{name}"] = partial(case, precision=precision)
            if kernels or precision is DOUBLE:
                found[f"sure_case-{name}"] = partial(sure_case, precision=precision)
            if size == 4:
                found[f"two_dimensions_case-{name}"] = partial(two_dimensions_case, precision=precision)
        if kernels and size == 2 and precision[1] == torch.float32:
            found[f"registered_case-{name}"] = partial(registered_case, precision=precision)
            found[f"compiled_case-{name}"] = partial(compiled_case, precision=precision)
            found[f"everything_unsynced_case-{name}"] = partial(
                everything_case, precision=precision, allow_sync=False
            )
    for loss in LOSSES:
        found[f"loss_case-{loss}"] = partial(loss_case, precision=DOUBLE, name=loss)
    for loss in ("dapo", "nothing") if size == 2 else ():
        precision = PRECISIONS[f"{KERNELS[-1]}-float32"]
        found[f"loss_case-{loss}-{KERNELS[-1]}"] = partial(loss_case, precision=precision, name=loss)
    found["refusal_case"] = partial(refusal_case, precision=DOUBLE)
    return {name.replace("_case", ""): case for name, case in found.items()}


# The worlds -------------------------------------------------------------------------------------------------------


def as_rank(rank: int, size: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if GPUS else torch.device("cpu")
    if GPUS:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if GPUS else "gloo", timeout=timedelta(seconds=60))
    world, verdicts = World(rank, size, device), {}
    for name, case in cases(size).items():
        try:
            case(world)
        except Exception:
            verdicts[name] = f"rank {rank}:\n{traceback.format_exc()}"
    torch.save(verdicts, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    """What the ranks of a world of this size found, by case; the world is started when it is first asked for."""
    known: dict[int, dict[str, str]] = {}

    def of(size: int) -> dict[str, str]:
        if size not in known:
            folder = tmp_path_factory.mktemp("ranks")
            with socket.socket() as found:
                found.bind(("127.0.0.1", 0))
                port = found.getsockname()[1]
            mp.spawn(as_rank, (size, port, folder), nprocs=size)
            known[size] = {}
            for rank in range(size):
                for name, error in torch.load(folder / f"{rank}.pt").items():
                    known[size][name] = known[size].get(name, "") + error
        return known[size]

    return of


def of_worlds() -> Iterator[Any]:
    for size in BOUNDS:
        short = pytest.mark.skipif(0 < GPUS < size, reason=f"needs {size} GPUs, or a machine without any")
        yield from (pytest.param(size, case, marks=short) for case in cases(size))


@pytest.mark.parametrize(("size", "case"), of_worlds())
def test_ranks_agree_with_one_process(size: int, case: str, verdicts: Callable[[int], dict[str, str]]) -> None:
    error = verdicts(size).get(case)
    assert error is None, error
