"""The extension itself: what it refuses without a GPU, and what only its kernels do. The ops' tests have the rest."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_fast import backend

if backend.EXTENSION is None:
    pytest.skip(backend.WHY_NO_EXTENSION, allow_module_level=True)

import torch

from grpo_fast import _C, cuda
from grpo_fast.ops import _workspace

FLOAT32, BFLOAT16, FLOAT64, INT64 = (
    cuda.DTYPES[d] for d in (torch.float32, torch.bfloat16, torch.float64, torch.int64)
)
ROWS: dict[str, Any] = {
    "logits": (64, FLOAT32),
    "strides": (50, 10),
    "out": (64, FLOAT32),
    "out_strides": (50, 10),
    "count": 5,
    "T": 5,
    "V": 10,
    "ids": (64, INT64),
    "has_softcap": False,
    "slope": 1.0,
    "cap": 1.0,
    "cap_in": 1.0,
}
OPTIONS: dict[str, Any] = dict(
    group_size=1,
    divisor=1.0,
    term="clipped",
    reduction="constant",
    low=0.8,
    high=1.2,
    delta=None,
    dual_clip=None,
    beta=0.0,
    kl_estimator="k3",
    bias_correction=False,
    tau_pos=1.0,
    tau_neg=1.0,
    entropy_coef=0.0,
    scale_rewards="none",
    temperature=1.0,
    logit_scale=1.0,
    softcap=None,
)
HEAD: dict[str, Any] = dict(
    hidden=(64, BFLOAT16),
    hidden_stride=16,
    weight=(64, BFLOAT16),
    weight_stride=16,
    bias=0,
    count=4,
    V=10,
    H=16,
    counted=0,
    ids=(64, INT64),
    has_softcap=False,
    slope=1.0,
    cap=1.0,
    cap_in=1.0,
    multiprocessors=132,
)
SHARED_MEMORY = 233_472  # of an SM of a Hopper GPU


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": (64, FLOAT64)}, r"logits' dtype: got 3, want 0 \(float32\), 1 \(bfloat16\) or 2"),
        ({"logits": (64, 8)}, "dtype: got 8, want 0 to 7"),
        ({"logits": (64, -1)}, "dtype: got -1, want 0 to 7"),
        ({"logits": (64, BFLOAT16)}, "out's dtype: got 0, want that of the logits, or a half precision for float32"),
        ({"out": (64, INT64)}, "out's dtype: got 7, want that of the logits"),
        ({"ids": (64, FLOAT32)}, r"ids' dtype: got 0, want 6 \(int32\) or 7 \(int64\)"),
        ({"count": -1}, "count: got -1, want 0 or more rows"),
        ({"T": 0}, "T: got 0, want 1 or more"),
        ({"V": 1}, "V: got 1, want 2 or more"),
    ],
    ids=str,
)
def test_rows(changes: dict[str, Any], message: str) -> None:
    _C.Rows(**ROWS)
    with pytest.raises(ValueError, match=message):
        _C.Rows(**{**ROWS, **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 16, 4), "cluster: got 3, want 1, 2, 4, 8 or 16 blocks"),
        ((2, 19, 4), "consumers: got 19, want 1 to 18 warps"),
        ((2, 0, 4), "consumers: got 0, want 1 to 18 warps"),
        ((2, 16, 0), "stages: got 0, want 1 or more"),
    ],
)
def test_layout(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.Layout(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": (64, FLOAT32)}, r"hidden's dtype: got 0, want 1 \(bfloat16\) or 2 \(float16\)"),
        ({"weight": (64, 2)}, "weight's dtype: got 2, want that of hidden"),
        ({"hidden": (66, BFLOAT16)}, "hidden's stride: got 16, want rows at multiples of 16 bytes"),
        ({"hidden_stride": 12}, "hidden's stride: got 12, want rows at multiples of 16 bytes"),
        ({"weight_stride": 20}, "weight's stride: got 20, want rows at multiples of 16 bytes"),
        ({"ids": (64, FLOAT32)}, r"ids' dtype: got 0, want 6 \(int32\) or 7 \(int64\)"),
        ({"count": 0}, "count: got 0, want 1 or more rows"),
        ({"V": 1}, "V: got 1, want 2 or more"),
        ({"H": 0}, "H: got 0, want 1 or more"),
        ({"multiprocessors": 1}, "multiprocessors: got 1, want 2 or more"),
    ],
    ids=str,
)
def test_head(changes: dict[str, Any], message: str) -> None:
    _C.Head(**HEAD)
    with pytest.raises(ValueError, match=message):
        _C.Head(**{**HEAD, **changes})


def test_exponentials() -> None:
    whole: dict[str, Any] = {"first": (64, 16), "rest": (0, 0), "split": 256, "bases": 64}
    _C.Exponentials(**whole)
    halves = {**whole, "rest": (64, 24), "split": 512}
    _C.Exponentials(**halves)
    for changes in ({"first": (66, 16)}, {"first": (64, 12)}, {"rest": (66, 16)}, {"rest": (64, 12)}):
        with pytest.raises(ValueError, match=r"stride: got 1[26], want rows at multiples of 16 bytes"):
            _C.Exponentials(**{**halves, **changes})
    with pytest.raises(ValueError, match="split: got 520, want a multiple of 256 words"):
        _C.Exponentials(**{**halves, "split": 520})


def test_what_leaves_no_exponentials_converts_none() -> None:
    head, nothing = _C.Head(**HEAD), _C.Exponentials(first=(0, 0), rest=(0, 0), split=256, bases=0)
    kept = _C.Exponentials(first=(64, 16), rest=(0, 0), split=256, bases=64)
    others = _C.Conversion(head=head, exponentials=kept, slopes=64, tilted=False)
    halves = _C.Head(**{**HEAD, "hidden": (64, 2), "weight": (64, 2)})
    with pytest.raises(ValueError, match=r"hidden's dtype: got 2, want 1 \(bfloat16\)"):
        _C.Conversion(head=halves, exponentials=kept, slopes=64, tilted=False)
    arguments: dict[str, Any] = {"device": 0, "stream": 0, "head": head, "partials": (64, 4, 64), "next_slice": 64}
    with pytest.raises(ValueError, match="meanwhile: got 4, want no rows where the product leaves no exponentials"):
        _C.linear_product(**arguments, exponentials=nothing, meanwhile=others)
    with pytest.raises(ValueError, match="next_slice: got 0, want an address"):
        _C.linear_product(**{**arguments, "next_slice": 0}, exponentials=kept, meanwhile=others)


def test_words_in_two_places_are_split_between_tiles() -> None:
    assert _workspace.TILE_WORDS == _C.TILE_WORDS
    assert _workspace.BAND_ROWS == _C.BAND_ROWS


def test_the_words_are_shared_out_evenly() -> None:
    """Between so many clusters a row that the last round, which not all of them have, is short."""
    for count in (1, 256, 257, 2_048, 8_192, 100_000):
        pairs, clusters = -(-count // 256), 66
        lanes = _C.linear_lanes(count, 2 * clusters)
        rounds = -(-pairs * lanes // clusters) / lanes
        assert 1 <= lanes <= clusters == _C.linear_lanes_at_most(2 * clusters)
        assert rounds <= 1.02 * pairs / clusters, count
        assert lanes == clusters // math.gcd(pairs, clusters), "no more than it takes"


@pytest.mark.parametrize("changes", [{"logits": 64}, {"logits": None}, {"V": 2**40}, {"strides": (1, 2, 3)}], ids=str)
def test_wrong_types(changes: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        _C.Rows(**{**ROWS, **changes})


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("cluster", cuda.CLUSTERS)
def test_the_layouts_fit_and_waste_nothing(cluster: int, blocks: int) -> None:
    found = cuda._fill(SHARED_MEMORY, blocks, cluster)
    room = SHARED_MEMORY // blocks - cuda.RESERVED
    assert found.shared_bytes <= room < _C.Layout(cluster, found.consumers, found.stages + 1).shared_bytes
    assert found.consumers * blocks == cuda.CONSUMERS


@pytest.mark.parametrize(
    ("vocabulary", "itemsize", "cluster", "consumers"),
    [
        (2, 2, 1, 8),
        (32_000, 2, 1, 8),
        (49_152, 2, 1, 8),
        (128_256, 2, 2, 16),
        (151_936, 2, 2, 16),
        (262_144, 2, 4, 16),
    ]
    + [(151_936, 4, 4, 16), (262_144, 4, 8, 16), (1_000_000, 2, 16, 16), (1_000_000, 4, 16, 16)],
)
def test_the_rule(
    monkeypatch: pytest.MonkeyPatch, vocabulary: int, itemsize: int, cluster: int, consumers: int
) -> None:
    """On a Hopper GPU, which is only described here."""

    class Gpu:
        shared_memory_per_multiprocessor = SHARED_MEMORY

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    cuda.layout.cache_clear()
    found = cuda.layout(vocabulary * itemsize, 0, True)
    assert (found.cluster, found.consumers) == (cluster, consumers)
    assert cuda.stays(vocabulary * itemsize, 0) == (vocabulary * itemsize < 3_500_000)
    assert cuda.layout(vocabulary * itemsize, 0, False).cluster == 1
    cuda.layout.cache_clear()


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def launch(out: torch.Tensor | None, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs of the policy gradient's simplest loss: the sum of -advantage * ratio, advantages 1 to B."""
    rows = torch.full((6, ids.numel()), torch.nan, device="cuda").unbind()
    cuda.grpo_loss_rows(
        rows,
        None,
        out,
        logits,
        ids,
        None,
        None,
        torch.arange(1.0, logits.size(0) + 1, device="cuda"),
        *[None] * 9,
        **OPTIONS,
    )
    return rows[0].view(ids.shape)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [5, 1_003, 151_936, 151_939])
def test_a_half_precision_gradient_over_float32_logits(vocabulary: int, dtype: torch.dtype) -> None:
    """In memory of its own, and in that of the logits, where each row's gradient takes the row's first half."""
    shape = (3, 70, vocabulary)
    logits, ids = torch.randn(shape, device="cuda") * 3, torch.randint(0, vocabulary, shape[:2], device="cuda")
    truth = torch.softmax(logits.double(), -1) - torch.nn.functional.one_hot(ids, vocabulary)
    truth *= torch.arange(1.0, 4.0, device="cuda", dtype=torch.float64)[:, None, None]
    apart = torch.full(shape, torch.nan, device="cuda", dtype=dtype)
    logps = launch(apart, logits, ids)
    assert (apart.double() - truth).norm() <= (torch.finfo(dtype).eps / 2 + 1e-5) * truth.norm()
    inside = logits.view(dtype)[..., :vocabulary]
    assert torch.equal(launch(inside, logits, ids), logps)
    assert torch.equal(inside, apart)


@on_gpu
def test_a_row_that_does_not_stay_is_not_overwritten_by_another_dtype() -> None:
    logits, ids = torch.randn(1, 2, 1_000_000, device="cuda"), torch.zeros(1, 2, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="out: got the logits' memory with rows of 4000000 bytes, want"):
        launch(logits.view(torch.bfloat16)[..., :1_000_000], logits, ids)


@on_gpu
def test_a_gradient_in_the_logits_memory_lies_where_they_do() -> None:
    logits, ids = torch.randn(2, 3, 64, device="cuda"), torch.zeros(2, 3, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="out: got stride 64 in dim 1 of the logits' memory, want 128"):
        launch(logits.view(torch.bfloat16).as_strided((2, 3, 64), (384, 64, 1)), logits, ids)


def test_the_backward_of_log_probs_wants_memory_of_its_own_for_another_dtype() -> None:
    logits, rows = torch.randn(1, 2, 64), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"out: got torch\.bfloat16 in the memory of torch\.float32 logits, want"):
        cuda.selective_log_softmax_bwd(
            logits.view(torch.bfloat16)[..., :64], logits, rows.long(), None, *[rows] * 5, None, 1.0, 1.0, None
        )


@on_gpu
def test_a_launch_that_fails_says_what_it_was_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block with more shared memory than there is."""
    logits, ids = torch.randn(1, 2, 100, device="cuda"), torch.zeros(1, 2, dtype=torch.int64, device="cuda")
    monkeypatch.setattr(cuda, "layout", lambda *_: _C.Layout(1, 16, 60))
    message = r"impl='cuda': grpo_loss of \(1, 2, 100\) float32 on cuda:0: CUDA error \d+, "
    with pytest.raises(RuntimeError, match=message):
        launch(torch.empty_like(logits), logits, ids)
    monkeypatch.undo()
    assert launch(torch.empty_like(logits), logits, ids).isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("count", [0, 5])
def test_only_an_empty_batch_may_lack_what_a_loss_needs(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """An empty tensor has no address, as None has none. Past the checks it is CUDA that says there is no GPU."""
    monkeypatch.setattr(cuda, "stream", lambda _: 0)
    monkeypatch.setattr(cuda, "layout", lambda *_: _C.Layout(1, 8, 4))
    extension = SimpleNamespace(
        Rows=_C.Rows,
        Loss=_C.Loss,
        error_string=_C.error_string,
        grpo_loss_rows=lambda **arguments: _C.grpo_loss_rows(**{**arguments, "device": 0}),
    )
    monkeypatch.setattr(cuda, "_C", extension)
    logits, ids = torch.zeros(1, count, 10), torch.zeros(1, count, dtype=torch.int64)
    values = None if count else torch.zeros(1, 0)
    advantages_to_ref_logps = (values, None, None, values)
    wanted, message = (ValueError, "advantages: got 0") if count else (RuntimeError, "CUDA error")
    with pytest.raises(wanted, match=message):
        cuda.grpo_loss_rows(
            torch.zeros(6, count).unbind(),
            *(None, None, logits, ids, None, None),
            *advantages_to_ref_logps,
            *[None] * 6,
            **{**OPTIONS, "beta": 0.1},
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_cuda_says_so() -> None:
    arguments = dict.fromkeys(("logps", "entropies", "shifts", "totals"), 64)
    error = _C.log_probs(device=0, stream=0, rows=_C.Rows(**ROWS), layout=_C.Layout(1, 8, 4), kept=0, **arguments)
    assert error != 0
    with pytest.raises(RuntimeError, match=r"impl='cuda': grpo_loss of \(2, 3\) float32 on cpu: CUDA error"):
        cuda.check(error, "grpo_loss", torch.zeros(2, 3))
