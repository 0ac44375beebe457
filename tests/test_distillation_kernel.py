"""The divergence from a teacher against the reference in float64: on a GPU compiled, elsewhere interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import DEVICE, rand

from grpo_fast import linear_distillation_loss
from grpo_fast.kernels.distillation_loss import SHAPE, divergence_rows
from grpo_fast.ops import _linear_divergence

B, T, V, H, TEACHER_H = 2, 4, 301, 16, 24
MASK = torch.arange(T, device=DEVICE) < torch.tensor([4, 2], device=DEVICE)[:, None]
BETAS = (0.0, 0.3, 1.0)
TILE = 4 * SHAPE["LANES"] * SHAPE["UNROLL"]  # logits that a program reads at a time
TWO_ROWS = 2 * 304 * 10  # bytes: several chunks in each precision, and an odd last one
pytestmark = [
    pytest.mark.usefixtures("poisoned_buffers"),
    pytest.mark.filterwarnings(
        "ignore:(invalid value|divide by zero|overflow):RuntimeWarning"
    ),  # the interpreter's infinities
]

HIDDEN, WEIGHT, BIAS = rand(B, T, H, seed=1), rand(V, H, seed=2, scale=0.5), rand(V, seed=3, scale=0.5)
TEACHER = rand(B, T, TEACHER_H, seed=4), rand(V, TEACHER_H, seed=5, scale=0.4), rand(V, seed=6, scale=0.5)
STUDENT = HIDDEN, WEIGHT, BIAS


def as_double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def differentiate(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], upstream: float | Tensor, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients by hidden, weight and maybe bias."""
    x = [leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_() for leaf in student]
    biases = {"student_bias": x[2] if len(x) > 2 else None, "teacher_bias": teacher[2] if len(teacher) > 2 else None}
    loss = linear_distillation_loss(*x[:2], *teacher[:2], **biases, **options)
    return loss, list(torch.autograd.grad((loss * upstream).sum(), x))


def check(
    student: tuple[Tensor, ...] = (HIDDEN, WEIGHT),
    teacher: tuple[Tensor, ...] = TEACHER[:2],
    *,
    upstream: float | Tensor = 1.7,
    within: float = 2e-5,
    workspace_bytes: int | None = TWO_ROWS,
    allow_sync: bool = True,
    **options: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients are the reference's in float64; half precision rounds gradients thrice."""
    chunks: dict[str, Any] = {"workspace_bytes": workspace_bytes, "allow_sync": allow_sync, "impl": "triton"}
    loss, grads = differentiate(student, teacher, upstream, **options, **chunks)
    exact = tuple(tuple(map(as_double, model)) for model in (student, teacher))
    truth, true_grads = differentiate(*exact, as_double(upstream), **options, impl="torch")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for x, y, leaf in zip(grads, true_grads, student, strict=True):
        assert x.dtype == leaf.dtype
        error, size = (x.double() - y).norm(), y.norm()
        assert error <= (within + 3 * torch.finfo(x.dtype).eps) * size + 1e-12, f"{error / size:.1e}"
    return loss, grads


# What it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_every_divergence(beta: float, masked: bool, reduction: str) -> None:
    upstream = rand(B, T, seed=7) if reduction == "none" else 1.7
    check(
        STUDENT, TEACHER, beta=beta, completion_mask=MASK if masked else None, reduction=reduction, upstream=upstream
    )


@pytest.mark.parametrize(
    "options",
    [
        {"completion_mask": MASK.float(), "allow_sync": False},
        {"completion_mask": MASK.long(), "reduction": "none", "allow_sync": False},
        {"completion_mask": torch.zeros_like(MASK)},
        {"completion_mask": torch.zeros_like(MASK), "allow_sync": False},
        {"completion_mask": torch.zeros_like(MASK), "reduction": "none"},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7.0, device=DEVICE, dtype=torch.float64), "completion_mask": MASK},
        {"temperature": 0.7, "student_logit_scale": 1.3, "teacher_logit_scale": 0.6},
        {"student_softcap": 2.0},
        {"teacher_softcap": 3.0, "temperature": 1.5},
        {"student_softcap": 2.0, "teacher_softcap": 3.0, "student_logit_scale": 1.3},
    ],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("beta", BETAS)
def test_every_option(beta: float, options: dict[str, Any]) -> None:
    check(beta=beta, **options)


@pytest.mark.parametrize("workspace_bytes", [1, TWO_ROWS, None])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "bfloat16 float32", "float32 bfloat16"])
def test_dtypes_and_chunks(dtypes: str, workspace_bytes: int | None) -> None:
    """A row or two at a time, a few, or all; a student and a teacher of different precisions too."""
    first, *second = (getattr(torch, name) for name in dtypes.split())
    # As narrow, because what a rounded gradient of the weight takes is used whatever the workspace.
    student = tuple((x[..., :4] if x.dim() > 1 else x).to(first).contiguous() for x in STUDENT)
    teacher = tuple(x.to(second[0] if second else first) for x in TEACHER)
    check(student, teacher, beta=0.5, completion_mask=MASK, workspace_bytes=workspace_bytes)


def test_heads_of_another_precision_than_the_hidden_states() -> None:
    check((HIDDEN.bfloat16(), WEIGHT), (TEACHER[0], TEACHER[1].bfloat16()), beta=0.5, completion_mask=MASK)


@pytest.mark.parametrize("vocabulary", [2, 3, TILE - 1, TILE, TILE + 1, 2 * TILE + 5])
@pytest.mark.parametrize("beta", BETAS)
def test_vocabularies(beta: float, vocabulary: int) -> None:
    student = rand(3, H, seed=1), rand(vocabulary, H, seed=2, scale=0.5)
    teacher = rand(3, TEACHER_H, seed=3), rand(vocabulary, TEACHER_H, seed=4, scale=0.5)
    check(student, teacher, beta=beta, workspace_bytes=None)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [(), (1,), (0,), (0, 3), (2, 2, 2)], ids=str)
def test_shapes(rows: tuple[int, ...], reduction: str) -> None:
    student, teacher = (rand(*rows, H, seed=1), WEIGHT), (rand(*rows, TEACHER_H, seed=2), TEACHER[1])
    check(student, teacher, beta=0.5, reduction=reduction)


def test_strided_states() -> None:
    wide, wide_teacher = rand(B, T + 2, 2 * H, seed=1), rand(T, B, TEACHER_H, seed=2)
    check((wide[:, 1:-1, ::2], WEIGHT), (wide_teacher.transpose(0, 1), TEACHER[1]), beta=0.5, completion_mask=MASK)


def test_masked_positions_may_hold_anything() -> None:
    hidden, teacher_hidden = HIDDEN.clone(), TEACHER[0].clone()
    hidden[~MASK], teacher_hidden[~MASK] = math.nan, math.inf
    for allow_sync in (True, False):
        student, teacher = (hidden, WEIGHT), (teacher_hidden, TEACHER[1])
        options: dict[str, Any] = dict(completion_mask=MASK, beta=0.5, allow_sync=allow_sync, impl="triton")
        loss, grads = differentiate(student, teacher, 1.0, **options)
        clean, true_grads = differentiate((HIDDEN, WEIGHT), TEACHER[:2], 1.0, **options)
        torch.testing.assert_close([loss, *grads], [clean, *true_grads])


# Rows that are not easy ------------------------------------------------------------------------------------------


def rows_of(logits: Tensor, teacher: Tensor, beta: float, **options: Any) -> tuple[Tensor, Tensor]:
    """Divergences of rows of logits and their gradient, by the kernel."""
    everything: dict[str, Any] = dict(
        beta=beta,
        temperature=1.0,
        student_logit_scale=1.0,
        teacher_logit_scale=1.0,
        student_softcap=None,
        teacher_softcap=None,
    )
    losses, out = torch.empty(len(logits), device=DEVICE), torch.empty_like(logits)
    weights = torch.ones(len(logits), device=DEVICE)
    divergence_rows(losses, out, logits, teacher, None, weights, **everything | options)
    return losses, out


def exact_rows(logits: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The same in float64 by formula: without autograd, whose softmax loses 1 - p."""
    s, t = (torch.log_softmax(x.double(), -1) for x in (logits, teacher))
    if beta == 0.0:
        loss, product = t.exp() * (t - s), s.exp() - t.exp()
    else:
        m = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta)) if beta < 1.0 else t
        loss = s.exp() * (s - m) * (1.0 if beta == 1.0 else 1.0 - beta)
        g = (s - m) * (1.0 if beta == 1.0 else 1.0 - beta)
        if beta < 1.0:
            loss = loss + beta * t.exp() * (t - m)
        product = s.exp() * (g - (s.exp() * g).sum(-1, keepdim=True))
    largest = s.argmax(-1, keepdim=True)  # of a sure row, 1 - p is beyond float64 too; the elements add up to 0
    product = product.scatter(-1, largest, 0.0)
    return loss.sum(-1), product.scatter(-1, largest, -product.sum(-1, keepdim=True))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("same", [False, True])
def test_models_that_are_nearly_sure(same: bool, beta: float) -> None:
    """The sure word's own element, which is as large as all others together, keeps its digits."""
    logits, teacher = rand(6, 999, seed=1), rand(6, 999, seed=2)
    for row, far in enumerate((12.0, 16.0, 20.0, 24.0, 28.0, 32.0)):
        logits[row, 150 * row] += far
        teacher[row, 150 * row if same else 3] += far - 1.5
    losses, out = rows_of(logits, teacher, beta)
    truth, gradient = exact_rows(logits, teacher, beta)
    torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-6)
    error = (out.double() - gradient).norm(dim=-1) / gradient.norm(dim=-1)
    assert error.max() < 3e-5, error


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("where", [5, 2 * TILE + 3])
def test_a_largest_logit_wherever_it_is(where: int, beta: float) -> None:
    """Far above the first tile, so that the row is summed again; logits far from 0."""
    logits, teacher = rand(3, 2 * TILE + 9, seed=1), rand(3, 2 * TILE + 9, seed=2)
    for row, (model, far) in enumerate(((logits, 60.0), (teacher, 120.0), (logits, 120.0))):
        model[row, where] += far
    logits[2] += 900.0
    teacher[2] -= 900.0
    losses, out = rows_of(logits, teacher, beta)
    truth, gradient = exact_rows(logits, teacher, beta)
    torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-5)
    error = (out.double() - gradient).norm(dim=-1)
    assert (error < 1e-4 * gradient.norm(dim=-1) + 1e-30).all(), error


@pytest.mark.parametrize("beta", BETAS)
def test_words_that_are_banned_from_both(beta: float) -> None:
    student, teacher = BIAS.clone(), TEACHER[2].clone()
    student[::3], teacher[::3] = -math.inf, -math.inf
    _, grads = check((HIDDEN, WEIGHT, student), (*TEACHER[:2], teacher), beta=beta)
    assert (grads[2][::3] == 0).all()


@pytest.mark.parametrize("banned", ["student", "teacher"])
def test_words_that_are_banned_from_one(banned: str) -> None:
    """The divergences that are finite, with finite gradients; the others are infinite, as in the reference."""
    student, teacher = BIAS.clone(), TEACHER[2].clone()
    (student if banned == "student" else teacher)[::3] = -math.inf
    models: Any = (HIDDEN, WEIGHT, student), (*TEACHER[:2], teacher)
    infinite = 0.0 if banned == "student" else 1.0
    for beta in (0.0, 0.3, 1.0):
        if beta != infinite:
            check(*models, beta=beta)
    loss, grads = differentiate(*models, 1.0, beta=infinite, impl="triton")
    truth, true_grads = differentiate(*models, 1.0, beta=infinite, impl="torch")
    assert loss == truth == math.inf
    for x, y in zip(grads, true_grads, strict=True):
        assert torch.equal(x.isfinite(), y.isfinite())
        torch.testing.assert_close(*(z.nan_to_num(0.0, 0.0, 0.0) for z in (x, y)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_models_that_agree_have_no_divergence(beta: float) -> None:
    """Not even a rounding, be they sure or not."""
    logits = rand(4, 700, seed=1, scale=5.0)
    logits[1, 3] += 40.0
    losses, out = rows_of(logits, logits.clone(), beta)
    assert losses.abs().max() < 1e-6
    assert out.abs().max() < 1e-6


def test_betas_near_the_ends_go_over_into_them() -> None:
    logits, teacher = rand(3, 500, seed=1), rand(3, 500, seed=2)
    for beta, scale in ((1e-4, 1e-4), (1.0 - 1e-4, 1e-4)):
        losses, out = rows_of(logits, teacher, beta)
        end, gradient = exact_rows(logits, teacher, beta)
        torch.testing.assert_close(losses.double() / scale, end / scale, rtol=1e-2, atol=0.0)
        assert (out.double() - gradient).norm() < 1e-2 * gradient.norm()


# How -------------------------------------------------------------------------------------------------------------


def test_frozen_parts() -> None:
    """What needs no gradient gets none, and the rest is the same."""
    _, everything = check(STUDENT, TEACHER, beta=0.5)
    teacher: dict[str, Any] = dict(teacher_hidden=TEACHER[0], teacher_weight=TEACHER[1], teacher_bias=TEACHER[2])
    for reduction in ("mean", "none"):
        for frozen in range(3):
            leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(STUDENT)]
            loss = linear_distillation_loss(
                *leaves[:2],
                **teacher,
                student_bias=leaves[2],
                beta=0.5,
                reduction=reduction,
                workspace_bytes=TWO_ROWS,
                impl="triton",
            )
            (1.7 * loss.mean()).backward()
            assert leaves[frozen].grad is None
            for i in {0, 1, 2} - {frozen}:
                torch.testing.assert_close(leaves[i].grad, everything[i], rtol=1e-4, atol=1e-7)


def test_no_gradient_to_the_teacher() -> None:
    teacher = [x.clone().requires_grad_() for x in TEACHER]
    for reduction in ("mean", "none"):
        loss = linear_distillation_loss(
            HIDDEN, WEIGHT, *teacher[:2], teacher_bias=teacher[2], reduction=reduction, impl="triton"
        )
        assert not loss.requires_grad


def test_tokens_that_nothing_flows_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward of single losses projects the others only; a chunk has two rows of logits for each of its own."""
    rows: list[int] = []
    kernels = _linear_divergence.row_kernels("triton")
    assert kernels.divergence_rows is not None

    def counted(losses: Tensor, *arguments: Any, **options: Any) -> None:
        rows.append(len(losses))
        divergence_rows(losses, *arguments, **options)

    monkeypatch.setattr(_linear_divergence, "row_kernels", lambda impl: kernels._replace(divergence_rows=counted))
    upstream = rand(B, T, seed=7)
    upstream[0, 1:] = 0.0
    check(beta=0.5, reduction="none", completion_mask=MASK, upstream=upstream)
    assert rows == [2, 2, 2, 2, 1]


def test_gradients_of_a_mean_over_many_tokens_do_not_underflow_in_float16() -> None:
    student, teacher = (tuple(x.half() for x in model) for model in (STUDENT, TEACHER))
    check(student, teacher, beta=0.5, num_items_in_batch=1e7, upstream=2.0**20)
    check(student, teacher, beta=0.5, reduction="none", upstream=-rand(B, T, seed=7).abs())


def test_one_backward_only_with_a_reduction() -> None:
    hidden = HIDDEN.clone().requires_grad_()
    loss = linear_distillation_loss(hidden, WEIGHT, *TEACHER[:2], impl="triton")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_precision_takes_the_reference() -> None:
    exact = tuple(x.double() for x in (HIDDEN, WEIGHT, *TEACHER[:2]))
    for changed in range(4):
        inputs = [x if i == changed else x.float() for i, x in enumerate(exact)]
        assert linear_distillation_loss(*inputs).dtype == torch.float64
        with pytest.raises(RuntimeError, match="impl='triton': computes in float32, got float64"):
            linear_distillation_loss(*inputs, impl="triton")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeatable_and_without_a_graph_break(reduction: str) -> None:
    def value(h: Tensor, w: Tensor) -> Tensor:
        return linear_distillation_loss(
            h,
            w,
            *TEACHER[:2],
            completion_mask=MASK,
            beta=0.5,
            reduction=reduction,
            workspace_bytes=TWO_ROWS,
            impl="triton",
        ).sum()

    results = []
    for fn in (value, value, torch.compile(value, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT)]
        results.append(torch.autograd.grad(fn(*leaves), leaves))
    for grads in results[1:]:
        assert all(map(torch.equal, results[0], grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_registered_op(gradient: bool, dtype: torch.dtype) -> None:
    """Schema, fake implementation and derivative, by torch's own checker."""
    inputs = [x.detach().to(dtype, copy=True).requires_grad_(not gradient) for x in STUDENT]
    teacher = [x.to(dtype) for x in TEACHER]
    weights = torch.full((B * T,), 0.5, device=DEVICE) if gradient else None
    options = 0.5, 1.0, 1.0, 1.0, None, None, TWO_ROWS, True, "triton"
    arguments = (*inputs, *teacher, MASK.reshape(-1), weights, [gradient] * 3, *options)
    torch.library.opcheck(_linear_divergence.linear_divergence, arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_in_a_graph() -> None:
    hidden, weight = (x.clone().requires_grad_() for x in (HIDDEN, WEIGHT))
    teacher_hidden = TEACHER[0].clone()

    def step() -> tuple[Tensor, ...]:
        loss = linear_distillation_loss(
            hidden, weight, teacher_hidden, TEACHER[1], completion_mask=MASK, beta=0.5, allow_sync=False
        )
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    step()  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in (31, 32):
        with torch.no_grad():
            hidden.copy_(rand(B, T, H, seed=seed))
            teacher_hidden.copy_(rand(B, T, TEACHER_H, seed=seed + 5))
        graph.replay()
        torch.testing.assert_close(results, step())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_compiled_for_no_length_and_no_beta() -> None:
    from grpo_fast.kernels.distillation_loss import _divergence_kernel

    def run(rows: int, beta: float, temperature: float) -> None:
        student, teacher = (rand(rows, H, seed=1), WEIGHT), (rand(rows, TEACHER_H, seed=2), TEACHER[1])
        differentiate(student, teacher, 1.0, beta=beta, temperature=temperature, impl="triton")

    run(5, 0.5, 1.0)
    compiled = [len(cache[0]) for cache in _divergence_kernel.device_caches.values()]
    for rows, beta, temperature in ((1, 0.25, 0.7), (16, 0.9, 2.0), (33, 1e-3, 0.1)):
        run(rows, beta, temperature)
    assert [len(cache[0]) for cache in _divergence_kernel.device_caches.values()] == compiled


@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_more_than_2_31_elements() -> None:
    rows, vocabulary = 2**14 + 1, 2**17
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    logits = torch.zeros(rows, vocabulary, device=DEVICE)
    teacher = torch.zeros(rows, vocabulary, device=DEVICE)
    logits[-1, -1], teacher[-1, -1] = 11.0, 12.0
    losses, weights = torch.empty(rows, device=DEVICE), torch.ones(rows, device=DEVICE)
    truth, gradient = exact_rows(logits[-2:].clone(), teacher[-2:], 0.5)
    options: dict[str, Any] = dict(student_softcap=None, teacher_softcap=None, temperature=1.0)
    options |= dict(student_logit_scale=1.0, teacher_logit_scale=1.0)
    divergence_rows(losses, logits, logits, teacher, None, weights, beta=0.5, **options)
    torch.testing.assert_close(losses[-2:].double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits[-1].double(), gradient[-1], rtol=1e-4, atol=1e-9)
