"""Memory for the gradients of a section's rows of logits: in one place, or in two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.ops._workspace import row_width


@dataclass(frozen=True)
class Section:
    """Rows of gradients, or of what they are made of.

    Attributes:
        own: (rows, width), the gradients of all words, or of the first ones.
        borrowed: Where those of the last words are then, one row after the other; as many elements as the weight has,
            for the gradient of the weight is to have that memory next. Else empty.
        parts: (rows, words) each, one or two, of all words in order.
    """

    own: Tensor
    borrowed: Tensor
    parts: tuple[Tensor, ...]

    @staticmethod
    def of(own: Tensor, borrowed: Tensor, words: int) -> Section:
        """That of so many words in all."""
        if borrowed.numel() == 0:
            return Section(own, borrowed, (own[:, :words],))
        rows, split = own.shape
        width = row_width(words - split, own)
        rest = borrowed[: rows * width].view(rows, width)
        return Section(own, borrowed, (own, rest[:, : words - split]))

    @staticmethod
    def empty(weight: Tensor, rows: int, dtype: torch.dtype, borrowed: int = 0) -> Section:
        """Memory for so many rows over the words of ``weight`` (V, H), of which so many are borrowed."""
        V = weight.size(0)
        own = weight.new_empty(rows, row_width(V - borrowed, weight), dtype=dtype)
        return Section.of(own, weight.new_empty(weight.numel() if borrowed > 0 else 0, dtype=dtype), V)

    def __getitem__(self, rows: slice) -> tuple[Tensor, ...]:
        """The parts of these rows."""
        return tuple(part[rows] for part in self.parts)

    def give_back(self) -> None:
        """The memory that is borrowed."""
        self.borrowed.untyped_storage().resize_(0)

    def release(self) -> None:
        """All memory, whoever still holds a part of it."""
        self.give_back()
        self.own.untyped_storage().resize_(0)
