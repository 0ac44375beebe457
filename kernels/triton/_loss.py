"""The token-level GRPO loss of one row, and what it needs of the row's sequence, group and batch.

The definition is ``grpo_fast.reference``; the names here are its names. Every function takes scalars or blocks alike.
"""

import triton
import triton.language as tl

from grpo_fast.kernels._rows import expm1

# The per-token term ...
CLIPPED = tl.constexpr(0)
CISPO = tl.constexpr(1)
SAPO = tl.constexpr(2)
# ... and what its sum over tokens is divided by.
BY_CONSTANT = tl.constexpr(0)
BY_TOKENS = tl.constexpr(1)  # of the batch
BY_SEQUENCE = tl.constexpr(2)  # the tokens of the sequence, times a constant

BLOCK = tl.constexpr(1024)


@triton.jit
def count_tokens(mask, chosen, start, end):
    """How many of the tokens in [start, end) both masks keep; a mask that is None keeps all."""
    if mask is None and chosen is None:
        return (end - start) * 1.0
    count = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        kept = n < end
        if mask is not None:
            kept &= tl.load(mask + n, mask=kept, other=0) != 0
        if chosen is not None:
            kept &= tl.load(chosen + n, mask=kept, other=0) != 0
        count += kept.to(tl.float32)
    return tl.sum(count, 0)


@triton.jit
def reward_statistics(rewards, start, end):
    """(best, mean relative to the best, std) of the scorable rewards in [start, end); NaN is an unscorable one."""
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        r = tl.load(rewards + i, mask=i < end, other=float("nan")).to(tl.float32)
        best = tl.maximum(best, tl.where(r == r, r, -float("inf")))
    top = tl.max(best, 0)
    # Relative to the best, equal rewards are 0 and stay 0, whatever their sum would round to.
    count = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        r = tl.load(rewards + i, mask=i < end, other=float("nan")).to(tl.float32)
        count += (r == r).to(tl.float32)
        total += tl.where(r == r, r - top, 0.0)
    scorable = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(scorable, 1.0)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        r = tl.load(rewards + i, mask=i < end, other=float("nan")).to(tl.float32)
        deviation = tl.where(r == r, r - top - mean, 0.0)
        squares += deviation * deviation
    std = tl.sqrt_rn(tl.sum(squares, 0) / tl.maximum(scorable - 1.0, 1.0))
    return top, mean, std


@triton.jit
def find_sequence(ends, B, n):
    """The packed sequence that token n belongs to: how many of the B ``ends`` are at most n."""
    past = tl.zeros([BLOCK], tl.int32)
    for first in range(0, B, BLOCK):
        i = first + tl.arange(0, BLOCK)
        past += (tl.load(ends + i, mask=i < B, other=n + 1) <= n).to(tl.int32)
    return tl.sum(past, 0)


@triton.jit
def either(x, y, if_x_less, if_y_less):
    """The derivative of min(x, y), torch's way: half of each where they are equal."""
    return tl.where(x < y, if_x_less, tl.where(y < x, if_y_less, 0.5 * (if_x_less + if_y_less)))


@triton.jit
def token_loss(
    logp,
    old_logp,
    ref_logp,  # used if HAS_KL
    advantage,
    sampler_ratio,
    chosen,  # whether the policy term acts
    low,  # clip bounds of the ratio
    high,
    delta,
    dual_clip,
    beta,
    tau_pos,
    tau_neg,
    TERM: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    HAS_KL: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
):
    """(policy + beta KL, its derivative by logp, KL, ratio, clip) of a token.

    clip is -1 for a ratio below the bounds and a negative advantage, 1 above them and a positive one, else 0.
    """
    ratio = tl.exp(logp - old_logp)
    if TERM == CLIPPED:
        bounded = tl.minimum(ratio, delta)
        x = bounded * advantage
        y = tl.minimum(tl.maximum(ratio, low), high) * advantage
        policy = -tl.minimum(x, y)
        free = (ratio <= delta).to(tl.float32)
        inside = ((ratio >= low) & (ratio <= high)).to(tl.float32)
        d_ratio = -advantage * either(x, y, free, inside)
        if HAS_DUAL_CLIP:
            most = tl.where(advantage < 0, -dual_clip * advantage, float("inf"))
            d_ratio = either(policy, most, d_ratio, 0.0)
            policy = tl.minimum(policy, most)
        d_policy = d_ratio * ratio
        clip = tl.where((bounded < low) & (advantage < 0), -1.0, 0.0)
        clip = tl.where((bounded > high) & (advantage > 0), 1.0, clip)
    elif TERM == CISPO:
        d_policy = -tl.minimum(tl.maximum(ratio, low), high) * advantage
        policy = d_policy * logp
        clip = tl.where((ratio > high) & (advantage > 0), 1.0, 0.0)
    else:
        tau = tl.where(advantage > 0, tau_pos, tau_neg)
        gate = tl.sigmoid(tau * (ratio - 1.0))
        policy = -4.0 * gate / tau * advantage
        d_policy = -4.0 * gate * (1.0 - gate) * advantage * ratio
        clip = 0.0 * ratio
    policy = tl.where(chosen, policy * sampler_ratio, 0.0)
    slope = tl.where(chosen, d_policy * sampler_ratio, 0.0)
    loss = policy
    kl = 0.0 * ratio
    if HAS_KL:
        d = ref_logp - logp
        if KL_ESTIMATOR == "k1":
            kl = -d
            d_kl = 1.0
        elif KL_ESTIMATOR == "k2":
            kl = 0.5 * d * d
            d_kl = -d
        else:
            kl = expm1(d) - d
            d_kl = -expm1(d)
        if BIAS_CORRECTION:
            d_kl = (d_kl + kl) * ratio
            kl *= ratio
        loss += beta * kl
        slope += beta * d_kl
    # Comparisons are deaf to NaN: a ratio that is none must not end as a gradient of 0.
    wrong = (ratio != ratio) & chosen
    return tl.where(wrong, ratio, loss), tl.where(wrong, ratio, slope), kl, ratio, clip
