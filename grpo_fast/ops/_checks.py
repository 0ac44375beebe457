"""Input checks shared by the ops. Each error names the argument, what came and what is wanted."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IDS = (torch.int32, torch.int64)
MASKS = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


class Shapes:
    """Collects named dimensions over an op's arguments, so that each is checked against those before it.

    ``check("logits", x, ("B", "T", "V"), FLOATS)`` binds B, T and V, or compares with what is bound already.
    Integers stand for themselves. The first tensor fixes the device.
    """

    def __init__(self) -> None:
        self.dims: dict[str, int] = {}
        self.device: torch.device | None = None

    def check(
        self, name: str, x: object, *shapes: tuple[str | int, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
    ) -> None:
        """Check that tensor ``x`` has one of ``shapes``, one of ``dtypes``, and the others' device."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, want a tensor of shape {self._want(shapes)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name}: got dtype {_short(x.dtype)}, want {' or '.join(map(_short, dtypes))}")
        matching = next((shape for shape in shapes if self._fits(x, shape)), None)
        if matching is None:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, want {self._want(shapes)}")
        self.dims.update({dim: size for dim, size in zip(matching, x.shape, strict=True) if isinstance(dim, str)})
        if self.device is None:
            self.device = x.device
        elif x.device != self.device:
            raise ValueError(f"{name}: got a tensor on {x.device}, want {self.device} like the others")

    def optional(
        self, name: str, x: object, *shapes: tuple[str | int, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
    ) -> None:
        """``check`` unless ``x`` is None."""
        if x is not None:
            self.check(name, x, *shapes, dtypes=dtypes)

    def _size(self, dim: str | int) -> int | None:
        return dim if isinstance(dim, int) else self.dims.get(dim)

    def _fits(self, x: Tensor, shape: tuple[str | int, ...]) -> bool:
        return x.dim() == len(shape) and all(self._size(d) in (None, n) for d, n in zip(shape, x.shape, strict=True))

    def _want(self, shapes: tuple[tuple[str | int, ...], ...]) -> str:
        def spell(shape: tuple[str | int, ...]) -> str:
            names = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
            sizes = ", ".join(str(self._size(d) if self._size(d) is not None else d) for d in shape)
            sizes += "," if len(shape) == 1 else ""
            return f"({names})" if names == sizes else f"({names}) = ({sizes})"

        return " or ".join(map(spell, shapes))


def check_positive(name: str, value: object) -> None:
    """Check a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, want a number")
    if not 0 < value <= sys.float_info.max:  # not isfinite, which Dynamo cannot ask a number that changes
        raise ValueError(f"{name}: got {value}, want a finite number > 0")


def check_logits_options(temperature: object, logit_scale: object, softcap: object, of: str = "") -> None:
    """Check what every op over logits takes; ``of`` prefixes the names of what each model has of its own."""
    check_positive("temperature", temperature)
    check_positive(f"{of}logit_scale", logit_scale)
    if softcap is not None:
        check_positive(f"{of}softcap", softcap)


def check_vocabulary(size: int, group: str | None = None) -> None:
    """Check that there is something to choose from; of shards ``shard_index`` does."""
    if group is None and size < 2:
        raise ValueError(f"vocabulary: got V = {size}, want at least 2")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check one of a few names."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, want one of {', '.join(choices)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
