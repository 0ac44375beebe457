"""The single-launch GRPO loss against the reference in float64: on a GPU compiled, elsewhere interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import DEVICE, rand

from grpo_fast import GRPOLossConfig, GRPOLossOutput, grpo_loss
from grpo_fast.ops import grpo_loss as op

B, T, V = 4, 5, 301
MASK = torch.arange(T, device=DEVICE) < torch.tensor([5, 0, 2, 4], device=DEVICE)[:, None]
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
pytestmark = pytest.mark.usefixtures("poisoned_buffers")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")


def ids(*shape: int, vocabulary: int = V) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)


def batch(vocabulary: int = V, **changes: Any) -> dict[str, Any]:
    """Everything a loss takes beside the logits; old and reference policies some way off."""
    inputs = {
        "completion_ids": ids(B, T, vocabulary=vocabulary),
        "completion_mask": MASK,
        "rewards": torch.tensor([0.0, 1.0, 0.5, 0.25], device=DEVICE),
        "group_size": 2,
        "old_logps": rand(B, T, seed=2, scale=0.4) - math.log(vocabulary) - 0.3,
        "ref_logps": rand(B, T, seed=3, scale=0.4) - math.log(vocabulary),
        **changes,
    }
    return {name: value for name, value in inputs.items() if value is not None}


def given_advantages(advantages: Tensor, **changes: Any) -> dict[str, Any]:
    return batch(advantages=advantages, rewards=None, group_size=None, **changes)


def run(logits: Tensor, inputs: dict[str, Any], impl: str, upstream: float = 1.0) -> tuple[GRPOLossOutput, Tensor]:
    x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = grpo_loss(x, **inputs, impl=impl)
    return out, torch.autograd.grad(out.loss * upstream, x)[0]


def check(impl: str, logits: Tensor, inputs: dict[str, Any]) -> tuple[GRPOLossOutput, Tensor]:
    """Loss, log-probs, entropy, metrics and gradient are the reference's in float64."""
    out, grad = run(logits, inputs, impl, 1.7)
    truth, true_grad = run(logits.double(), inputs, "torch", 1.7)
    for name in ("loss", "logps", "entropy"):
        torch.testing.assert_close(
            getattr(out, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-5, equal_nan=True, msg=name
        )
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        torch.testing.assert_close(
            out.metrics[name].double(), value.double(), rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
        )
    assert torch.equal(grad.isnan(), true_grad.isnan())
    difference, size = (x.nan_to_num().norm() for x in (grad.double() - true_grad, true_grad))
    # Rounded to its dtype, and again when it was scaled by the upstream gradient; the interpreter cuts off instead.
    roundings = 2 if DEVICE == "cpu" else 1
    assert difference <= (1e-5 + roundings * torch.finfo(logits.dtype).eps) * size + 1e-12, f"{difference / size:.1e}"
    return out, grad


LOGITS = rand(B, T, V, seed=15)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss(impl: str, loss_type: str, level: str) -> None:
    config = GRPOLossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.1,
        entropy_coef=0.05,
        epsilon_high=1.2 if loss_type == "cispo" else 0.3,
    )
    check(impl, LOGITS, batch(config=config, temperature=1.3))


@pytest.mark.parametrize(
    "options",
    [
        {"delta": 1.5},
        {"delta": 1.1, "epsilon_low": 0.0},
        {"dual_clip": 1.2},
        {"dual_clip": 1.05, "delta": 1.4, "beta": 0.2},
        {"beta": 0.3, "kl_estimator": "k1"},
        {"beta": 0.3, "kl_estimator": "k2", "use_bias_correction_kl": False},
        {"beta": 0.3, "kl_estimator": "k3", "use_bias_correction_kl": False},
        {"loss_type": "cispo", "cispo_bounds": "relative"},
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "beta": 0.1},
        {"loss_type": "dr_grpo", "max_completion_length": 9},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"off_policy_mask_threshold": 0.01},
    ],
    ids=str,
)
def test_every_option(impl: str, options: dict[str, Any]) -> None:
    check(impl, LOGITS, batch(config=GRPOLossConfig(**options)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 7, 1_000, 40_009])
def test_vocabularies_and_dtypes(impl: str, vocabulary: int, dtype: torch.dtype) -> None:
    logits = rand(B, T, vocabulary, seed=1, scale=3.0).to(dtype)
    check(impl, logits, batch(vocabulary, config=GRPOLossConfig(beta=0.1), softcap=20.0, logit_scale=1.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaked_rows(impl: str, dtype: torch.dtype) -> None:
    """Most rows nearly sure of their token: log-probs down to 1e-14, where 1 - p must not be a subtraction."""
    heights = torch.linspace(0, 40, B * T, device=DEVICE).view(B, T, 1)
    logits = LOGITS.scatter(-1, ids(B, T)[..., None], heights)
    inputs = given_advantages(rand(B, seed=5), completion_mask=None, old_logps=None, config=GRPOLossConfig())
    _, grad = check(impl, logits.to(dtype), inputs)
    _, truth = run(logits.to(dtype).double(), inputs, "torch", 1.7)
    at_token = [g.gather(-1, ids(B, T)[..., None]).double() for g in (grad, truth)]
    torch.testing.assert_close(*at_token, rtol=2e-3 + 4 * torch.finfo(dtype).eps, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"completion_mask": None},
        {"completion_mask": MASK.long()},
        {"completion_mask": torch.zeros_like(MASK)},
        {"old_logps": None},
        {"old_logps": None, "completion_mask": None, "ref_logps": None},
        {"importance_sampling_ratio": rand(B, seed=6).exp()},
        {"importance_sampling_ratio": rand(B, 1, seed=6).exp()},
        {"importance_sampling_ratio": rand(B, T, seed=6).exp()},
        {"entropy_mask": rand(B, T, seed=7) > 0, "config": GRPOLossConfig(entropy_coef=0.1)},
        {"entropy_threshold": 5.2},
        {"entropy_threshold": torch.tensor(5.2, device=DEVICE)},
        {"entropy_threshold": 5.2, "config": GRPOLossConfig(entropy_coef=0.1)},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7, device=DEVICE)},
        {"num_items_in_batch": torch.tensor(0.5, device=DEVICE)},
        {"group_size": 1},
        {"group_size": 4},
        {"group_size": None, "group_ids": torch.tensor([0, 1, 0, 1], device=DEVICE)},
        {"rewards": torch.tensor([0.1, 0.1, math.nan, 1.0], device=DEVICE)},
        {"rewards": torch.tensor([0.1, 0.1, 0.3, 1.0], device=DEVICE), "config": GRPOLossConfig(entropy_coef=0.1)},
        {"rewards": torch.tensor([math.nan, 0.7, 0.3, 1.0], device=DEVICE), "group_size": 4},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_every_input(impl: str, changes: dict[str, Any]) -> None:
    check(impl, LOGITS, batch(**changes))


@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, T)])
def test_advantages(impl: str, shape: tuple[int, ...]) -> None:
    check(impl, LOGITS, given_advantages(rand(*shape, seed=8)))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("masked", [False, True])
def test_packed(impl: str, loss_type: str, masked: bool) -> None:
    """Sequences of lengths 5, 0, 7 and 6, and two rows of padding at the end."""
    per_token = {
        "completion_ids": ids(20),
        "completion_mask": rand(20, seed=4) > -0.5 if masked else None,
        "old_logps": rand(20, seed=2, scale=0.4) - math.log(V),
        "ref_logps": rand(20, seed=3, scale=0.4) - math.log(V),
        "importance_sampling_ratio": rand(4, seed=6).exp(),
        "cu_seqlens": torch.tensor([0, 5, 5, 12, 18], device=DEVICE),
    }
    config = GRPOLossConfig(beta=0.1, loss_type=loss_type, max_completion_length=6)
    check(impl, LOGITS.view(20, V), batch(**per_token, config=config))


@pytest.mark.parametrize("kind", ["slice", "transposed", "one row", "no rows", "no tokens"])
def test_layouts(impl: str, kind: str) -> None:
    base = rand(B, T + 4, V, seed=10)
    logits = {
        "slice": base[:, 3:-1],
        "transposed": base[:, :T].transpose(0, 1).contiguous().transpose(0, 1),
        "one row": base[:1, :1],
        "no rows": base[:0],
        "no tokens": base[:, :0],
    }[kind]
    b, t = logits.shape[:2]
    check(impl, logits, {"completion_ids": ids(b, t), "rewards": rand(b, seed=1), "group_size": 1 if b < B else 2})
    per_token = {"advantages": rand(b, t, seed=2), "ref_logps": rand(b, t, seed=3) - 6.0}
    check(impl, logits, {"completion_ids": ids(b, t), **per_token, "config": GRPOLossConfig(beta=0.1)})


def test_masked_rows_are_neither_read_nor_left_as_they_are(impl: str) -> None:
    inputs = batch()
    dirty = {
        **inputs,
        **{name: inputs[name].masked_fill(~MASK, math.nan) for name in ("old_logps", "ref_logps")},
        "completion_ids": inputs["completion_ids"].masked_fill(~MASK, -100),
    }
    (out, grad), (same, same_grad) = (
        run(LOGITS, inputs, impl),
        run(LOGITS.masked_fill(~MASK[..., None], math.nan), dirty, impl),
    )
    assert torch.equal(out.loss, same.loss)
    assert torch.equal(grad, same_grad)
    assert not grad[~MASK].any()


def test_what_is_wrong_stays_visible(impl: str) -> None:
    logits = LOGITS.clone()
    logits[0, 1, 7] = math.nan
    inputs = batch()
    out, grad = check(impl, logits, inputs)
    assert out.loss.isnan()
    assert grad[0, 1].isnan().all()
    inputs["completion_ids"][2, 0] = V
    out, grad = run(LOGITS, inputs, impl)
    assert out.loss.isnan()
    assert not grad[2, 0].any()


def test_overwriting_the_logits(impl: str) -> None:
    _, expected = run(LOGITS, batch(), impl, 3.0)
    leaf = LOGITS.clone().requires_grad_()
    inner = leaf * 1.0
    out = grad = None
    out = grpo_loss(inner, **batch(), impl=impl, overwrite_logits=True)
    (grad,) = torch.autograd.grad(out.loss * 3.0, leaf)
    assert torch.equal(grad, expected)
    assert torch.equal(inner.detach(), expected)  # the buffer itself
    with torch.no_grad():  # nothing to compute, nothing overwritten
        kept = LOGITS.clone()
        assert torch.equal(grpo_loss(kept, **batch(), impl=impl, overwrite_logits=True).loss, out.loss)
        assert torch.equal(kept, LOGITS)


def test_logits_that_something_else_needs_are_not_overwritten_unseen(impl: str) -> None:
    leaf = LOGITS.clone().requires_grad_()
    inner = leaf.exp()  # its backward needs its result
    out = grpo_loss(inner, **batch(), impl=impl, overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_one_backward_only(impl: str) -> None:
    x = LOGITS.clone().requires_grad_()
    loss = grpo_loss(x, **batch(), impl=impl).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_repeatable(impl: str) -> None:
    inputs = batch(config=GRPOLossConfig(beta=0.1, entropy_coef=0.01))
    (first, grad), (second, same) = (run(LOGITS, inputs, impl) for _ in range(2))
    assert torch.equal(grad, same)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first.metrics[name], second.metrics[name]) for name in first.metrics)


def test_compiles_without_a_graph_break(impl: str) -> None:
    inputs = batch(config=GRPOLossConfig(beta=0.1))

    def value(x: Tensor) -> Tensor:
        return grpo_loss(x, **inputs, impl=impl).loss * 2.0

    grads = []
    for fn in (value, torch.compile(value, fullgraph=True, backend="aot_eager")):
        x = LOGITS.clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(x), x)[0])
    assert torch.equal(*grads)


def test_the_registered_op(impl: str) -> None:
    """Schema and fake implementation, by torch's own checker."""
    seen = []
    original = op._grpo_loss

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    op._grpo_loss = spy
    try:
        run(LOGITS, batch(), impl)
    finally:
        op._grpo_loss = original
    torch.library.opcheck(original, *seen[0])


# What only a GPU can show -------------------------------------------------------------------------------------------


@on_gpu
def test_compiles_with_inductor_and_picks_the_kernel_itself() -> None:
    inputs = batch(config=GRPOLossConfig(beta=0.1))

    def value(x: Tensor) -> Tensor:
        return grpo_loss(x * 1.0, **inputs).loss * 2.0

    grads = []
    for fn in (value, torch.compile(value, fullgraph=True)):
        x = LOGITS.clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(x), x)[0])
    torch.testing.assert_close(*grads)


@on_gpu
def test_in_a_cuda_graph(impl: str) -> None:
    x, inputs = LOGITS.clone().requires_grad_(), batch()
    run(LOGITS, inputs, impl)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = grpo_loss(x, **inputs, impl=impl).loss
        (grad,) = torch.autograd.grad(loss, x)
    for seed in (31, 32):
        with torch.no_grad():
            x.copy_(rand(B, T, V, seed=seed))
        graph.replay()
        out, expected = run(x, inputs, impl)
        assert torch.equal(loss, out.loss)
        assert torch.equal(grad, expected)


@on_gpu
def test_nothing_recompiles() -> None:
    """Neither a new length nor new values of the options are a new kernel."""
    from grpo_fast.kernels._results import _grpo_results_kernel
    from grpo_fast.kernels.grpo_loss import _grpo_loss_kernel

    def compiled() -> int:
        return sum(
            len(cache[0])
            for kernel in (_grpo_loss_kernel, _grpo_results_kernel)
            for cache in kernel.device_caches.values()
        )

    counts = []
    for length in (5, 16, 33, 64, 100):
        logits = rand(4, length, 320, seed=length)
        config = GRPOLossConfig(beta=0.01 * length, epsilon_low=0.1 + 1e-3 * length, loss_type="grpo")
        per_token = {"completion_ids": ids(4, length, vocabulary=320), "ref_logps": rand(4, length, seed=1) - 6}
        run(
            logits,
            {
                **per_token,
                "rewards": rand(4, seed=length),
                "group_size": 4,
                "config": config,
                "temperature": 0.5 + 0.01 * length,
            },
            "triton",
        )
        counts.append(compiled())
    assert len(set(counts)) == 1, counts


@on_gpu
@pytest.mark.parametrize(("rows", "vocabulary"), [(70_000, 320), (3, 1_000_000)])
def test_many_tokens_and_many_words(impl: str, rows: int, vocabulary: int) -> None:
    logits = torch.randn(1, rows, vocabulary, device="cuda")
    index = torch.randint(0, vocabulary, (1, rows), device="cuda")
    check(impl, logits, {"completion_ids": index, "advantages": torch.ones(1, device="cuda")})


@on_gpu
def test_more_than_2_31_elements(impl: str) -> None:
    rows, vocabulary = 2**14 + 1, 2**17
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    logits = torch.zeros(1, rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    logits[0, -1, -1] = 12.0
    index = torch.zeros(1, rows, dtype=torch.int64, device="cuda")
    index[0, -1] = vocabulary - 1
    logits.requires_grad_()
    config = GRPOLossConfig(loss_type="luspo")
    out = grpo_loss(logits, index, advantages=torch.ones(1, device="cuda"), config=config, impl=impl)
    (grad,) = torch.autograd.grad(out.loss, logits)
    truth = torch.log_softmax(logits.detach()[0, -2:].double(), -1)
    torch.testing.assert_close(
        out.logps[0, -2:].double(), torch.stack([truth[0, 0], truth[1, -1]]), rtol=1e-5, atol=0
    )
    expected = truth.exp() - torch.nn.functional.one_hot(index[0, -2:], vocabulary)
    torch.testing.assert_close(grad[0, -2:].double(), expected, rtol=1e-2, atol=1e-9)
