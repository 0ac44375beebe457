"""The kernels over logits against float64: on a GPU compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import DEVICE, rand

from grpo_fast import selective_log_softmax
from grpo_fast.ops._library import gradient_buffer
from grpo_fast.ops.selective_log_softmax import _selective_log_softmax

pytestmark = pytest.mark.usefixtures("poisoned_buffers")
B, T = 3, 4


def ids(*shape: int, vocabulary: int, seed: int = 9) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def peaked(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits up to 40 and the tokens sampled from them, most rows nearly sure of theirs."""
    logits, index = rand(*shape, seed=seed), ids(*shape[:-1], vocabulary=shape[-1])
    heights = torch.linspace(0, 40, index.numel(), device=DEVICE).view(index.shape)
    return logits.scatter(-1, index[..., None], heights[..., None]), index


def results(
    logits: Tensor, index: Tensor, impl: str, *, entropy: bool = True, upstream_seed: int = 3, **options: Any
) -> tuple[Tensor, ...]:
    """logps, entropy and the gradient of a random combination of them, as float64."""
    x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    view = x
    logps, h = selective_log_softmax(view, index, return_entropy=True, impl=impl, **options)
    a, b = (rand(*index.shape, seed=upstream_seed + i) for i in range(2))
    value = torch.where(a.isnan() | logps.isnan(), 0.0, a * logps) + (b * h if entropy else 0.0)
    (grad,) = torch.autograd.grad(value.sum(), x)
    return tuple(y.detach().double() for y in (logps, h, grad))


def check(impl: str, logits: Tensor, index: Tensor, **options: Any) -> None:
    """The kernel's error against float64 is at most that of torch in the same precision, plus a little."""
    got = results(logits, index, impl, **options)
    own = results(logits, index, "torch", **options)
    truth = results(logits.double(), index, "torch", **options)
    for name, x, y, z, floor in zip(("logps", "entropy", "grad"), got, own, truth, (1e-5, 1e-5, 0.0), strict=True):
        assert torch.equal(x.isnan(), z.isnan()), name
        if z.numel() == 0:
            continue
        error, allowed = ((v - z).nan_to_num(posinf=0.0, neginf=0.0).abs().max().item() for v in (x, y))
        if name == "grad":
            # The interpreter cuts off the bits that a GPU rounds.
            cut = torch.finfo(logits.dtype).eps if DEVICE == "cpu" else 0.0
            floor = (1e-6 + cut) * z.abs().max().item()
        assert error <= 1.5 * allowed + floor, f"{name}: error {error:.1e}, torch's own {allowed:.1e}"


# selective_log_softmax ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 3, 64, 1_000, 4_099, 40_009])
def test_odd_vocabularies(impl: str, vocabulary: int, dtype: torch.dtype) -> None:
    logits = rand(B, T, vocabulary, seed=1, scale=4.0).to(dtype)
    check(impl, logits, ids(B, T, vocabulary=vocabulary))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 1.7, "logit_scale": 0.25},
        {"softcap": 15.0},
        {"softcap": 30.0, "temperature": 0.8, "logit_scale": 3.0},
        {"entropy": False},
    ],
    ids=str,
)
def test_options(impl: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    check(impl, rand(B, T, 517, seed=2, scale=8.0).to(dtype), ids(B, T, vocabulary=517), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaked_rows(impl: str, dtype: torch.dtype) -> None:
    logits, index = peaked(2, 24, 3_001, seed=4)
    check(impl, logits.to(dtype), index)


def test_a_sure_token_keeps_its_gradient(impl: str) -> None:
    """1 - p is far below the rounding of p, in float64 even: log-prob and gradient are still right to five digits."""
    heights = torch.tensor([25.0, 30.0, 35.0], device=DEVICE)
    logits, index = torch.zeros(3, 1_000, device=DEVICE), torch.tensor([0, 500, 999], device=DEVICE)
    logits[torch.arange(3), index] = heights
    x = logits.requires_grad_()
    logps = selective_log_softmax(x, index, impl=impl)
    assert isinstance(logps, Tensor)
    (grad,) = torch.autograd.grad(logps.sum(), x)
    odds = 999 * torch.exp(-heights.double())  # of any other token
    torch.testing.assert_close(logps.double(), -odds.log1p(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(grad[torch.arange(3), index].double(), odds / (1 + odds), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(grad[:, 1].double(), -odds / 999 / (1 + odds), rtol=1e-5, atol=0.0)


def test_log_probs_are_those_of_float64(impl: str) -> None:
    logits = rand(4, 16, 10_007, seed=5, scale=10.0)
    logps, entropy, _ = results(logits, index := ids(4, 16, vocabulary=10_007), impl)
    truth = results(logits.double(), index, "torch")
    torch.testing.assert_close(logps, truth[0], rtol=0.0, atol=1e-5)
    torch.testing.assert_close(entropy, truth[1], rtol=0.0, atol=1e-5)


def test_a_far_maximum(impl: str) -> None:
    """The largest logit is far above the sampled one and above the first tile, whose maximum exponents start from."""
    logits, index = rand(1, 4, 70_001, seed=20), ids(1, 4, vocabulary=100)
    logits[..., 60_000] = torch.tensor([20.0, 60.0, 200.0, 3e4], device=DEVICE)
    check(impl, logits, index)


def test_masked_rows_are_not_read(impl: str) -> None:
    logits, index = rand(B, T, 333, seed=6), ids(B, T, vocabulary=333)
    mask = torch.arange(T, device=DEVICE) < torch.tensor([4, 0, 2], device=DEVICE)[:, None]
    clean = results(logits, index, impl, mask=mask)
    dirty = results(logits.masked_fill(~mask[..., None], torch.nan), index.masked_fill(~mask, -100), impl, mask=mask)
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))
    assert not clean[0][~mask].any()
    assert not clean[2][~mask].any()
    check(impl, logits, index, mask=mask)
    check(impl, logits, index, mask=torch.zeros_like(mask))


def test_banned_tokens(impl: str) -> None:
    """-inf is a token of probability 0: no NaN, no gradient; a whole block of them too."""
    logits, index = rand(B, T, 9_000, seed=7), ids(B, T, vocabulary=100) + 8_800
    logits[..., :8_500] = -torch.inf
    logits[0, 0, 8_900:] = -torch.inf
    index[0, 0] = 8_600
    check(impl, logits, index)
    assert not results(logits, index, impl)[2][..., :8_500].any()


def test_what_is_wrong_stays_visible(impl: str) -> None:
    logits, index = rand(1, 4, 50, seed=8), torch.tensor([[3, -1, 50, 7]], device=DEVICE)
    logits[0, 3, 20] = torch.nan
    logps, entropy, grad = results(logits, index, impl, entropy=False)
    assert logps.isnan().tolist() == [[False, True, True, True]]
    assert entropy.isnan().tolist() == [[False, False, False, True]]
    assert grad.isfinite()[0, :3].all()


@pytest.mark.parametrize("kind", ["slice", "transposed", "one row", "vector", "four dimensions", "empty"])
def test_layouts(impl: str, kind: str) -> None:
    base = rand(4, 9, 65, seed=10)
    logits = {
        "slice": base[:, 3:-1],
        "transposed": base.transpose(0, 1),
        "one row": base[:1, :1],
        "vector": base[0, 0],
        "four dimensions": base.view(2, 2, 9, 65),
        "empty": base[:0],
    }[kind]
    check(impl, logits, ids(*logits.shape[:-1], vocabulary=65))


def test_no_copy_of_a_slice(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gets the caller's own storage."""
    kernels = importlib.import_module(
        {"cuda": "grpo_fast.cuda", "triton": "grpo_fast.kernels.selective_log_softmax"}[impl]
    )
    seen = []
    original = kernels.selective_log_softmax_fwd

    def spy(logits: Tensor, *rest: Any) -> Any:
        seen.append(logits.untyped_storage().data_ptr())
        return original(logits, *rest)

    monkeypatch.setattr(kernels, "selective_log_softmax_fwd", spy)
    base = rand(2, 6, 33, seed=11)
    selective_log_softmax(base[:, 2:-1], ids(2, 3, vocabulary=33), impl=impl)
    assert seen == [base.untyped_storage().data_ptr()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [33, 40])
def test_a_gradient_lies_as_its_logits_do(vocabulary: int, dtype: torch.dtype) -> None:
    """Each of its rows is as far off a multiple of 16 bytes, whatever slice of whatever buffer they are."""
    base = torch.zeros(3, 9, vocabulary, dtype=dtype, device=DEVICE)
    for logits in (base, base[:, 2:-1], base[1:, :1], base.transpose(0, 1), base[..., 1:], base[..., ::2], base[:0]):
        buffer = gradient_buffer(logits)
        assert buffer.shape == logits.shape
        assert buffer.dtype == dtype
        assert (
            buffer.untyped_storage().nbytes() <= (logits.numel() + 8 * (sum(logits.shape[:2]) + 1)) * dtype.itemsize
        )
        if logits.stride(-1) == 1:
            for b, t in ((b, t) for b in range(logits.size(0)) for t in range(logits.size(1))):
                assert (buffer[b, t].data_ptr() - logits[b, t].data_ptr()) % 16 == 0


def test_overwriting_the_logits(impl: str) -> None:
    logits, index = rand(B, T, 129, seed=12), ids(B, T, vocabulary=129)
    expected = results(logits, index, impl, entropy=False)[2]
    leaf = logits.clone().requires_grad_()
    inner = leaf * 1.0
    logps = selective_log_softmax(inner, index, impl=impl, overwrite_logits=True)
    value = (rand(B, T, seed=3) * logps).sum()
    (grad,) = torch.autograd.grad(value, leaf, retain_graph=True)
    assert torch.equal(grad.double(), expected)
    assert torch.equal(inner.detach(), grad)  # the buffer itself
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_repeatable(impl: str) -> None:
    logits, index = rand(B, T, 5_003, seed=13, scale=5.0), ids(B, T, vocabulary=5_003)
    first, second = (results(logits, index, impl) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_the_registered_op(impl: str, masked: bool) -> None:
    """Schema, fake implementation and autograd registration, by torch's own checker."""
    mask = torch.ones(B, T, dtype=torch.bool, device=DEVICE) if masked else None
    logits = rand(B, T, 40, seed=14).requires_grad_()
    arguments = (logits, ids(B, T, vocabulary=40), mask, 1.0, 1.0, None, True, False, impl, None)
    torch.library.opcheck(_selective_log_softmax, arguments)


def test_float64_is_refused_by_name(impl: str) -> None:
    with pytest.raises(RuntimeError, match=f"impl='{impl}': computes in float32, got float64"):
        selective_log_softmax(torch.zeros(2, 5, device=DEVICE).double(), ids(2, vocabulary=5), impl=impl)
