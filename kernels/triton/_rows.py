"""One row of logits: its statistics in one sweep, its gradient in another. The kernels over logits are made of these.

Logits x become capped logits u (u = x without a softcap) and z = u * slope, the exponents of the softmax. A row
is summed relative to one of its u: d_j = u_j * inner - shift with inner = slope * log2(e), by one fused
multiply-add, so that d_j is rounded once and whatever rounding ``shift`` carries is the same in every term.

The sampled token is left out of the sum and added at the end. A row that is nearly sure of it then keeps 1 - p to
full precision, and with it the log-prob and the gradient, where 1 - exp(logp) would be 0.

A program takes a row in tiles of (UNROLL, LANES, K) logits: K lie side by side in one 16-byte load, LANES is the
number of threads, and each thread makes UNROLL loads before it needs the first. Every thread keeps its own sums, so
the threads meet once a row and not once a tile.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# exp2 of anything below is 0 in float32, even as a subnormal; stands in for -inf where 0 * -inf must be 0.
LOWEST = tl.constexpr(-150.0)
# Exponents relative to something so far below the largest that their mean passes this are summed again: large
# exponents have large roundings.
FAR = tl.constexpr(8.0)


@triton.jit
def tanh(x):
    """Hyperbolic tangent without a library call; absolute error about 1e-7."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, precise where x is small."""
    series = x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - x * (0.25 - x * 0.2))))
    return tl.where(x < 0.03, series, tl.log(1.0 + x))


@triton.jit
def expm1(x):
    """exp(x) - 1, precise where x is near 0."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0)))))
    return tl.where(tl.abs(x) < 0.03, series, tl.exp(x) - 1.0)


@triton.jit
def capped(x, cap, cap_in, HAS_SOFTCAP: tl.constexpr):
    """u = cap * tanh(x * cap_in), or x itself."""
    if HAS_SOFTCAP:
        return cap * tanh(x * cap_in)
    return x


@triton.jit
def tile_columns(LANES: tl.constexpr, UNROLL: tl.constexpr, K: tl.constexpr):
    """(UNROLL, LANES, K) column numbers of a row's first tile."""
    loads = tl.arange(0, UNROLL)[:, None, None] * (LANES * K)
    lanes = tl.arange(0, LANES)[None, :, None] * K
    return loads + lanes + tl.arange(0, K)[None, None, :]


@triton.jit
def lane_sum(x):
    """Sum a tile over what each lane holds: (UNROLL, LANES, K) -> (LANES,)."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def row_sums(
    row,
    stride,
    V,
    target,
    shift,
    slope,
    cap,
    cap_in,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums of exp2(d) and of d * exp2(d) over all but the target. The row stays in the caches as long as it can."""
    K: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    inner = slope * LOG2E
    others = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    first = tile_columns(LANES, UNROLL, K)
    for start in range(0, V, UNROLL * LANES * K):
        cols = start + first
        x = tl.load(
            row + cols.to(tl.int64) * stride, mask=cols < V, other=-float("inf"), eviction_policy="evict_last"
        )
        u = capped(x.to(tl.float32), cap, cap_in, HAS_SOFTCAP)
        if HAS_SOFTCAP:  # it has made the padding finite
            u = tl.where(cols < V, u, -float("inf"))
        if (target >= start) & (target < start + UNROLL * LANES * K):
            u = tl.where(cols == target, -float("inf"), u)
        d = tl.fma(u, inner, -shift)
        e = tl.exp2(d)
        others += lane_sum(e)
        if ENTROPY:
            weighted += lane_sum(e * tl.maximum(d, LOWEST))
    return tl.sum(others, 0), tl.sum(weighted, 0)


@triton.jit
def row_max(row, stride, V, cap, cap_in, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """The largest u of a row."""
    K: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    largest = tl.full([LANES], -float("inf"), tl.float32)
    first = tile_columns(LANES, UNROLL, K)
    for start in range(0, V, UNROLL * LANES * K):
        cols = start + first
        x = tl.load(row + cols.to(tl.int64) * stride, mask=cols < V, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.max(x, 2), 0))
    return capped(tl.max(largest, 0), cap, cap_in, HAS_SOFTCAP)


@triton.jit
def row_statistics(
    row,  # pointer to the row's first logit
    stride,
    V,
    target,  # in [0, V)
    slope,
    cap,
    cap_in,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """(logp of the target, entropy in nats, shift, total) of a row: p_j = exp2(u_j * inner - shift) / total."""
    inner = slope * LOG2E
    u_t = capped(tl.load(row + target.to(tl.int64) * stride).to(tl.float32), cap, cap_in, HAS_SOFTCAP)
    # The exponents need something near the largest u to be relative to: that of the row's first tile will do.
    tile = UNROLL * LANES * (128 // row.dtype.element_ty.primitive_bitwidth)
    first_max = row_max(row, stride, tl.minimum(V, tile), cap, cap_in, HAS_SOFTCAP, LANES, UNROLL)
    base = tl.maximum(tl.maximum(u_t, first_max), -1e30)  # finite: a banned token gives exp2(-inf) = 0 and not NaN
    shift = base * inner
    rest, weighted = row_sums(row, stride, V, target, shift, slope, cap, cap_in, HAS_SOFTCAP, ENTROPY, LANES, UNROLL)
    if not (rest < FAR * V):  # unless the largest is far above those
        base = tl.maximum(row_max(row, stride, V, cap, cap_in, HAS_SOFTCAP, LANES, UNROLL), base)
        shift = base * inner
        rest, weighted = row_sums(
            row, stride, V, target, shift, slope, cap, cap_in, HAS_SOFTCAP, ENTROPY, LANES, UNROLL
        )
    d_t = tl.fma(u_t, inner, -shift)
    e_t = tl.exp2(d_t)
    total = rest + e_t
    # shift is a rounded base * inner; what it is off by is taken back here, where it does not cancel.
    log_total = tl.log(total) - LN2 * tl.fma(base, inner, -shift)
    logp = tl.where(u_t >= base, -log1p(rest / e_t), (u_t - base) * slope - log_total)
    entropy = 0.0
    if ENTROPY:
        mean_d = (weighted + e_t * tl.maximum(d_t, LOWEST)) / total
        entropy = LN2 * (tl.log2(total) - mean_d)
    return logp, entropy, shift, total


@triton.jit
def row_gradient(
    row,
    stride,
    out,  # pointer to the row's first gradient; may be the row itself
    out_stride,
    V,
    target,  # in [0, V), or negative for none
    logp,
    entropy,
    shift,
    total,
    d_logp,  # upstream gradient of the log-prob, and of the entropy
    d_entropy,
    slope,
    cap,
    cap_in,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write d_logp * (onehot - p) - d_entropy * p * (log p + entropy), taken back to the logits.

    From the row's end to its beginning, because after ``row_statistics`` the end is what the caches still hold; the
    hints on loads and stores are for the same: the rows being worked on stay, what is done with goes.
    """
    K: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    inner = slope * LOG2E
    # The target's own value, where 1 - p must not be a subtraction.
    at_target = -d_logp * expm1(logp)
    flat = -d_logp
    tilt = 0.0
    if ENTROPY:
        at_target -= d_entropy * tl.exp(logp) * (tl.maximum(logp, LOWEST) + entropy)
        flat -= d_entropy * (entropy - tl.log(total))
        tilt = -d_entropy * LN2
    at_target *= slope
    flat *= slope / total
    tilt *= slope / total
    first = tile_columns(LANES, UNROLL, K)
    tiles = tl.cdiv(V, UNROLL * LANES * K)
    for tile in range(tiles):
        start = (tiles - 1 - tile) * (UNROLL * LANES * K)
        cols = start + first
        x = tl.load(row + cols.to(tl.int64) * stride, mask=cols < V, other=0.0, eviction_policy="evict_first")
        u = capped(x.to(tl.float32), cap, cap_in, HAS_SOFTCAP)
        d = tl.fma(u, inner, -shift)
        grad = tl.exp2(d) * flat
        if ENTROPY:
            grad = tl.exp2(d) * (flat + tilt * tl.maximum(d, LOWEST))
        if (target >= start) & (target < start + UNROLL * LANES * K):
            grad = tl.where(cols == target, at_target, grad)
        if HAS_SOFTCAP:
            t = u / cap
            grad *= cap * cap_in * (1.0 - t * t)
        grad = grad.to(out.dtype.element_ty)
        tl.store(out + cols.to(tl.int64) * out_stride, grad, mask=cols < V, cache_modifier=".cs")


@triton.jit
def row_zero(row, stride, V, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """Write zeros."""
    K: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    first = tile_columns(LANES, UNROLL, K)
    for start in range(0, V, UNROLL * LANES * K):
        cols = start + first
        zeros = tl.zeros([UNROLL, LANES, K], row.dtype.element_ty)
        tl.store(row + cols.to(tl.int64) * stride, zeros, mask=cols < V)
