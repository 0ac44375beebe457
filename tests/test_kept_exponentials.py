"""Log-probs whose backward finds their exponentials, anywhere: a stand-in for the kernels that leave them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from conftest import DEVICE, KERNELS, rand
from linear_stand_in import with_stand_in

from grpo_fast import linear_selective_log_softmax
from grpo_fast.ops import _chunks, _linear_logps, _workspace

pytestmark = [
    pytest.mark.usefixtures("poisoned_buffers"),
    pytest.mark.skipif("triton" not in KERNELS, reason="stands in for kernels that Triton's have none of"),
]

N, V, H = 24, 56, 16
HIDDEN = rand(N, H, seed=1).bfloat16()
WEIGHT = rand(V, H, seed=2, scale=0.5).bfloat16()
INDEX = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
MASK = torch.arange(N, device=DEVICE) % 4 != 1
OPTIONS: dict[str, Any] = {"temperature": 0.9, "logit_scale": 1.2}
#: What all rows take: their exponentials, and hidden states with their gradients.
ROOM = N * (2 * V + 8 * H)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows count in each product for logits."""
    found: list[int] = []
    monkeypatch.setattr(_linear_logps, "row_kernels", with_stand_in(lambda rows, count, _: found.append(count)))
    return found


def gradients(
    impl: str, upstream: Tensor, hidden: Tensor = HIDDEN, weight_too: bool = True, times: int = 1, **options: Any
) -> list[Tensor]:
    """Of log-probs and, if asked for, entropies, by hidden states and weight; the last of so many backwards."""
    dtype = torch.float64 if impl == "torch" else torch.bfloat16
    h = hidden.detach().to(dtype).requires_grad_()
    w = WEIGHT.detach().to(dtype, copy=True).requires_grad_(weight_too)
    found = linear_selective_log_softmax(h, w, INDEX, impl=impl, **OPTIONS, **options)
    values = found if isinstance(found, tuple) else (found,)
    leaves = [h, w] if weight_too else [h]
    for _ in range(times):
        grads = torch.autograd.grad(values, leaves, [upstream.to(x.dtype) for x in values], retain_graph=True)
    return list(grads)


def check(upstream: Tensor, **options: Any) -> None:
    truth = gradients("torch", upstream, **options)
    for x, y in zip(gradients("triton", upstream, **options), truth, strict=True):
        assert (x.double() - y).norm() < 6e-3 * y.norm()


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("allow_sync", [True, False])
@pytest.mark.parametrize(("return_entropy", "weight_too"), [(False, True), (True, True), (True, False)])
def test_one_product_for_both(
    mask: Tensor | None, allow_sync: bool, return_entropy: bool, weight_too: bool, products: list[int]
) -> None:
    options: dict[str, Any] = {"mask": mask, "return_entropy": return_entropy, "weight_too": weight_too}
    check(rand(N, seed=4), allow_sync=allow_sync, **options)
    assert products == [18 if mask is not None and allow_sync else N]


@pytest.mark.parametrize("allow_sync", [True, False])
def test_rows_that_nothing_flows_back_to(allow_sync: bool, products: list[int]) -> None:
    """What their hidden states hold does not matter; where they are many, the others are projected again."""
    hidden = HIDDEN.clone()
    hidden[2] = math.nan
    for few, mask in ((True, None), (True, MASK), (False, None), (False, MASK)):
        products.clear()
        upstream = rand(N, seed=4)
        upstream[2 : 3 if few else 16] = 0.0
        counts = upstream != 0 if mask is None else mask & (upstream != 0)
        truth = gradients("torch", upstream, HIDDEN, mask=mask)
        for x, y in zip(gradients("triton", upstream, hidden, mask=mask, allow_sync=allow_sync), truth, strict=True):
            assert (x.double() - y).norm() < 6e-3 * y.norm()
        projected = 18 if mask is not None and allow_sync else N
        again = [] if few or not allow_sync else [int(counts.sum())]
        assert products == [projected, *again]


@pytest.mark.parametrize("zeros", [0, 1])
@pytest.mark.parametrize("forward_waits", [True, False])
def test_only_one_of_the_two_may_wait(
    forward_waits: bool, zeros: int, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a CUDA graph is captured around one of them: the rows are those of the forward."""
    mask = torch.arange(N, device=DEVICE) % 5 != 1
    upstream = rand(N, seed=4)
    upstream[2 : 2 + zeros] = 0.0
    truth = gradients("torch", upstream, mask=mask)
    waits = iter([forward_waits, *2 * [not forward_waits]])
    monkeypatch.setattr(_linear_logps, "may_wait", lambda *_: next(waits))
    for x, y in zip(gradients("triton", upstream, mask=mask), truth, strict=True):
        assert (x.double() - y).norm() < 6e-3 * y.norm()
    assert products == [int(mask.sum()) if forward_waits else N]


def test_rows_that_no_longer_begin_where_kernels_want_them(
    products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view with room between its rows, of which one is put aside: logits are in memory then, of a few rows."""
    rows: list[int] = []

    def projection(weight: Tensor, bias: Tensor | None, count: int) -> _chunks.Projection:
        rows.append(count)
        return _projection(weight, bias, count)

    _projection = _chunks.Projection
    monkeypatch.setattr(_chunks, "Projection", projection)
    upstream = rand(N, seed=4)
    upstream[2] = 0.0
    found = []
    for impl, dtype in (("triton", torch.bfloat16), ("torch", torch.float64)):
        leaves = [x.to(dtype)[:, :12].detach().requires_grad_() for x in (HIDDEN, WEIGHT)]
        logps = linear_selective_log_softmax(*leaves, INDEX, impl=impl, workspace_bytes=ROOM, **OPTIONS)
        found.append(torch.autograd.grad(logps, leaves, upstream.to(logps.dtype)))
    for x, y in zip(*found, strict=True):
        assert (x.double() - y).norm() < 6e-3 * y.norm()
    assert products == [N]
    assert rows == [0, 4]


def test_compiled(products: list[int]) -> None:
    """Nothing is kept: a compiler wants to know sizes ahead."""

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_selective_log_softmax(hidden, weight, INDEX, impl="triton", **OPTIONS)

    upstream = rand(N, seed=4)
    leaves = [x.detach().clone().requires_grad_() for x in (HIDDEN, WEIGHT)]
    found = torch.autograd.grad(torch.compile(value, fullgraph=True, backend="aot_eager")(*leaves), leaves, upstream)
    assert products == [N, N]
    for x, y in zip(found, gradients("torch", upstream), strict=True):
        assert (x.double() - y).norm() < 6e-3 * y.norm()


def test_a_second_backward_projects_again(products: list[int]) -> None:
    upstream = rand(N, seed=4)
    once, twice = (gradients("triton", upstream, times=times) for times in (1, 2))
    assert products == [N, N, N]
    for x, y in zip(once, twice, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-3)


def test_several_launches(products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leaves its rows' exponentials; the backward has one section, whatever it is asked for."""
    monkeypatch.setattr(_workspace, "LAUNCH_ROWS", 10)
    monkeypatch.setattr(_linear_logps, "LAUNCH_ROWS", 10)
    upstream = rand(N, seed=4)
    options: dict[str, Any] = {"mask": MASK, "workspace_bytes": ROOM}
    check(upstream, **options)
    assert products == [10, 8]
    hidden, weight = (x.detach().clone().requires_grad_() for x in (HIDDEN, WEIGHT))
    logps = linear_selective_log_softmax(hidden, weight, INDEX, impl="triton", **OPTIONS, **options)
    (found,) = torch.autograd.grad(logps, hidden, upstream)
    truth, _ = gradients("torch", upstream, **options)
    assert (found.double() - truth).norm() < 6e-3 * truth.norm()
    assert products == 2 * [10, 8]


def test_the_bias_alone(products: list[int]) -> None:
    upstream, found = rand(N, seed=4), []
    for impl, dtype in (("triton", torch.bfloat16), ("torch", torch.float64)):
        hidden, weight, bias = (x.to(dtype) for x in (HIDDEN, WEIGHT, rand(V, seed=5).bfloat16()))
        bias.requires_grad_()
        logps = linear_selective_log_softmax(hidden, weight, INDEX, bias=bias, impl=impl, **OPTIONS)
        found.append(torch.autograd.grad(logps, bias, upstream.to(logps.dtype))[0].double())
    assert (found[0] - found[1]).norm() < 6e-3 * found[1].norm()
    assert products == [N]


@pytest.mark.parametrize("times", [1, 2])
def test_hooks_have_what_is_kept(times: int, products: list[int]) -> None:
    """So a checkpoint does not hold it, and who moves what autograd saves moves it."""
    sizes: list[torch.Size] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.shape)
        return x.clone()

    upstream = rand(N, seed=4)
    plain = gradients("triton", upstream, times=times)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = gradients("triton", upstream, times=times)
    assert sizes.count(torch.Size([N, V])) == 1
    assert products == 2 * times * [N]
    assert all(map(torch.equal, plain, found))


def test_tracing_without_dynamo(products: list[int]) -> None:
    """What is kept has no size there."""
    upstream = rand(N, seed=4)

    def both(hidden: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        logps = linear_selective_log_softmax(hidden, weight, index, impl="triton", **OPTIONS)
        return torch.autograd.grad(logps, (hidden, weight), upstream)

    leaves = [x.detach().clone().requires_grad_() for x in (HIDDEN, WEIGHT)]
    traced = make_fx(both, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves, INDEX)
    assert products == []
    assert all(map(torch.equal, traced(*leaves, INDEX), gradients("triton", upstream)))
    assert products == [N, N]


def test_what_is_not_kept(products: list[int]) -> None:
    """What the workspace does not hold, or no backward will ask for."""
    upstream = rand(N, seed=4)
    check(upstream, workspace_bytes=ROOM)
    check(upstream, workspace_bytes=ROOM - 1)
    assert products == [N, N, H, N - H]  # as many at a time as the rounded gradient takes
    products.clear()
    check(upstream, workspace_bytes=1, weight_too=False, return_entropy=True)
    assert products == [N, *[1] * N]
    products.clear()
    with torch.no_grad():
        linear_selective_log_softmax(HIDDEN, WEIGHT, INDEX, impl="triton", **OPTIONS)
    assert products == [N]


@pytest.mark.parametrize(
    ("kept", "changes"),
    [
        (N, {}),
        (0, {"needs": [False] * 3}),
        (0, {"softcap": 9.0}),
        (0, {"dtype": torch.float16}),
        (N, {"workspace_bytes": ROOM, "needs": [True, False, False]}),
        (0, {"workspace_bytes": ROOM - 1, "needs": [True, False, False]}),
        (0, {"workspace_bytes": ROOM, "needs": [True, False, False], "sparse_grad_tol": 0.01}),
    ],
)
def test_how_much_is_kept(kept: int, changes: dict[str, Any], products: list[int]) -> None:
    """Rows, where there is room for them all, and, if they may be sparse, for the dense ones beside them."""
    options: dict[str, Any] = dict(softcap=None, label_smoothing=0.0, return_entropy=False, needs=[True] * 3)
    options |= dict(workspace_bytes=2**20, allow_sync=True, impl="triton", group=None, sparse_grad_tol=None) | changes
    dtype = options.pop("dtype", torch.bfloat16)
    hidden, weight = HIDDEN[None].to(dtype), WEIGHT.to(dtype)
    arguments = hidden, weight, None, INDEX, None, 1.0, 1.0
    *_, left, _, bases = _linear_logps._linear_logps(*arguments, **options)
    assert (left.size(0), bases.size(0)) == (kept, kept)
    torch.library.opcheck(
        _linear_logps._linear_logps, arguments, options, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("zeros", [0, 3, 16])
def test_kept_in_two_places(zeros: int, bias: bool, products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the workspace, and where the gradient of the weight will be."""
    monkeypatch.setattr(_workspace, "TILE_WORDS", 8)
    options: dict[str, Any] = {"workspace_bytes": ROOM - 700, **OPTIONS}
    upstream, found = rand(N, seed=4), []
    upstream[:zeros] = 0.0
    for impl, dtype in (("triton", torch.bfloat16), ("torch", torch.float64)):
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (HIDDEN, WEIGHT, rand(V, seed=5))]
        sizes: list[torch.Size] = []

        def pack(x: Tensor, sizes: list[torch.Size] = sizes) -> Tensor:
            sizes.append(x.shape)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            of_bias = leaves[2] if bias else None
            logps = linear_selective_log_softmax(*leaves[:2], INDEX, bias=of_bias, impl=impl, **options)
        if impl == "triton":
            assert sizes.count(torch.Size([N, 32])) == 1
            assert sizes.count(torch.Size([V * H])) == 1
        found.append(torch.autograd.grad(logps, leaves[: 2 + bias], upstream.to(logps.dtype)))
    for x, y in zip(*found, strict=True):
        assert (x.double() - y).norm() < 6e-3 * y.norm()
    assert products == ([N, N - zeros] if zeros == 16 else [N])


@pytest.mark.parametrize("zeros", [0, 16])
def test_memory_is_given_back(zeros: int, products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end, and, where rows are projected again, before there is memory for these."""
    kept: list[Tensor] = []
    found: list[int] = []
    original, make_head = _linear_logps._linear_logps_backward, _linear_logps.ChunkedHead

    def spy(*args: Any) -> Any:
        kept.append(args[0])
        return original(*args)

    def head(*args: Any, **options: Any) -> Any:
        found.extend(x.untyped_storage().nbytes() for x in kept)
        return make_head(*args, **options)

    monkeypatch.setattr(_linear_logps, "_linear_logps_backward", spy)
    monkeypatch.setattr(_linear_logps, "ChunkedHead", head)
    upstream = rand(N, seed=4)
    upstream[:zeros] = 0.0
    gradients("triton", upstream)
    assert found == [0 if zeros else 2 * N * V]
    assert [x.untyped_storage().nbytes() for x in kept] == [0]
