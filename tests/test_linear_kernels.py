"""The kernels that take hidden states and keep no logits, on Hopper, held against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import KERNELS, rand

from grpo_fast import GRPOLossConfig, linear_cross_entropy, linear_grpo_loss, linear_selective_log_softmax
from grpo_fast.ops import _workspace

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
    """The rows of each product: that nothing else was taken instead."""
    from grpo_fast import cuda_linear

    rows: list[int] = []
    product, gradient = cuda_linear.linear_product, cuda_linear.linear_logps_bwd

    def counted(hidden: Tensor, *arguments: Any, bases: Tensor | None = None, **options: Any) -> Any:
        if bases is None:
            rows.append(hidden.size(0))
        return product(hidden, *arguments, bases=bases, **options)

    def counted_gradient(out: tuple[Tensor, ...], hidden: Tensor, *arguments: Any, **options: Any) -> None:
        rows.append(hidden.size(0))
        gradient(out, hidden, *arguments, **options)

    monkeypatch.setattr(cuda_linear, "linear_product", counted)
    monkeypatch.setattr(cuda_linear, "linear_logps_bwd", counted_gradient)
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
    assert launches == [300, 300]  # in the first the GPU alone knows how many count


@pytest.mark.parametrize("counted", [0, 1, 255, 300, 700])
def test_rows_that_only_the_gpu_counts(counted: int) -> None:
    """Of the others nothing is written."""
    from grpo_fast import cuda_linear

    hidden, weight, index = inputs(700, 5_001, 200)
    options: dict[str, Any] = {"temperature": 0.8, "logit_scale": 1.3, "softcap": None}
    first, rest = (torch.full((700, n), -7.0, device="cuda", dtype=torch.bfloat16) for n in (4_608, 400))
    memory = first, rest[:, :393]
    number = torch.tensor(counted, device="cuda")
    found = cuda_linear.linear_product(hidden, weight, None, index, memory=memory, counted=number, **options)
    assert found.bases is not None
    results = torch.stack(cuda_linear.linear_logps_fwd(found, True))
    for written in (first, rest, found.bases[:, None], results.t()):
        assert (written[counted:] == written[-1, 0]).all() or written[counted:].isnan().all()
    if counted == 0:
        return
    some = hidden[:counted], weight, None, index[:counted]
    place = torch.empty(counted, 5_008, device="cuda", dtype=torch.bfloat16)
    alone = cuda_linear.linear_product(*some, memory=(place[:, :5_001],), **options)
    for x, y in ((place[:, :4_608], first), (place[:, 4_608:5_001], rest[:, :393])):
        assert torch.equal(x.view(torch.int16), y[:counted].view(torch.int16))
    assert torch.equal(alone.bases, found.bases[:counted])
    assert torch.equal(torch.stack(cuda_linear.linear_logps_fwd(alone, True)), results[:, :counted])
    narrowed = torch.stack(cuda_linear.linear_logps_fwd(found[: (counted + 1) // 2], True))
    assert torch.equal(narrowed, results[:, : (counted + 1) // 2])


def test_strided_states_and_rows_of_another_stride() -> None:
    hidden, weight, index = inputs(60, 1_000, 64)
    wide = rand(4, 15, 128, seed=5).bfloat16()
    wide[..., :64] = hidden.view(4, 15, 64)
    columns = rand(1_000, 72, seed=6).bfloat16()
    columns[:, :64] = weight
    check(wide[:, 1:, :64], columns[:, :64], index.view(4, 15)[:, 1:])


def test_a_bias_with_gaps_and_states_off_16_bytes(launches: list[int]) -> None:
    hidden, weight, index = inputs(60, 1_000, 64)
    bias = rand(2_000, seed=4)[::2]
    check(hidden, weight, index, bias=bias)
    assert launches == [60]
    off = rand(60, 72, seed=5).bfloat16()
    off[:, 4:68] = hidden
    check(off[:, 4:68], weight, index)  # by the kernels that keep logits
    assert launches == [60]


def test_logits_far_below_0(launches: list[int]) -> None:
    """Farther than an exponential relative to 0 has bits for; in float32 they are multiples of 2^-7."""
    hidden, weight, index = inputs(64, 500, 64)
    check_loss(hidden, weight, index, within=5e-3, of_logps=2**-6, bias=torch.full((500,), -1e5, device="cuda"))
    assert launches == [64]


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


# Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [None, 512])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", ["exponentials", None, 9.0])
def test_every_element_of_the_gradient(
    softcap: float | str | None, bias: bool, entropy: bool, split: int | None
) -> None:
    """Off by a rounding to bfloat16, and half of one where exponentials were kept, however small it is."""
    from grpo_fast import cuda_linear

    count, vocabulary = 300, 1_003
    hidden, weight, index = inputs(count, vocabulary, 128)
    hidden[::3] *= 6.0
    index[7], index[11] = -1, vocabulary
    offset = rand(vocabulary, seed=4) if bias else None
    temperature, logit_scale = 0.8, 1.3
    mask = torch.arange(count, device="cuda") % 9 != 4
    d_logps, d_entropies = rand(2, count, seed=6)
    d_logps[20:23] = d_entropies[20:23] = 0.0
    by_product = softcap != "exponentials"
    cap = softcap if by_product else None
    options: dict[str, Any] = {"temperature": temperature, "logit_scale": logit_scale, "softcap": cap}
    model = hidden, weight, offset, index
    found = cuda_linear.linear_logps_fwd(cuda_linear.linear_product(*model, **options), return_entropy=True)
    widths = [vocabulary] if split is None else [split, vocabulary - split]
    memory = tuple(
        torch.full((count, -(-n // 8) * 8), math.nan, device="cuda", dtype=torch.bfloat16)[:, :n] for n in widths
    )
    saved = mask, *found, d_logps, d_entropies if entropy else None
    if by_product:
        cuda_linear.linear_logps_bwd(memory, *model, *saved, **options)
    else:
        product = cuda_linear.linear_product(*model, memory=memory, **options)
        cuda_linear.linear_exponentials(product, *saved).gradient()
    out = torch.cat(memory, 1)

    logits = hidden.double() @ weight.double().t() + (0.0 if offset is None else offset.double())
    logits.requires_grad_()
    scaled = logits * logit_scale
    if isinstance(cap, float):
        scaled = cap * torch.tanh(scaled / cap)
    logp = (scaled / temperature).log_softmax(-1)
    inside = (index >= 0) & (index < vocabulary)
    chosen = logp.gather(1, index.clamp(0, vocabulary - 1)[:, None]).squeeze(1)
    value = (d_logps * (mask & inside) * chosen).sum()
    if entropy:
        value = value - (d_entropies * mask * (logp.exp() * logp).sum(-1)).sum()
    (truth,) = torch.autograd.grad(value, logits)
    p = logp.detach().exp()
    rounded = 2.0**-8 if by_product else 2.0**-8 + 2.0**-9  # the result, and the exponential
    allowed = 1.02 * rounded * truth.abs() + 1e-12
    # Of what cancels: the entropy's log p + H, with what the exponential's rounding is there; 1 - p; a cap's slope.
    size = p.scatter_add(1, index.clamp(0, vocabulary - 1)[:, None], torch.ones_like(p[:, :1]))
    allowed += 3e-6 * size * (d_logps.abs() + 10.0 * d_entropies.abs())[:, None]
    if entropy and not by_product:
        allowed += 2.0**-8 * p * d_entropies.abs()[:, None]
    error = (out.double() - truth).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f}"
    assert (out[~mask] == 0).all()
    assert (out[20:23] == 0).all()


@pytest.mark.parametrize("beside", [1, 500])
@pytest.mark.parametrize("split", [None, 9_728])
@pytest.mark.parametrize("entropy", [False, True])
def test_rows_converted_beside_another_product(entropy: bool, split: int | None, beside: int) -> None:
    """The bits are those of the two by themselves, with 1 row beside them and with 500."""
    from grpo_fast import cuda_linear

    count, vocabulary = 600, 20_001
    hidden, weight, index = inputs(count, vocabulary, 200)
    bias = rand(vocabulary, seed=4)
    hidden[30] *= 40.0
    index[30] = (hidden[30].float() @ weight.float().t()).argmin()  # of no use, its exponentials
    hidden[50] = math.nan
    index[7], index[11] = -1, vocabulary
    d_logps, d_entropies = rand(2, count, seed=6)
    d_logps[20:23] = d_entropies[20:23] = 0.0
    mask = torch.arange(count, device="cuda") % 9 != 4
    options: dict[str, Any] = {"temperature": 0.8, "logit_scale": 1.3, "softcap": None}
    widths = [vocabulary] if split is None else [split, vocabulary - split]

    def empty(rows: int) -> tuple[Tensor, ...]:
        place = [torch.empty(rows, -(-n // 8) * 8, device="cuda", dtype=torch.bfloat16) for n in widths]
        return tuple(x[:, :n] for x, n in zip(place, widths, strict=True))

    def exponentials() -> Any:
        product = cuda_linear.linear_product(hidden, weight, bias, index, memory=empty(count), **options)
        found = cuda_linear.linear_logps_fwd(product, return_entropy=True)
        return cuda_linear.linear_exponentials(product, mask, *found, d_logps, d_entropies if entropy else None)

    def other(meanwhile: Any) -> Any:
        states = rand(beside, 200, seed=7).bfloat16()
        return cuda_linear.linear_product(
            states, weight, bias, index[:beside] % vocabulary, memory=empty(beside), meanwhile=meanwhile, **options
        )

    alone, together = exponentials(), exponentials()
    alone.gradient()
    product, expected = other(together), other(None)
    for x, y in ((together.product, alone.product), (product, expected)):
        for part, words in zip(x.memory, y.memory, strict=True):
            assert torch.equal(part.view(torch.int16), words.view(torch.int16))
    for values, truth in zip(
        cuda_linear.linear_logps_fwd(product, True), cuda_linear.linear_logps_fwd(expected, True), strict=True
    ):
        assert torch.equal(values, truth)
    gradient = torch.cat(alone.product.memory, 1)
    assert gradient[50].isnan().all()
    assert gradient[30].abs().sum() > d_logps[30].abs()
    assert not gradient[[7, 11]].any() or entropy


def test_rows_whose_token_is_all_but_impossible(launches: list[int]) -> None:
    """So far below the likeliest that 16 bits of an exponential do not reach from one to the other."""
    hidden, weight, index = inputs(64, 500, 64)
    hidden *= 40.0
    logits = hidden.double() @ weight.double().t()
    index.copy_(logits.argmin(1))
    index[::2] = logits.argmax(1)[::2]
    assert ((logits.amax(1) - logits.gather(1, index[:, None]).squeeze(1)) > 140 * math.log(2)).sum() == 32
    # Two elements a row, which are rounded alike.
    check_loss(hidden, weight, index, within=4e-3)
    assert launches


def check_loss(
    hidden: Tensor, weight: Tensor, index: Tensor, within: float = 2.4e-3, of_logps: float = 5e-5, **options: Any
) -> None:
    """Loss, log-probs and gradients of ``linear_grpo_loss`` against float64."""
    count = index.numel()
    batch: dict[str, Any] = {
        "completion_ids": index[None],
        "advantages": rand(1, count, seed=7),
        "temperature": 0.9,
        **{k: v for k, v in options.items() if k not in ("bias", "workspace_bytes")},
    }
    runs = []
    for exact in (False, True):
        leaves = [x.double() if exact else x for x in (hidden[None], weight, options.get("bias")) if x is not None]
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        extra = {} if exact else {"workspace_bytes": options.get("workspace_bytes")}
        if len(leaves) > 2:
            extra["bias"] = leaves[2]
        out = linear_grpo_loss(*leaves[:2], **batch, **extra, impl="torch" if exact else "cuda")
        runs.append((out, torch.autograd.grad(out.loss, leaves)))
    (got, gradients), (truth, true_gradients) = runs
    torch.testing.assert_close(got.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.logps.double(), truth.logps, rtol=1e-5, atol=of_logps)
    torch.testing.assert_close(got.entropy.double(), truth.entropy, rtol=1e-5, atol=of_logps)
    for x, y in zip(gradients, true_gradients, strict=True):
        error = (x.double() - y).norm() / y.norm()
        assert error < within, f"{error:.1e}"


#: What holds all of 700 rows of 5,001 words; all of them if part of it is where the weight's gradient will be; some.
WORKSPACES = pytest.mark.parametrize(
    "workspace", [None, 6_500_000, 2 * 5_008 * 130], ids=["one", "two places", "few"]
)


@pytest.fixture(params=[False, True], ids=["", "bands"])
def bands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether sections are in bands, of 64 rows at most."""
    if request.param:
        monkeypatch.setattr(_workspace, "BAND_ROWS", 64)
        monkeypatch.setattr(_workspace, "BAND_HIDDEN_SIZE", 1)
    return bool(request.param)


@WORKSPACES
@pytest.mark.parametrize("config", [{}, {"entropy_coef": 0.1}, {"loss_type": "cispo", "epsilon_high": 2.0}], ids=str)
def test_loss(config: dict[str, Any], workspace: int | None, bands: bool, launches: list[int]) -> None:
    hidden, weight, index = inputs(700, 5_001, 200)
    options: dict[str, Any] = {"config": GRPOLossConfig(**config), "workspace_bytes": workspace}
    check_loss(hidden, weight, index, bias=rand(5_001, seed=8).bfloat16(), **options)
    # The rounded gradient of the weight takes the room of 199 rows, whatever the workspace.
    sections = [199] * 3 + [103] if workspace == 2 * 5_008 * 130 else [700]
    assert launches == ([n for rows in sections for n in in_bands(rows)] if bands else sections)


def in_bands(rows: int) -> list[int]:
    """About as many in each, in whole eighths of 64."""
    return {700: [64] * 10 + [60], 199: [56, 56, 56, 31], 103: [56, 47]}[rows]


@WORKSPACES
@pytest.mark.parametrize(("softcap", "zeros"), [(None, 50), (None, 300), (9.0, 50)])
def test_log_probs(softcap: float | None, zeros: int, workspace: int | None, launches: list[int]) -> None:
    """Forward and backward; rows without a gradient are left out of the latter, unless its exponentials are kept."""
    few = workspace == 2 * 5_008 * 130
    keeps = not few and softcap is None and zeros == 50
    hidden, weight, index = inputs(700, 5_001, 200)
    upstream = rand(2, 700, seed=9)
    upstream[:, :zeros] = 0.0
    gradients = []
    for exact in (False, True):
        leaves = [(x.double() if exact else x).detach().clone().requires_grad_() for x in (hidden, weight)]
        extra: dict[str, Any] = {"impl": "torch"} if exact else {"impl": "cuda", "workspace_bytes": workspace}
        found = linear_selective_log_softmax(*leaves, index, softcap=softcap, return_entropy=True, **extra)
        value = sum((u.to(x.dtype) * x).sum() for u, x in zip(upstream, found, strict=True))
        gradients.append(torch.autograd.grad(value, leaves))
        if not exact:
            rest = 700 - zeros
            # 400 rows fit, as some of their gradients lie where that of the weight will.
            again = [199] * (rest // 199) + [rest % 199] if few and rest > 400 else [rest]
            assert launches == [700, *([] if keeps else again)]
            with torch.no_grad():
                again = linear_selective_log_softmax(*leaves, index, softcap=softcap, return_entropy=True, **extra)
            assert all(map(torch.equal, found, again))
    for x, y in zip(*gradients, strict=True):
        # What is made of exponentials is rounded to their 9 bits before: half a rounding to bfloat16's 8.
        assert (x.double() - y).norm() < (2.6e-3 if keeps else 2.4e-3) * y.norm()


def test_gradients_that_need_more_digits_keep_the_logits(launches: list[int]) -> None:
    check_loss(*inputs(300, 1_000, 64), softcap=9.0)
    check_loss(*inputs(300, 1_000, 64, torch.float16), within=1e-3)
    assert launches == []


B, T = 4, 160
MASK = torch.arange(T) < torch.tensor([160, 1, 90, 120])[:, None]
FIRST = (torch.arange(T) % 3 == 0).expand(B, T)
EVERY_OPTION: dict[str, dict[str, Any]] = {
    **{
        name: {"config": {"loss_type": name}}
        for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo", "vespo")
    },
    **{f"{name}, KL": {"config": {"beta": 0.1, "kl_estimator": name}} for name in ("k1", "k2", "k3")},
    "cispo": {"config": {"loss_type": "cispo", "epsilon_high": 1.1}},
    "relative cispo": {"config": {"loss_type": "cispo", "epsilon_high": 0.1, "cispo_bounds": "relative"}},
    "of the sequence": {"config": {"importance_sampling_level": "sequence", "beta": 0.1}},
    "KL times the ratio": {"config": {"beta": 0.1, "use_bias_correction_kl": True}},
    "delta, dual clip": {"config": {"delta": 1.2, "dual_clip": 1.1, "epsilon_low": 0.1, "epsilon_high": 0.3}},
    "no old policy": {"old_logps": None, "config": {"beta": 0.1}},
    "sampler ratio": {"importance_sampling_ratio": FIRST * 0.5 + 0.7},
    "sampler ratio of sequences": {"importance_sampling_ratio": torch.tensor([0.5, 1.0, 1.5, 2.0])},
    "entropy bonus": {"config": {"entropy_coef": 0.1}},
    "entropy mask": {"entropy_mask": FIRST, "config": {"entropy_coef": 0.1}},
    "entropy threshold": {"entropy_threshold": 3.0},
    "entropy threshold, bonus": {"entropy_threshold": 3.0, "config": {"entropy_coef": 0.1}},
    "no mask": {"completion_mask": None},
    "no waiting": {"allow_sync": False, "config": {"beta": 0.1}},
    "dead rows": {"advantages": torch.tensor([1.0, -1.0, 0.0, 0.5])},
    "dead rows left out": {"advantages": torch.tensor([1.0, -1.0, 0.0, 0.5]), "metrics": "active"},
    "rewards": {"advantages": None, "rewards": torch.tensor([1.0, 0.0, 0.5, 0.25]), "group_size": 2},
    "items": {"num_items_in_batch": 1_000},
    "scales": {"logit_scale": 0.7, "temperature": 1.3},
}


@pytest.mark.parametrize("few", [False, True], ids=["one section", "several"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", EVERY_OPTION)
@pytest.mark.usefixtures("bands")
def test_every_option(name: str, packed: bool, few: bool, launches: list[int]) -> None:
    """Loss, log-probs, entropy, metrics and gradients; old and reference policies some way off."""
    hidden, weight, index = inputs(B * T, 5_001, 200)
    with torch.no_grad():
        logps = linear_selective_log_softmax(hidden.double(), weight.double(), index, impl="torch")
    assert isinstance(logps, Tensor)
    given: dict[str, Any] = {
        "completion_mask": MASK,
        "advantages": torch.tensor([1.0, -1.0, 2.0, -0.5]),
        "old_logps": logps.view(B, T).float() + rand(B, T, seed=7, scale=0.2),
        "ref_logps": logps.view(B, T).float() + rand(B, T, seed=8, scale=0.3),
        **EVERY_OPTION[name],
        "completion_ids": index.view(B, T),
    }
    given["config"] = GRPOLossConfig(**given.get("config", {}))
    if given["config"].loss_type == "dr_grpo":
        given["config"] = GRPOLossConfig(loss_type="dr_grpo", max_completion_length=T)
    given = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in given.items() if v is not None}
    shape: tuple[int, ...] = (B, T)
    if packed:
        shape = (B * T,)
        given = {k: v.flatten() if isinstance(v, Tensor) and v.shape == (B, T) else v for k, v in given.items()}
        given["cu_seqlens"] = torch.arange(0, B * T + 1, T, device="cuda")
    runs = []
    for dtype, how in ((torch.bfloat16, {"workspace_bytes": 2 * 5_008 * 130 if few else None}), (torch.float64, {})):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden.view(*shape, -1), weight)]
        impl = "cuda" if dtype == torch.bfloat16 else "torch"
        out = linear_grpo_loss(*leaves, **given, **how, impl=impl)
        runs.append((out, torch.autograd.grad(out.loss, leaves)))
    assert launches
    (got, gradients), (truth, true_gradients) = runs
    for field in ("loss", "logps", "entropy"):
        x, y = getattr(got, field), getattr(truth, field)
        # VESPO's weights are exponentials of sums over 160 tokens.
        rtol = 1e-3 if given["config"].loss_type == "vespo" else 1e-5
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=5e-5)
    assert got.metrics.keys() == truth.metrics.keys()
    for field, y in truth.metrics.items():
        torch.testing.assert_close(got.metrics[field].double(), y.double(), rtol=10 * rtol, atol=5e-5)
    for x, y in zip(gradients, true_gradients, strict=True):
        error = (x.double() - y).norm() / y.norm()
        assert error < 2.6e-3, f"{error:.1e}"


def test_reference_model_in_the_same_call(launches: list[int]) -> None:
    """As its log-probs given, to the last bit."""
    hidden, weight, index = inputs(300, 2_000, 64)
    ref_hidden, ref_weight, _ = (x.flip(0).contiguous() for x in inputs(300, 2_000, 128))
    given: dict[str, Any] = {
        "completion_ids": index[None],
        "advantages": rand(1, 300, seed=7),
        "config": GRPOLossConfig(beta=0.1),
        "impl": "cuda",
    }
    logps = linear_selective_log_softmax(ref_hidden[None], ref_weight, index[None], impl="cuda")
    results = []
    for reference in ({"ref_hidden": ref_hidden[None], "ref_weight": ref_weight}, {"ref_logps": logps}):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden[None], weight)]
        loss = linear_grpo_loss(*leaves, **given, **reference).loss
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, rtol=0.0, atol=0.0)
    assert launches == [300] * 4


def test_elements_of_the_gradients_are_those_of_logits_in_float32() -> None:
    """On rows that are nearly sure, at full size: as far from float64, one by one, as torch's over all logits."""
    torch.manual_seed(0)
    count, vocabulary, size = 1_024, 151_936, 2_048
    weight = (torch.randn(vocabulary, size, device="cuda") / math.sqrt(size)).bfloat16()
    index = torch.randint(0, vocabulary, (count,), device="cuda")
    heights = torch.where(torch.rand(count, 1, device="cuda") < 0.8, 28.0, 5.0)
    hidden = (torch.randn(count, size, device="cuda") + heights * weight[index].float()).bfloat16()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    advantages = torch.randn(1, count, device="cuda")
    out = linear_grpo_loss(leaves[0][None], leaves[1], index[None], advantages=advantages, impl="cuda")
    got = torch.autograd.grad(out.loss, leaves)

    def products(logits: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        gradient = logits.softmax(-1)
        gradient[torch.arange(count), index] = torch.expm1(logits.log_softmax(-1).gather(1, index[:, None])[:, 0])
        gradient = (gradient * (advantages[0, :, None] / count)).to(x.dtype)
        return gradient @ w, gradient.T @ x

    truth = products(hidden.double() @ weight.double().T, hidden.double(), weight.double())
    torchs = products(torch.mm(hidden, weight.T, out_dtype=torch.float32), hidden, weight)
    for x, y, exact in zip(got, torchs, truth, strict=True):
        ours, theirs = ((z.double() - exact).abs() for z in (x, y))
        assert ours.mean() < 1.1 * theirs.mean()
        assert ours.max() < 1.5 * theirs.max()
        # The worst elements of some rows, from the best of these to the worst.
        row, other = (z.amax(-1).sort().values[:: len(z) // 16] for z in (ours, theirs))
        assert (row <= 1.25 * other + 1e-12).all()


def test_rows_without_a_gradient(launches: list[int]) -> None:
    """Those of groups with equal rewards are projected for the metrics, and no more."""
    hidden, weight, index = inputs(300, 2_000, 64)
    advantages = rand(1, 300, seed=7)
    advantages[0, ::3] = 0.0
    x, w = hidden[None].clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_grpo_loss(x, w, index[None], advantages=advantages, impl="cuda")
    out.loss.backward()
    assert launches == [300, 100]  # of the first 200 count, as only the GPU knows
    assert x.grad is not None
    assert (x.grad[0, ::3] == 0).all()
    truth = linear_grpo_loss(
        hidden[None].double(), weight.double(), index[None], advantages=advantages.double(), impl="torch"
    )
    torch.testing.assert_close(out.logps.double(), truth.logps, rtol=1e-5, atol=3e-5)


def test_cross_entropy(launches: list[int]) -> None:
    hidden, weight, index = inputs(300, 2_000, 64)
    index[::7] = -100
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    loss = linear_cross_entropy(*leaves, index, impl="cuda")
    truth = linear_cross_entropy(*exact, index, impl="torch")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    gradients = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact), strict=True)
    for x, y in gradients:
        assert (x.double() - y).norm() < 2.4e-3 * y.norm()
    assert launches == [300]
