"""A vocabulary in shards, one on each rank of a process group: what the ranks tell each other, and when.

A rank knows its own shard's logits, and with them the softmax over its own tokens. Three numbers a row make the
softmax over all tokens of those: the log-sum-exp of the shard, the mean logit under the shard's softmax, and the
sampled token's logit, from the rank that has it::

    shard_index   sizes and what has to agree ----> ids as columns of the shard     all-gather of 5 integers a rank
    merge         log-sum-exp of the shard -------> its maximum over the ranks      all-reduce of 8 bytes a row
                  exp, mean, sampled logit -------> log-prob and entropy            all-reduce of 24 bytes a row
    backward      d_hidden of the shard ----------> d_hidden                        all-reduce of 4 H bytes a row

They are exchanged in float64, so that a token that is nearly sure keeps 1 - p. Whatever follows from log-prob and
entropy is computed on every rank alike, so upstream gradients are whole, and the gradient of a shard is its own.

The kernels see the shard as a vocabulary of its own, with the statistics of the whole in the backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast.ops._rows import may_wait
from grpo_fast.reference import CHUNK_ELEMENTS, accumulation_dtype, map_rows, project, scaled_logits

#: The column of an id that no rank has.
OUTSIDE = torch.iinfo(torch.int64).min
#: Stands in for the log-sum-exp of a shard with nothing but banned tokens: its exp is 0, and it times 0 is no NaN.
LOWEST = -1e30
LN2 = math.log(2.0)


# The group -------------------------------------------------------------------------------------------------------


def local_shards(process_group: object, dim: int, **tensors: Any) -> tuple[str | None, list[Any]]:
    """The name of the group, None where a rank has the whole vocabulary, and of each DTensor this rank's part.

    A DTensor's vocabulary is its dimension ``dim``. A gradient comes back to it as a DTensor of the same placement.
    """
    for name, x in tensors.items():
        if not hasattr(x, "device_mesh"):
            continue
        from torch.distributed.tensor import Shard

        wanted, placements, mesh = (Shard(dim % x.dim()),), tuple(x.placements), x.device_mesh
        if mesh.ndim != 1 or placements != wanted:
            got = f"{placements} on a {mesh.ndim}-D mesh"
            raise ValueError(f"{name}: got a DTensor placed as {got}, want {wanted} on a 1-D mesh")
        group = mesh.get_group()
        if getattr(process_group, "group_name", group.group_name) != group.group_name:
            raise ValueError(
                f"process_group: got another group than that of the mesh of {name}, want None or the same"
            )
        process_group = group
    parts = [x.to_local() if hasattr(x, "device_mesh") else x for x in tensors.values()]
    if process_group is None:
        return None, parts
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        kind = type(process_group).__name__
        raise TypeError(f"process_group: got {kind}, want a torch.distributed.ProcessGroup that this rank belongs to")
    return (str(process_group.group_name) if process_group.size() > 1 else None), parts


def resolve(group: str) -> dist.ProcessGroup:
    """The group of this name. Registered ops take names, as torch's own collectives do under torch.compile."""
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]


# Ids as columns of a shard ---------------------------------------------------------------------------------------


@torch.library.custom_op("grpo_fast::shard_index", mutates_args=())
def shard_index(
    index: Tensor, size: int, features: int, hidden_gradient: bool, allow_sync: bool, group: str
) -> Tensor:
    """Ids ``index`` of the whole vocabulary as columns of this rank's shard of ``size`` tokens.

    An id that another rank has is negative or at least ``size``, one that none has is ``OUTSIDE``. Ranks that
    disagree on what has to be equal would wait for each other for ever, or add up what does not belong together; if
    the host may wait for the sizes anyway, all of them raise instead.
    """
    ids = index.reshape(-1).long()
    places = torch.arange(1, ids.numel() + 1, device=ids.device)
    numbers = (size, ids.numel(), features, int(hidden_gradient))
    mine = torch.stack([*(ids.new_full((), n) for n in numbers), (ids * places).sum()])
    ranks = resolve(group)
    every = [torch.empty_like(mine) for _ in range(ranks.size())]
    dist.all_gather(every, mine, group=ranks)
    table = torch.stack(every)
    if may_wait(allow_sync, index):
        _check_agreement(table.tolist())
    local = index.long() - table[: ranks.rank(), 0].sum()
    return torch.where((index >= 0) & (index < table[:, 0].sum()), local, OUTSIDE)


@shard_index.register_fake
def _(index: Tensor, *_: Any) -> Tensor:
    return index.new_empty(index.shape, dtype=torch.int64)


def _check_agreement(table: list[list[int]]) -> None:
    """Check what the ranks say; each of them sees the same and raises the same."""
    sizes, rows, features, gradients, ids = (list(column) for column in zip(*table, strict=True))
    if min(sizes) < 1:
        raise ValueError(f"process_group: got shards of {sizes} tokens by rank, want at least 1 on each")
    for got, what in (
        (rows, "a number of rows of"),
        (features, "a hidden size of"),
        (gradients, "hidden.requires_grad"),
        (ids, "token ids with checksums of"),
    ):
        if len(set(got)) > 1:
            raise ValueError(f"process_group: got {what} {got} by rank, want the same on each")


def _here(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)


# One softmax of many ---------------------------------------------------------------------------------------------


class _SumFunction(torch.autograd.Function):
    """The sum over the ranks. Each computes the same from it, so each has all of the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=resolve(group))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


class _ReplicatedFunction(torch.autograd.Function):
    """What every rank has the same of. Each has the gradient through its own shard, so the gradient is their sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        total = upstream.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=resolve(ctx.group))
        return total, None


def merge(lse: Tensor, mean: Tensor, target: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, log-sum-exp) over all shards, float64, differentiable.

    Args:
        lse: (...,) float64, log-sum-exp of a row's scaled logits in this shard.
        mean: (...,) float64, their mean under the softmax over this shard.
        target: (...,) float64, the sampled token's, 0 on the ranks that do not have it.
        group: The name of the group.
    """
    top = lse.detach().clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=resolve(group))
    share = torch.exp(lse - top)
    total, weighted, target = _SumFunction.apply(torch.stack([share, share * mean, target]), group).unbind()
    lse = top + total.log()
    return target - lse, lse - weighted / total, lse


# Around the kernels ----------------------------------------------------------------------------------------------


def merge_rows(
    index: Tensor,
    size: int,
    mask: Tensor | None,
    logps: Tensor,
    entropy: Tensor,
    shifts: Tensor,
    totals: Tensor,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropy, shifts, totals) over all shards, float32, of what the kernels found in this one.

    ``entropy`` may be empty, and then so is that of all. ``index`` is ``shard_index``'s.
    """
    wants_entropy = entropy.numel() > 0
    some = totals > 0  # a shard of banned tokens has no softmax
    lse = torch.where(some, LN2 * (shifts.double() + totals.double().log2()), LOWEST)
    mean = torch.where(some, lse - entropy.double(), LOWEST) if wants_entropy else lse
    here = torch.where(some, logps.double() + lse, -torch.inf)
    logps, entropy, lse = merge(lse, mean, torch.where(_here(index, size), here, 0.0), group)
    logps = torch.where(index == OUTSIDE, torch.nan, logps)
    if mask is not None:
        logps, entropy = (torch.where(mask, x, 0.0) for x in (logps, entropy))
    lse = lse / LN2
    shifts = lse.float()
    totals = torch.exp2(lse - shifts.double()).float()
    return logps.float(), entropy.float() if wants_entropy else entropy.new_empty(0).float(), shifts, totals


def upstream_in_shard(
    index: Tensor, size: int, entropy: Tensor, d_logps: Tensor, d_entropy: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(entropy, d_logps, d_entropy) from which the kernels' backward makes this shard's part of the gradient.

    To a row whose token is not in it the kernels give the gradient of its entropy H alone,
    -d_entropy p (log p + H). With H + d_logp / d_entropy in the place of H, that has the -d_logp p of the log-prob
    too. Where no gradient of the entropy is wanted, one that float32 does not see stands in for it.
    """
    d_logps = torch.where(index == OUTSIDE, 0.0, d_logps)
    if d_entropy is None:
        entropy, d_entropy = torch.zeros_like(d_logps), torch.zeros_like(d_logps)
    elsewhere = ~_here(index, size)
    unseen = d_logps * 2.0**-40
    d_entropy = torch.where(elsewhere & (d_entropy.abs() < unseen.abs()), unseen, d_entropy)
    entropy = torch.where(elsewhere & (d_entropy != 0), entropy + d_logps / d_entropy, entropy)
    return entropy, d_logps, d_entropy


# In plain PyTorch ------------------------------------------------------------------------------------------------


def _statistics(logits: Tensor, index: Tensor, **logits_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, mean, target) of this shard as ``merge`` takes them, differentiable."""
    z = scaled_logits(logits.to(accumulation_dtype(logits)), **logits_options)
    top = z.detach().amax(-1, keepdim=True).clamp(min=LOWEST)
    d = z - top
    e = d.exp()
    total = e.sum(-1).clamp(min=torch.finfo(e.dtype).tiny)
    mean = (e * d.masked_fill(d == -torch.inf, 0.0)).sum(-1) / total
    here = _here(index, logits.size(-1))
    target = d.gather(-1, torch.where(here, index, 0).unsqueeze(-1)).squeeze(-1)
    base = top.squeeze(-1).double()
    return total.log() + base, mean + base, torch.where(here, target + base, 0.0)


def _merge_ref(
    statistics: tuple[Tensor, ...], index: Tensor, mask: Tensor | None, dtype: torch.dtype, group: str
) -> tuple[Tensor, Tensor]:
    lse, mean, target = statistics
    logps, entropy, _ = merge(lse, mean, target, group)
    logps = torch.where(index == OUTSIDE, torch.nan, logps)
    if mask is not None:
        logps, entropy = (torch.where(mask.bool(), x, 0.0) for x in (logps, entropy))
    return logps.to(dtype), entropy.to(dtype)


def sharded_logps_ref(
    logits: Tensor, index: Tensor, mask: Tensor | None, group: str, **logits_options: Any
) -> tuple[Tensor, Tensor]:
    """``logps_and_entropy_ref`` where ``logits`` are this rank's shard and ``index`` is ``shard_index``'s."""
    if mask is not None:
        logits = logits.masked_fill(~mask.bool().unsqueeze(-1), 0.0)
    statistics = _statistics(logits, index, **logits_options)
    return _merge_ref(statistics, index, mask, accumulation_dtype(logits), group)


def sharded_linear_logps_ref(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    group: str,
    **logits_options: Any,
) -> tuple[Tensor, Tensor]:
    """``linear_logps_ref`` where ``weight`` and ``bias`` are this rank's shard and ``index`` is ``shard_index``'s."""
    dtype = accumulation_dtype(hidden, weight)
    w = weight.to(dtype)
    b = None if bias is None else bias.to(dtype)
    x = _ReplicatedFunction.apply(hidden.to(dtype), group)

    def chunk(h: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return _statistics(project(h, w, b), ids, **logits_options)

    statistics = map_rows(
        chunk,
        (x.reshape(-1, x.size(-1)), index.reshape(-1)),
        None if mask is None else mask.reshape(-1),
        max(1, CHUNK_ELEMENTS // weight.size(0)),
    )
    return _merge_ref(tuple(s.view(index.shape) for s in statistics), index, mask, dtype, group)
