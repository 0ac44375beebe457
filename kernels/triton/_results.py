"""The loss and the metrics from what the rows left behind: one program, in a fixed order, so that sums repeat."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["B", "T"])
def _grpo_results_kernel(
    results,  # (13,) float32: the loss, then the metrics
    mask,  # per token, as in _grpo_loss_kernel, and so are the next two
    ends,
    entropy_mask,
    entropies,  # per token, what it stored by row
    losses,
    kls,  # None without a KL term
    ratios,
    clips,
    zero_std,  # (B,), None without rewards
    B,
    T,
    entropy_coef,
    ENTROPY_BONUS: tl.constexpr,
    SEQUENCES: tl.constexpr,  # that are taken side by side
    TOKENS: tl.constexpr,
):
    """One program adds the rows up, SEQUENCES of them at a time in pieces of TOKENS, and each place by itself."""
    loss = tl.zeros([SEQUENCES, TOKENS], tl.float32)
    tokens = tl.zeros([SEQUENCES, TOKENS], tl.float32)
    entropy = tl.zeros([SEQUENCES, TOKENS], tl.float32)
    kl = tl.zeros([SEQUENCES, TOKENS], tl.float32)
    ratio = tl.zeros([SEQUENCES, TOKENS], tl.float32)
    largest = tl.full([SEQUENCES, TOKENS], -float("inf"), tl.float32)
    bonus = tl.zeros([SEQUENCES, TOKENS], tl.float32)
    bonus_tokens = tl.zeros([SEQUENCES, TOKENS], tl.float32)
    low = tl.zeros([SEQUENCES], tl.float32)
    high = tl.zeros([SEQUENCES], tl.float32)
    low_min = tl.full([SEQUENCES], float("inf"), tl.float32)
    high_max = tl.full([SEQUENCES], -float("inf"), tl.float32)
    equal = tl.zeros([SEQUENCES], tl.float32)
    for first in range(0, B, SEQUENCES):
        b = first + tl.arange(0, SEQUENCES)
        start = b * T
        end = tl.where(b < B, start + T, 0)
        longest = T
        if ends is not None:
            start = tl.load(ends + b - 1, mask=(b > 0) & (b < B), other=0).to(tl.int32)
            end = tl.load(ends + b, mask=b < B, other=0).to(tl.int32)
            longest = tl.max(tl.where(b < B, end - start, 0), 0)
        if zero_std is not None:
            equal += tl.load(zero_std + b, mask=b < B, other=0.0)
        length = tl.zeros([SEQUENCES, TOKENS], tl.float32)
        clipped_low = tl.zeros([SEQUENCES, TOKENS], tl.float32)
        clipped_high = tl.zeros([SEQUENCES, TOKENS], tl.float32)
        for t in range(0, longest, TOKENS):
            n = start[:, None] + t + tl.arange(0, TOKENS)[None, :]
            kept = n < end[:, None]
            if mask is not None:
                kept &= tl.load(mask + n, mask=kept, other=0) != 0
            length += kept.to(tl.float32)
            h = tl.load(entropies + n, mask=kept, other=0.0)
            entropy += h
            loss += tl.load(losses + n, mask=kept, other=0.0)
            r = tl.load(ratios + n, mask=kept, other=0.0)
            ratio += r
            largest = tl.maximum(largest, tl.where(kept, r, -float("inf")))
            clip = tl.load(clips + n, mask=kept, other=0.0)
            clipped_low += (clip < 0).to(tl.float32)
            clipped_high += (clip > 0).to(tl.float32)
            if kls is not None:
                kl += tl.load(kls + n, mask=kept, other=0.0)
            if ENTROPY_BONUS:
                if entropy_mask is not None:
                    kept &= tl.load(entropy_mask + n, mask=kept, other=0) != 0
                bonus += tl.where(kept, h, 0.0)
                bonus_tokens += kept.to(tl.float32)
        tokens += length
        count = tl.sum(length, 1)
        count_low = tl.sum(clipped_low, 1)
        count_high = tl.sum(clipped_high, 1)
        low += count_low
        high += count_high
        low_min = tl.minimum(low_min, tl.where(count > 0, count_low / count, float("inf")))
        high_max = tl.maximum(high_max, tl.where(count > 0, count_high / count, -float("inf")))

    policy_loss = tl.sum(loss)
    total = policy_loss
    if ENTROPY_BONUS:
        total -= entropy_coef * tl.sum(bonus) / tl.maximum(tl.sum(bonus_tokens), 1.0)
    active = tl.sum(tokens)
    count = tl.maximum(active, 1.0)
    tl.store(results + 0, total)
    tl.store(results + 1, policy_loss)
    tl.store(results + 2, active)
    tl.store(results + 3, tl.sum(entropy) / count)
    tl.store(results + 4, tl.sum(kl) / count)
    mean_ratio = tl.sum(ratio) / count
    tl.store(results + 5, mean_ratio)
    tl.store(results + 6, tl.where(mean_ratio == mean_ratio, tl.max(largest), mean_ratio))  # a maximum is deaf to NaN
    tl.store(results + 7, tl.sum(low, 0) / count)
    tl.store(results + 8, tl.where(active > 0, tl.min(low_min, 0), float("nan")))
    tl.store(results + 9, tl.sum(high, 0) / count)
    tl.store(results + 10, tl.where(active > 0, tl.max(high_max, 0), float("nan")))
    tl.store(results + 11, (tl.sum(low, 0) + tl.sum(high, 0)) / count)
    tl.store(results + 12, tl.sum(equal, 0) / tl.maximum(B * 1.0, 1.0))


def sum_rows(
    results: torch.Tensor,
    rows: tuple[torch.Tensor, ...],
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    entropy_mask: torch.Tensor | None,
    zero_std: torch.Tensor | None,
    B: int,
    T: int,
    has_kl: bool,
    entropy_coef: float,
) -> None:
    """Write loss and metrics to ``results`` (13,), from ``rows`` as ``grpo_loss_rows`` left them.

    The rows of B sequences are T apart, or packed by ``cu_seqlens``.
    """
    _, entropies, losses, kls, ratios, clips = rows
    sequences = min(16, triton.next_power_of_2(max(B, 1)))
    _grpo_results_kernel[(1,)](
        results,
        mask,
        None if cu_seqlens is None else cu_seqlens[1:],
        entropy_mask,
        entropies,
        losses,
        kls if has_kl else None,
        ratios,
        clips,
        zero_std,
        B,
        T,
        entropy_coef,
        ENTROPY_BONUS=entropy_coef != 0.0,
        SEQUENCES=sequences,
        TOKENS=2048 // sequences,
        num_warps=8,
    )
