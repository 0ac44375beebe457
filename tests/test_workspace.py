"""How many rows a workspace holds: the bound of the peak holds, and what costs no memory is used."""

from __future__ import annotations

import itertools

import pytest
import torch

from grpo_fast.ops._workspace import DENSE_SHARE, TILE_ROWS, RowsAtATime, Sum, rows_at_a_time

MIB = 2**20
V, N = 151_936, 8_192


def plan(workspace_mib: int, hidden: int, live: int = N, sparse: bool = False) -> RowsAtATime:
    """Of a head in bfloat16 whose logits are not kept."""
    weight = torch.empty(V, hidden, dtype=torch.bfloat16, device="meta")
    return rows_at_a_time(
        workspace_mib * MIB,
        live,
        logits_bytes=0,
        gradient_bytes=2 * V,
        weight_sum=Sum.of(weight, torch.bfloat16),
        sparse=sparse,
    )


def test_sections_use_what_the_sum_and_its_rounding_leave() -> None:
    assert plan(512, 2_048).section == 2_048  # as many rows as the rounded gradient takes, 2 V H bytes
    assert plan(1_024, 2_048).section == 1_024 * MIB // (2 * V)
    assert plan(2_048, 2_048).section == N  # all of them, in the room of the sum that one product does not need
    assert plan(2_048, 2_048, live=4 * N).section == 2_048 * MIB // (2 * V)
    assert plan(512, 4_096).section == N


@pytest.mark.parametrize(("dtype", "by"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_sums_that_are_not_spared(dtype: torch.dtype, by: torch.dtype) -> None:
    """float16's gradients stay in float32; those of products in float32 are always rounded."""
    weight = torch.empty(40, 16, dtype=dtype, device="meta")
    assert Sum.of(weight, by) == ((0, 0) if dtype == torch.float16 else (2 * 640, 0))


def test_peak() -> None:
    """Of sections, sums and gradients, whatever the sizes; with several heads and logits beside them too."""
    sizes = itertools.product([1, 300, 2_000], [1, 7, 5_000], [0, 4 * 97], [0, 2 * 97], [8, 512], [1, 10**5], [1, 2])
    for rounded, live, logits, gradient, spared, workspace, models in sizes:
        if logits + gradient == 0 or (models > 1 and logits == 0):
            continue
        weight_sum = Sum(rounded, spared)
        chunk, section, _ = rows_at_a_time(
            workspace,
            live,
            logits_bytes=models * logits,
            gradient_bytes=gradient,
            weight_sum=weight_sum,
            models=models,
        )
        assert min(chunk, section) >= 1
        taken = min(section, live) * gradient + min(chunk, live) * models * logits
        room = max(workspace, rounded) + (spared if section >= live else 0)
        assert taken <= room or section == 1 or chunk <= TILE_ROWS


def test_sparse_rows_leave_room_for_dense_ones() -> None:
    assert plan(2_048, 2_048, sparse=True) == (N, N, 2_971)  # what the rounded gradient takes, too, which comes last
    assert plan(512, 4_096, sparse=True) == (N, N, DENSE_SHARE * N)
    section = plan(2_048, 2_048, live=4 * N, sparse=True).section
    assert section * 3 * V < 2_048 * MIB
    assert plan(2_048, 896, live=7_950, sparse=True).section < 7_950  # next to no room for dense ones
    assert plan(2_048, 896, live=7_950).section == 7_950
