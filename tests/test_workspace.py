"""How many rows a workspace holds: the bound of the peak holds, and what costs no memory is used."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_fast.ops import _chunks, _products
from grpo_fast.ops._chunks import ChunkedHead, Needs
from grpo_fast.ops._rows import HiddenRows, Rows
from grpo_fast.ops._section import Section
from grpo_fast.ops._sparse import SparseGradient
from grpo_fast.ops._workspace import (
    LAUNCH_ROWS,
    LOGITS_SHARE,
    PASSING_ROWS,
    TILE_ROWS,
    TILE_WORDS,
    RowsAtATime,
    Sum,
    rows_at_a_time,
    section_rows,
)

MIB = 2**20
V, N = 151_936, 8_192
#: An element of a sparse row, with what it takes to sort it.
ELEMENT_BYTES = 50


def plan(workspace_mib: int, hidden: int, live: int = N, sparse: bool = False, own_sum: bool = True) -> RowsAtATime:
    """Of a head in bfloat16 whose logits are not kept."""
    weight = torch.empty(V, hidden, dtype=torch.bfloat16, device="meta")
    return _chunks.plan(
        workspace_mib * MIB, live, weight, torch.bfloat16, logits_a_row=0, own_sum=own_sum, sparse=sparse
    )


def test_sections_use_what_the_sum_leaves() -> None:
    a_row = 2 * V + 8 * 2_048
    assert plan(512, 2_048).section == 2_048  # as many rows as the rounded gradient takes, 2 V H bytes
    assert plan(1_024, 2_048).section == 2_048
    assert plan(2_048, 2_048, live=4 * N).section == (2_048 * MIB - 2 * V * 2_048) // a_row
    assert plan(2_048, 2_048, own_sum=False).section == 2_048 * MIB // a_row
    for workspace, hidden in ((2_048, 2_048), (512, 4_096), (2_048, 4_096), (4_096, 2_048)):
        assert plan(workspace, hidden).section == N


@pytest.mark.parametrize(
    ("words", "hidden", "rows"),
    [
        (V, 896, range(6_000, 9_000, 150)),
        (V, 2_048, range(6_000, 9_000, 150)),
        (V, 4_096, range(6_000, 12_000, 150)),
        (32_000, 8_192, range(6_000, 20_000, 95)),
        (32_000, 16_384, range(21_000, 26_000, 95)),
        (50_257, 1_600, range(15_000, 30_000, 250)),
    ],
)
def test_what_is_borrowed_fits(words: int, hidden: int, rows: range) -> None:
    """In what the gradient of the weight will take; and what is left, in the workspace."""
    weight = torch.empty(words, hidden, dtype=torch.bfloat16, device="meta")
    some = 0
    for live, workspace in itertools.product(rows, (512 * MIB, 1_024 * MIB, 2_048 * MIB)):
        _, section, _, borrowed = _chunks.plan(
            workspace, live, weight, torch.bfloat16, logits_a_row=0, own_sum=True, sparse=False
        )
        if borrowed == 0:
            continue
        some += 1
        budget = max(workspace, 4 * words * hidden + hidden * 8 * hidden)
        assert section == live
        assert 0 < words - borrowed == (words - borrowed) // TILE_WORDS * TILE_WORDS
        assert 2 * live * -(-borrowed // 8) * 8 <= 2 * words * hidden
        assert 2 * live * (words - borrowed) + 8 * live * hidden <= budget
        assert 2 * live * (words - borrowed) + 2 * borrowed * hidden + 2 * live * hidden <= budget
    assert some > 0


def test_nothing_is_borrowed_without_need() -> None:
    assert plan(2_048, 2_048).borrowed > 0
    assert plan(2_048, 2_048, own_sum=False).borrowed == 0
    assert plan(2_048, 2_048, live=6_000).borrowed == 0


@pytest.mark.parametrize("hidden", [896, 2_048, 4_096])
def test_sections_fill_waves(hidden: int) -> None:
    """No more rows than there may be, and no more time than with equal parts of as few sections as there can be."""
    for rows, most in itertools.product(
        (1, 700, 8_192, 10_000, 32_768, 131_072), (1, 100, 128, 700, 2_048, 4_770, 7_067)
    ):
        found = section_rows(rows, most, hidden)
        assert 1 <= found <= max(min(rows, most), 1)
        assert found in (rows, most) or found % TILE_ROWS == 0

    def time(rows: int, n: int) -> float:
        parts = [n] * (rows // n) + [rows % n] * (rows % n > 0)
        return sum(-(-(-(-part // 256) * hidden // 128) // 132) + hidden / 6_000 for part in parts)

    for rows, most in itertools.product((10_000, 32_768), (2_048, 4_770, 7_067)):
        equal = -(-rows // -(-rows // most))
        assert time(rows, section_rows(rows, most, hidden)) <= time(rows, equal)
    assert section_rows(32_768, 4_770, 2_048) == 4_096
    assert section_rows(8_192, 2_048, 2_048) == 2_048


def test_sums_by_precision() -> None:
    """float16's gradients stay in float32, until the backward brings the scale."""
    found = [
        Sum.of(torch.empty(40, 16, dtype=x, device="meta")) for x in (torch.bfloat16, torch.float16, torch.float32)
    ]
    assert found == [(2 * 640, 2 * 640, 40), (0, 0, 1), (0, 0, 1)]


@pytest.mark.parametrize("models", [1, 2])
def test_chunks_and_sections_fit(models: int) -> None:
    """Unless they are of one row, whatever the sizes."""
    logits, gradient, states = models * 4 * 97, 2 * 97, 40
    workspaces = [*range(1, 800 * logits, 7 * 97), 10**6, 10**8]
    sums = [Sum(), Sum(97 * 10, 97 * 10, 97), Sum(97 * 1_000, 97 * 1_000, 97)]
    for workspace, weight_sum, live, kept in itertools.product(workspaces, sums, [0, 1, 7, 5_000], [logits, 0]):
        rows: dict[str, Any] = dict(logits_bytes=kept, gradient_bytes=gradient, weight_sum=weight_sum, models=models)
        chunk, section, *_ = rows_at_a_time(workspace, live, states_bytes=states, **rows)
        taken = min(section, live) * (gradient + states) + min(chunk, live) * kept
        taken += weight_sum.beyond * (section < live)
        least = weight_sum.rounded + weight_sum.beyond + weight_sum.rounded // gradient * states
        assert taken <= max(workspace, least) or min(section, live) == 1
        if kept == 0:
            assert section <= chunk <= max(section, LAUNCH_ROWS)
            assert chunk == section or live <= section or chunk * states <= max(workspace, least)


def test_chunks_are_not_short_because_a_tile_is_not_full() -> None:
    rows = [
        rows_at_a_time(4 * n, 10**4, logits_bytes=1, gradient_bytes=1, states_bytes=0, weight_sum=Sum()).chunk
        for n in range(800)
    ]
    assert rows == sorted(rows)
    assert all(2 * chunk >= n for n, chunk in enumerate(rows))


def test_rows_without_a_gradient_pass_in_short_chunks() -> None:
    for live, chunk in ((0, PASSING_ROWS), (1, 2_048 * MIB // (4 * V) // LOGITS_SHARE)):
        rows: dict[str, Any] = dict(logits_bytes=4 * V, gradient_bytes=2 * V, states_bytes=0, weight_sum=Sum())
        assert abs(rows_at_a_time(2_048 * MIB, live, **rows).chunk - chunk) <= 3 * TILE_ROWS * (live > 0)


def test_sparse_rows_leave_room_for_dense_ones() -> None:
    for workspace, hidden, live in ((2_048, 2_048, N), (512, 4_096, N), (512, 4_096, N // 2)):
        found = plan(workspace, hidden, live=live, sparse=True)
        assert found.section == live
        assert found.aside >= live // 8
        budget = max(workspace * MIB, 2 * V * hidden) + 2 * V * hidden
        own = 2 * live * V + live * 12 * 320
        assert own + 2 * V * found.aside <= budget + 2 * V * hidden  # before the gradient of the weight is there
        assert 2 * V * hidden + 2 * V * found.aside + 12 * 320 * live <= budget
    section = plan(2_048, 2_048, live=4 * N, sparse=True).section
    assert section * 3 * V < 2_048 * MIB
    assert plan(512, 4_096, live=4 * N, sparse=True).section == 2 * V * 4_096 // (3 * V + 12 * 320)
    assert plan(2_048, 896, live=7_950, sparse=True).section < 7_950  # next to no room for dense ones
    assert plan(2_048, 896, live=7_000).section == 7_000


class Memory(TorchDispatchMode):
    """What tensors made on the device "meta" take, at the most."""

    def __init__(self, *inputs: Tensor | None) -> None:
        super().__init__()
        self._inputs = [StorageWeakRef(x.untyped_storage()).cdata for x in inputs if x is not None]
        self._held: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and x.is_meta:
                held = StorageWeakRef(x.untyped_storage())
                if held.cdata not in self._inputs:
                    self._held[held.cdata] = held
        self._held = {key: held for key, held in self._held.items() if not held.expired()}
        sizes = [torch.UntypedStorage._new_with_weak_ptr(key).nbytes() for key in self._held]  # some are resized
        self.peak = max(self.peak, sum(sizes))
        return results


class StandIn:
    """Rows of which so many are dense, the others short."""

    def __init__(self, rows: int, dense: int, elements: int) -> None:
        self._rows, self._totals = rows, [elements * (rows - dense), 0, 0, dense]

    def gradient(self, which: Tensor | None = None) -> None:
        pass

    def sparse(self, tolerance: float, keys: Tensor, elements: Tensor, **options: Any) -> SimpleNamespace:
        starts, ends = keys.new_empty(2, self._rows).unbind()
        return SimpleNamespace(starts=starts, ends=ends, totals=torch.tensor(self._totals), limits=None)


#: By name: dtypes of hidden and weight, and what else there is.
PATHS: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "no logits": (torch.bfloat16, torch.bfloat16, {"logits_a_row": 0}),
    "logits": (torch.bfloat16, torch.bfloat16, {}),
    "two models": (torch.bfloat16, torch.bfloat16, {"logits_a_row": 2}),
    "float16": (torch.float16, torch.float16, {"scale": torch.empty((), device="meta")}),
    "float32": (torch.float32, torch.float32, {}),
    "float32 states": (torch.float32, torch.bfloat16, {}),
    "float32 weight": (torch.bfloat16, torch.float32, {}),
    "frozen": (torch.bfloat16, torch.bfloat16, {"needs": Needs(True, False, False), "hidden_in_float32": True}),
    "into a buffer": (torch.bfloat16, torch.bfloat16, {"logits_a_row": 0, "weight_grad_out": True}),
    "sparse": (torch.bfloat16, torch.bfloat16, {"logits_a_row": 0, "sparse": True}),
    "sparse into a buffer": (
        torch.bfloat16,
        torch.bfloat16,
        {"logits_a_row": 0, "sparse": True, "weight_grad_out": True},
    ),
    "sparse, but for want of a kernel": (torch.bfloat16, torch.bfloat16, {"sparse": True}),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("words", "size"), [(V, 2_048), (32_000, 4_096), (1_000, 64)])
def test_peak(path: str, words: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a head makes, beyond the gradients that it hands out and some numbers a row."""
    for module in (_chunks, _products):
        for name in ("product", "add_product"):
            monkeypatch.setattr(module, name, lambda *_: None)
    hidden_dtype, dtype, options = PATHS[path]
    of_sums = torch.promote_types(hidden_dtype, dtype)
    dense_shares = [0.0, 0.1, 0.3, 0.45, 1.0] if options.get("sparse") else [0.0]
    for workspace, live, dense in itertools.product([64 * MIB, 512 * MIB, 2**31, 2**36], [0, 700, N], dense_shares):
        hidden = torch.empty(1, N, size, dtype=hidden_dtype, device="meta")
        weight = torch.empty(words, size, dtype=dtype, device="meta")
        rows = Rows(N, live, N, torch.empty(N, dtype=torch.int64, device="meta"))
        made = options | {"needs": options.get("needs", Needs(True, True, False)), "workspace_bytes": workspace}
        if options.get("weight_grad_out"):
            made["weight_grad_out"] = torch.empty(words, size, device="meta")
        own_sum = made["needs"].weight and not options.get("weight_grad_out")
        with Memory(hidden, weight, rows.index, made.get("weight_grad_out"), made.get("scale")) as memory:
            head = ChunkedHead(HiddenRows(hidden, rows, of_sums), weight, None, **made)
            teacher = head.beside(weight, None) if path == "two models" else None
            sparse = None
            if options.get("sparse") and not options.get("logits_a_row", 1):
                sparse = SparseGradient(head, lambda *_, **__: None, 1e-3)
            for part, has_gradient in head.chunks():
                if has_gradient and sparse is not None:
                    count = part.stop - part.start
                    sparse.backpropagate(part, StandIn(count, int(dense * count), 100))
                elif has_gradient:
                    head.backpropagate(part)
            if sparse is not None:
                sparse.finish()
            del teacher
            d_hidden, d_weight, _ = head.finish()
        assert d_weight.numel() == (words * size if own_sum else 0)
        most = workspace + 64 * N
        if own_sum and dtype == torch.bfloat16:  # the workspace, or the sum, and hidden states of H rows
            most = max(workspace, 4 * words * size + 8 * size * size) + 64 * N
        if of_sums != dtype:
            most += weight.numel() * of_sums.itemsize  # a copy, in the precision of the products
        if min(head._chunk_rows, head.longest_section) <= 1 or live == 0 or sparse is not None:
            section = max(head.longest_section, min(N - live, head._chunk_rows))
            most += section * size * (2 * of_sums.itemsize + 4)
        if sparse is not None:
            most += 2 * words * size * own_sum
            most += live * size * of_sums.itemsize  # all states, where the elements' sums read them
            most += 100 * live * ELEMENT_BYTES + 12 * 320 * head.longest_section + 8 * (words + 1)
        assert memory.peak - d_hidden.nbytes - d_weight.nbytes <= most, (workspace, live, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_back_whoever_holds_it(dtype: torch.dtype) -> None:
    hidden, weight = torch.ones(1, 6, 4, dtype=dtype), torch.ones(5, 4, dtype=dtype)
    states = HiddenRows(hidden, Rows(6, 6, 6), dtype)
    head = ChunkedHead(states, weight, None, Needs(True, True, False), workspace_bytes=200)
    held = []
    for part, _ in head.chunks():
        held += [head.logits(part), head.gradient(part)[0].zero_()]
        head.backpropagate(part)
    assert all(x.untyped_storage().nbytes() > 0 for x in held)
    head.finish()
    assert all(x.untyped_storage().nbytes() == 0 for x in held)


def test_memory_that_is_there_already_is_one_section() -> None:
    """Whatever the workspace, and whichever gradients are asked for."""
    hidden, weight = torch.ones(1, 6, 4, dtype=torch.bfloat16), torch.ones(5, 4, dtype=torch.bfloat16)
    section = Section.of(weight.new_ones(6, 5), weight.new_empty(0), 5)
    states = HiddenRows(hidden, Rows(6, 6, 6), torch.bfloat16)
    needs = Needs(True, False, False)
    head = ChunkedHead(states, weight, None, needs, workspace_bytes=1, logits_a_row=0, section=section)
    assert list(head.chunks()) == [(slice(0, 6), True)]
    assert head.gradient(slice(0, 6))[0].data_ptr() == section.own.data_ptr()
