"""Matrix products in half precision whose results keep float32, and what precision a gradient is kept in."""

from __future__ import annotations

import torch
from torch import Tensor

#: With so many rows or more, products over so many words at a time are faster than with all (docs/kernels.md).
LONG_ROWS = 6_144
PIECE_WORDS = 76_032
#: With a multiple of so many words cuBLAS's tiles of 256 words and 128 hidden units fill all of an H100's 132
#: multiprocessors to the last, where there are a multiple of 512 hidden units.
WAVE_WORDS = 33 * 256


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, added up in float32 and, where ``out`` is float32, not rounded after."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.device.type == "cuda":
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b within the product, in float32."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.device.type == "cuda":
        # As a batch of one, because torch 2.8's addmm wants out in the precision of a; cuBLAS runs the same product.
        batch = out.unsqueeze(0)
        torch.baddbmm(batch, a.unsqueeze(0), b.unsqueeze(0), out_dtype=out.dtype, out=batch)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def sum_of_products(gradient: tuple[Tensor, ...], weight: Tensor, out: Tensor) -> None:
    """out = gradient @ weight, of a gradient in parts (n, words); ``out`` is float32 unless it is one product."""
    add = product
    pieces = _pieces(gradient)
    for piece, words in zip(pieces, _by_words(weight, pieces), strict=True):
        add(piece, words, out)
        add = add_product


def products_by_words(gradient: tuple[Tensor, ...], x: Tensor, out: Tensor) -> None:
    """out (V, H) = gradient^T @ x."""
    pieces = _pieces(gradient)
    for piece, words in zip(pieces, _by_words(out, pieces), strict=True):
        product(piece.t(), x, words)


def is_one_product(gradient: tuple[Tensor, ...]) -> bool:
    """Whether ``sum_of_products`` is."""
    return len(_pieces(gradient)) == 1


def _pieces(gradient: tuple[Tensor, ...]) -> list[Tensor]:
    return [piece for part in gradient for piece in part.split(_piece_words(*part.shape), 1)]


def _piece_words(rows: int, words: int) -> int:
    """So many words as the pieces have, but for the last."""
    if rows < LONG_ROWS:
        return max(words, 1)
    pieces = max(-(-words // PIECE_WORDS), 1)
    return max(-(-words // (pieces * WAVE_WORDS)) * WAVE_WORDS, 1)


def _by_words(x: Tensor, pieces: list[Tensor]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = x.split([piece.size(1) for piece in pieces])
    return found


def gradient_dtype(x: Tensor) -> torch.dtype:
    """What a gradient of ``x`` is kept in until it is handed out.

    float16 underflows where bfloat16 does not: its gradients stay in float32 until the backward has brought the scale
    of the loss.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype
