"""Log-probs from hidden states without logits in memory, on Hopper, held against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import KERNELS, rand

from grpo_fast import linear_selective_log_softmax

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and "cuda" in KERNELS
pytestmark = [
    pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA H100 or H200"),
    pytest.mark.usefixtures("poisoned_buffers"),
]

SHAPES = (  # rows, words, depth: an end within a tile in every one, then clusters with several shares of the words
    (1, 7, 8),
    (3, 300, 72),
    (129, 257, 64),
    (700, 5_001, 200),
    (1_025, 70_000, 64),
)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each launch: that nothing else was taken instead."""
    from grpo_fast import cuda

    rows: list[int] = []
    forward = cuda.linear_logps_fwd

    def counted(hidden: Tensor, *arguments: Any) -> Any:
        rows.append(hidden.size(0))
        return forward(hidden, *arguments)

    monkeypatch.setattr(cuda, "linear_logps_fwd", counted)
    return rows


def check(hidden: Tensor, weight: Tensor, index: Tensor, **options: Any) -> None:
    got = linear_selective_log_softmax(hidden, weight, index, return_entropy=True, impl="cuda", **options)
    bias = options.pop("bias", None)
    exact: dict[str, Any] = {**options, "bias": None if bias is None else bias.double()}
    truth = linear_selective_log_softmax(
        hidden.double(), weight.double(), index, return_entropy=True, impl="torch", **exact
    )
    for x, y in zip(got, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=3e-5, equal_nan=True)


def inputs(count: int, vocabulary: int, size: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    weight = rand(vocabulary, size, seed=2, scale=4.0 / math.sqrt(size)).to(dtype)
    index = torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(3)).cuda()
    return rand(count, size, seed=1).to(dtype), weight, index


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, launches: list[int]) -> None:
    check(*inputs(*shape, dtype))
    assert launches == [shape[0]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 9.0])
def test_options(softcap: float | None, bias: bool, launches: list[int]) -> None:
    hidden, weight, index = inputs(300, 1_000, 128)
    options: dict[str, Any] = {"softcap": softcap, "temperature": 0.7, "logit_scale": 1.3}
    if bias:
        options["bias"] = rand(1_000, seed=4)
    check(hidden, weight, index, **options)
    assert launches == [300]


def test_words_that_a_bias_excludes(launches: list[int]) -> None:
    hidden, weight, index = inputs(300, 1_000, 64)
    bias = rand(1_000, seed=4)
    bias[::3] = -math.inf
    got = linear_selective_log_softmax(hidden, weight, index, bias=bias, return_entropy=True, impl="cuda")
    logps = torch.log_softmax(hidden.double() @ weight.double().t() + bias.double(), -1)
    expected = logps.gather(1, index[:, None]).squeeze(1)
    torch.testing.assert_close(got[0].double(), expected, rtol=1e-5, atol=3e-5)
    entropy = -(logps.exp() * logps.clamp(min=-1e4)).sum(-1)
    torch.testing.assert_close(got[1].double(), entropy, rtol=1e-5, atol=3e-5)
    assert launches == [300]


def test_rows_that_are_sure_of_their_token(launches: list[int]) -> None:
    """Log-probs near 0 keep their digits; others are tens of nats away, in whatever order the words come."""
    hidden, weight, index = inputs(256, 3_000, 64)
    hidden *= 8.0
    hidden[::2] = weight[index[::2]] * 40.0
    check(hidden, weight, index)
    assert launches == [256]


def test_ids_that_are_no_words_and_rows_that_do_not_count(launches: list[int]) -> None:
    hidden, weight, index = inputs(300, 1_000, 64)
    index[5], index[6] = -1, 1_000
    mask = torch.arange(300, device="cuda") % 7 != 0
    hidden[0] = math.nan
    logps = linear_selective_log_softmax(hidden, weight, index, mask=mask, impl="cuda")
    assert isinstance(logps, Tensor)
    assert logps[5:7].isnan().all()
    assert (logps[~mask] == 0).all()
    assert logps[mask].isnan().sum() == 2
    everything = linear_selective_log_softmax(hidden, weight, index, mask=mask, allow_sync=False, impl="cuda")
    assert isinstance(everything, Tensor)
    torch.testing.assert_close(everything, logps, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert launches == [int(mask.sum()), 300]


def test_strided_states_and_rows_of_another_stride() -> None:
    hidden, weight, index = inputs(60, 1_000, 64)
    wide = rand(4, 15, 128, seed=5).bfloat16()
    wide[..., :64] = hidden.view(4, 15, 64)
    columns = rand(1_000, 72, seed=6).bfloat16()
    columns[:, :64] = weight
    check(wide[:, 1:, :64], columns[:, :64], index.view(4, 15)[:, 1:])


def test_the_same_every_time_and_in_a_graph() -> None:
    hidden, weight, index = inputs(700, 9_001, 128)

    def run() -> Tensor:
        options: dict[str, Any] = {"return_entropy": True, "allow_sync": False, "impl": "cuda"}
        return torch.stack(list(linear_selective_log_softmax(hidden, weight, index, **options)))

    first = run()
    assert all(torch.equal(run(), first) for _ in range(3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert torch.equal(captured, first)
