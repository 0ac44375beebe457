"""The divergence of a student's logits from a teacher's: its value by row, and its gradient by the student's logits.

A program takes a row of each through up to three sweeps. Exponents are powers of two relative to a base of the row,
as in ``_rows``: log2 p = d - log2(total).

1. The totals of both rows and, for a KL, the sum that the divergence follows from.
2. Between the two KLs, the divergence: m needs the totals first.
3. The gradient, w p_s (g - mean of g under p_s), with

       forward KL    p_s - p_t in the place of p_s (g - mean)
       reverse KL    g = log(p_s / p_t)
       between       g = (1 - beta) log(p_s / m),  m = beta p_t + (1 - beta) p_s

A row of either is read from the end that the sweep before has left in the caches.

The elements of a row's gradient add up to 0 before softcap and scale. Of a student that is nearly sure of a word, the
word's own element is taken from the others, which are exact, where 1 - p would have no digits left.
"""

import torch
import triton
import triton.language as tl

from grpo_fast.kernels._rows import FAR, LN2, LOG2E, LOWEST, capped, lane_sum, row_max, row_zero, tile_columns
from grpo_fast.kernels.selective_log_softmax import logits_arguments

FORWARD_KL = tl.constexpr("forward KL")
REVERSE_KL = tl.constexpr("reverse KL")
BETWEEN = tl.constexpr("between")

# Threads of a program, and the 16-byte loads of each row that each makes at a time: three programs fit an SM, as many
# as a chunk of 384 rows has for each.
SHAPE = {"LANES": 512, "UNROLL": 1, "num_warps": 16, "maxnreg": 40}


@triton.jit
def _exponents(row, cols, V, inner, shift, cap, cap_in, HAS_SOFTCAP: tl.constexpr):
    """(d, u) at columns of a row; d is -inf beyond the row's end."""
    x = tl.load(row + cols, mask=cols < V, other=-float("inf"))
    u = capped(x, cap, cap_in, HAS_SOFTCAP)
    d = tl.fma(u, inner, -shift)
    if HAS_SOFTCAP:  # it has made the padding finite
        d = tl.where(cols < V, d, -float("inf"))
    return d, u


@triton.jit
def _totals(
    student,
    teacher,
    V,
    s_inner,
    s_shift,
    s_cap,
    s_cap_in,
    t_inner,
    t_shift,
    t_cap,
    t_cap_in,
    DIVERGENCE: tl.constexpr,
    S_SOFTCAP: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums of 2^d of the student and of the teacher, and for a KL(p || q) that of 2^d_p (d_p - d_q)."""
    s_total = tl.zeros([LANES], tl.float32)
    t_total = tl.zeros([LANES], tl.float32)
    cross = tl.zeros([LANES], tl.float32)
    first = tile_columns(LANES, UNROLL, 4)
    for start in range(0, V, UNROLL * LANES * 4):
        cols = start + first
        s, _ = _exponents(student, cols, V, s_inner, s_shift, s_cap, s_cap_in, S_SOFTCAP)
        t, _ = _exponents(teacher, cols, V, t_inner, t_shift, t_cap, t_cap_in, T_SOFTCAP)
        p_s = tl.exp2(s)
        p_t = tl.exp2(t)
        s_total += lane_sum(p_s)
        t_total += lane_sum(p_t)
        if DIVERGENCE == FORWARD_KL:
            cross += lane_sum(tl.where(p_t > 0.0, p_t * (t - s), 0.0))
        if DIVERGENCE == REVERSE_KL:
            cross += lane_sum(tl.where(p_s > 0.0, p_s * (s - t), 0.0))
    return tl.sum(s_total, 0), tl.sum(t_total, 0), tl.sum(cross, 0)


@triton.jit
def _logs_over_mixture(s, t, gap, beta, alpha):
    """log2(p_s / m) and log2(p_t / m) with m = beta p_t + alpha p_s; ``gap`` is what log2(p_t / p_s) is off t - s by.

    Where a probability is 0 its logarithm is finite, and where both are so is everything.
    """
    ratio = tl.maximum(t, LOWEST) - tl.maximum(s, LOWEST) + gap  # log2(p_t / p_s)
    smaller = tl.exp2(-tl.abs(ratio))
    teacher_larger = ratio > 0.0
    larger_log = -tl.log2(tl.where(teacher_larger, tl.fma(smaller, alpha, beta), tl.fma(smaller, beta, alpha)))
    smaller_log = larger_log - tl.abs(ratio)
    return tl.where(teacher_larger, smaller_log, larger_log), tl.where(teacher_larger, larger_log, smaller_log)


# The number of rows changes with every batch: it is in the grid alone.
@triton.jit
def _divergence_kernel(
    # inputs
    student,  # (N, V) float32, contiguous rows
    teacher,  # (N, V) float32, contiguous rows
    mask,  # (N,), or None
    weights,  # (N,) float32, or None for no gradient
    # outputs
    losses,  # (N,) float32
    out,  # (N, V), contiguous rows, and may be the student's logits; None for no gradient
    # sizes and strides
    V,
    s_stride,
    t_stride,
    out_stride,
    # options
    beta,
    alpha,  # 1 - beta
    s_slope,
    s_cap,
    s_cap_in,
    t_slope,
    t_cap,
    t_cap_in,
    DIVERGENCE: tl.constexpr,
    S_SOFTCAP: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    student += n * s_stride
    teacher += n * t_stride
    kept = n >= 0
    if mask is not None:
        kept = tl.load(mask + n) != 0
    if not kept:
        tl.store(losses + n, 0.0)
        if out is not None:
            row_zero(out + n * out_stride, 1, V, LANES, UNROLL)
        return

    tile = UNROLL * LANES * 4
    tiles = tl.cdiv(V, tile)
    first = tile_columns(LANES, UNROLL, 4)
    s_inner = s_slope * LOG2E
    t_inner = t_slope * LOG2E

    # The exponents are relative to the largest of the row's first tile, unless the largest of all is far above that.
    # The base is finite: a banned word gives 2^-inf = 0 and not NaN.
    begin = tl.minimum(V, tile)
    s_base = tl.maximum(row_max(student, 1, begin, s_cap, s_cap_in, S_SOFTCAP, LANES, UNROLL), -1e30)
    t_base = tl.maximum(row_max(teacher, 1, begin, t_cap, t_cap_in, T_SOFTCAP, LANES, UNROLL), -1e30)
    s_shift = s_base * s_inner
    t_shift = t_base * t_inner
    s_total, t_total, cross = _totals(
        student,
        teacher,
        V,
        s_inner,
        s_shift,
        s_cap,
        s_cap_in,
        t_inner,
        t_shift,
        t_cap,
        t_cap_in,
        DIVERGENCE,
        S_SOFTCAP,
        T_SOFTCAP,
        LANES,
        UNROLL,
    )
    if not (tl.maximum(s_total, t_total) < FAR * V):
        s_base = tl.maximum(row_max(student, 1, V, s_cap, s_cap_in, S_SOFTCAP, LANES, UNROLL), s_base)
        t_base = tl.maximum(row_max(teacher, 1, V, t_cap, t_cap_in, T_SOFTCAP, LANES, UNROLL), t_base)
        s_shift = s_base * s_inner
        t_shift = t_base * t_inner
        s_total, t_total, cross = _totals(
            student,
            teacher,
            V,
            s_inner,
            s_shift,
            s_cap,
            s_cap_in,
            t_inner,
            t_shift,
            t_cap,
            t_cap_in,
            DIVERGENCE,
            S_SOFTCAP,
            T_SOFTCAP,
            LANES,
            UNROLL,
        )
    gap = tl.log2(s_total) - tl.log2(t_total)

    # The divergence, and the mean of g under p_s: in the units that the third sweep has g in.
    mean = 0.0
    if DIVERGENCE == FORWARD_KL:
        loss = LN2 * (cross / t_total + gap)
    elif DIVERGENCE == REVERSE_KL:
        mean = cross / s_total
        loss = LN2 * (mean - gap)
    else:
        s_sum = tl.zeros([LANES], tl.float32)
        t_sum = tl.zeros([LANES], tl.float32)
        for i in range(tiles):
            cols = (tiles - 1 - i) * tile + first
            s, _ = _exponents(student, cols, V, s_inner, s_shift, s_cap, s_cap_in, S_SOFTCAP)
            t, _ = _exponents(teacher, cols, V, t_inner, t_shift, t_cap, t_cap_in, T_SOFTCAP)
            s_log, t_log = _logs_over_mixture(s, t, gap, beta, alpha)
            s_sum += lane_sum(tl.exp2(s) * s_log)
            t_sum += lane_sum(tl.exp2(t) * t_log)
        mean = tl.sum(s_sum, 0) / s_total
        loss = LN2 * (alpha * mean + beta * (tl.sum(t_sum, 0) / t_total))
    tl.store(losses + n, loss)

    if out is not None:
        out += n * out_stride
        weight = tl.load(weights + n) * s_slope
        if DIVERGENCE == REVERSE_KL:
            weight *= LN2
        if DIVERGENCE == BETWEEN:
            weight *= LN2 * alpha
        s_scale = 1.0 / s_total
        t_scale = 1.0 / t_total
        others = tl.zeros([LANES], tl.float32)
        sure = tl.full([LANES], -1, tl.int32)  # the column of a word that has more than half, or -1
        slope_there = tl.zeros([LANES], tl.float32)
        for i in range(tiles):
            cols = (i if DIVERGENCE == BETWEEN else tiles - 1 - i) * tile + first
            s, u = _exponents(student, cols, V, s_inner, s_shift, s_cap, s_cap_in, S_SOFTCAP)
            t, _ = _exponents(teacher, cols, V, t_inner, t_shift, t_cap, t_cap_in, T_SOFTCAP)
            p_s = tl.exp2(s) * s_scale
            if DIVERGENCE == FORWARD_KL:
                grad = p_s - tl.exp2(t) * t_scale
            elif DIVERGENCE == REVERSE_KL:
                grad = tl.where(p_s > 0.0, p_s * (s - t - mean), 0.0)
            else:
                s_log, _ = _logs_over_mixture(s, t, gap, beta, alpha)
                grad = p_s * (s_log - mean)
            grad *= weight
            half = p_s > 0.5
            others += lane_sum(tl.where(half, 0.0, grad))
            sure = tl.maximum(sure, tl.max(tl.max(tl.where(half, cols, -1), 2), 0))
            if S_SOFTCAP:
                c = u / s_cap
                slope = s_cap * s_cap_in * (1.0 - c * c)
                slope_there += lane_sum(tl.where(half, slope, 0.0))
                grad *= slope
            tl.store(out + cols, grad.to(out.dtype.element_ty), mask=cols < V, cache_modifier=".cs")
        column = tl.max(sure, 0)
        if column >= 0:
            at_sure = -tl.sum(others, 0)
            if S_SOFTCAP:
                at_sure *= tl.sum(slope_there, 0)
            tl.debug_barrier()  # another thread has written there
            tl.store(out + column, at_sure.to(out.dtype.element_ty))


def divergence_rows(
    losses: torch.Tensor,
    out: torch.Tensor | None,
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    weights: torch.Tensor | None,
    *,
    beta: float,
    temperature: float,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
) -> None:
    """Write the divergences of rows of logits to ``losses`` and, unless ``out`` is None, their gradient there.

    ``student`` and ``teacher`` are (N, V) float32, ``out``, which may be ``student``, is (N, V); rows have stride 1.
    ``losses`` (N,) float32 is 0 where ``mask`` (N,) is, and so is the gradient: that of the losses times ``weights``
    (N,) float32 by the student's logits.
    """
    N, V = student.shape
    if N == 0:
        return
    divergence = {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(beta, BETWEEN)
    of_student = logits_arguments(temperature, student_logit_scale, student_softcap)
    of_teacher = logits_arguments(temperature, teacher_logit_scale, teacher_softcap)
    _divergence_kernel[(N,)](
        student,
        teacher,
        mask,
        weights,
        losses,
        out,
        V,
        student.stride(0),
        teacher.stride(0),
        student.stride(0) if out is None else out.stride(0),
        beta=beta,
        alpha=1.0 - beta,
        **{f"s_{name}": value for name, value in of_student.items()},
        **{f"t_{name}": value for name, value in of_teacher.items()},
        DIVERGENCE=divergence,
        S_SOFTCAP=student_softcap is not None,
        T_SOFTCAP=teacher_softcap is not None,
        **SHAPE,
    )
