"""FSDP2: each rank keeps a part of every weight, of its gradient and of its optimizer state.

A pass over a batch runs inside the ``forward`` of ``Root``, where the embedding and the head are whole; each layer is
gathered when it is reached, and again in the backward. What ranks do each at their own pace, such as sampling, needs
weights that nobody has to be waited for: ``whole_copy``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


class Root(nn.Module):
    """Holds a model, and runs in its own ``forward`` whatever it is called with."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, work: Callable[[], T]) -> T:
        """What ``work`` returns; FSDP2 finds the tensors to differentiate in tuples, lists and dictionaries."""
        return work()


def shard(model: Any, device_type: str) -> Root:
    """Shard a transformers model in place over all ranks: each of its layers, and the rest as one.

    Raises:
        ValueError: The model's class does not say which modules are its layers.
    """
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ValueError(f"shard: {type(model).__name__} does not say what its layers are, want _no_split_modules")
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    root = Root(model)
    for module in (*layers, root):
        fully_shard(module, mesh=mesh)
    return root


def outline(model: nn.Module) -> nn.Module:
    """A copy of a model without its weights' values, to be made before it is sharded."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()})


def whole_copy(outline: nn.Module, model: nn.Module) -> Any:
    """The model again, with all weights on every rank and without FSDP2. All ranks call it."""
    pairs = zip(outline.parameters(), model.parameters(), strict=True)
    return copy.deepcopy(outline, {id(empty): nn.Parameter(whole(p), requires_grad=False) for empty, p in pairs})


def whole(x: Tensor) -> Tensor:
    """All of a tensor, gathered if it is sharded. All ranks call it."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def placed_like(like: Tensor, x: Tensor) -> Tensor:
    """A tensor that every rank has whole, where and sharded as ``like``, without a message."""
    x = x.to(like.device)
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
