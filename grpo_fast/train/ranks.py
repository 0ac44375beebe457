"""The ranks of a run under torchrun: each takes its share of a batch; gradients, metrics and decisions are shared."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and of how many. A single one communicates with nobody."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def join() -> Ranks:
        """Those that torchrun's environment describes; one without it. A GPU each, if there are any."""
        if "RANK" not in os.environ:
            return Ranks()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return Ranks(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Part from the others; a single rank that torchrun started has a group to leave too."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part, in order; parts differ by one item at most."""
        begin, end = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return list(items[begin:end])

    def sum(self, x: Tensor) -> Tensor:
        """``x`` added up over the ranks, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up gradients over the ranks, in one message; of a sharded model FSDP2 has their mean already."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.count == 1 or not gradients:
            return
        if isinstance(gradients[0], DTensor):
            for gradient in gradients:
                gradient.mul_(self.count)
            return
        total = self.sum(torch.cat([g.reshape(-1) for g in gradients]))
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather(self, value: T) -> list[T]:
        """What each rank has, on all of them."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until every rank has come here."""
        self.gather(None)

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return any(self.gather(flag))

    def from_first(self, value: T) -> T:
        """What the first rank has. The others wait for it."""
        if self.count == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found)
        return found[0]


#: The ranks of a process that torchrun did not start.
ALONE = Ranks()
