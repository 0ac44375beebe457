"""The token-level GRPO loss over logits: one launch for loss terms and gradient, a small one for the sums.

Data flow, a row at a time: logits -> row_statistics -> logp, entropy -> token_loss (with the advantage of the row's
group) -> d loss / d logp -> row_gradient -> gradient of the logits. What a row adds to the loss and the metrics is
stored by row; the second kernel adds it up in a fixed order.

Two or four programs run on each SM and take every so-many-th row. They read a row twice, the second time backwards,
when what was read last is still in the caches.
"""

import torch
import triton
import triton.language as tl

from grpo_fast.kernels._loss import (
    BY_CONSTANT,
    BY_SEQUENCE,
    BY_TOKENS,
    CISPO,
    CLIPPED,
    SAPO,
    count_tokens,
    find_sequence,
    reward_statistics,
    token_loss,
)
from grpo_fast.kernels._rows import row_gradient, row_statistics, row_zero
from grpo_fast.kernels.selective_log_softmax import logits_arguments

# Threads of a program, the 16-byte loads that each makes at a time, and programs on an SM: every thread that fits,
# which is what the limit on registers is for, on as few rows as that allows, so that they stay in the caches. Rows
# that fill a cache less leave room for more of them, and with more of them fewer threads wait at a row's end.
LONG_ROWS = {"LANES": 1024, "UNROLL": 2, "num_warps": 32, "maxnreg": 32}
SHORT_ROWS = {"LANES": 512, "UNROLL": 2, "num_warps": 16, "maxnreg": 32}
SHORT = 160 * 1024  # bytes

TERMS = {"clipped": CLIPPED, "cispo": CISPO, "sapo": SAPO}
REDUCTIONS = {"tokens": BY_TOKENS, "sequence_tokens": BY_SEQUENCE}


# T and the numbers of rows and sequences change with every batch: compiled for none of their values.
@triton.jit(do_not_specialize=["B", "T", "N", "group_size"])
def _grpo_loss_kernel(
    # inputs; a tensor that is None is left out when the kernel is compiled
    logits,  # (B, T, V), any strides; (1, N, V) if packed
    completion_ids,  # per token: (N,), N = B T
    mask,  # per token
    ends,  # (B,) where each packed sequence ends; None if padded
    advantages,  # per token or (B,)
    rewards,  # (B,), in place of advantages; NaN is unscorable
    old_logps,  # per token, these three
    ref_logps,
    entropy_mask,
    sampler_ratio,  # per token or (B,)
    entropy_threshold,  # scalar
    num_items,  # scalar
    token_weights,  # per token float32, in place of what REDUCTION says
    entropy_items,  # scalar that the entropy bonus is divided by, in place of counting
    # outputs
    out,  # like logits, and may be the logits; None for no gradient
    logps,  # (N,) float32, the rest
    entropies,
    losses,
    kls,
    ratios,
    clips,
    zero_std,  # (B,) float32
    # sizes and strides
    B,
    T,  # rows that lie stride_t apart
    N,
    V,
    group_size,
    stride_b,
    stride_t,
    stride_v,
    out_stride_b,
    out_stride_t,
    out_stride_v,
    # options
    slope,
    cap,
    cap_in,
    divisor,
    low,
    high,
    delta,
    dual_clip,
    beta,
    tau_pos,
    tau_neg,
    entropy_coef,
    HAS_SOFTCAP: tl.constexpr,
    TERM: tl.constexpr,
    REDUCTION: tl.constexpr,
    SCALE_REWARDS: tl.constexpr,
    PER_TOKEN_ADVANTAGES: tl.constexpr,
    PER_TOKEN_SAMPLER_RATIO: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    HAS_KL: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)

    # What concerns the whole batch.
    weight = 1.0 / divisor
    if num_items is not None:
        weight = 1.0 / tl.maximum(tl.load(num_items).to(tl.float32), 1.0)
    if REDUCTION == BY_TOKENS:
        last = N
        if ends is not None:
            last = tl.load(ends + B - 1).to(tl.int32)
        weight = 1.0 / tl.maximum(count_tokens(mask, None, 0, last), 1.0)
    d_entropy = 0.0
    if ENTROPY_BONUS:
        if entropy_items is not None:
            d_entropy = -entropy_coef / tl.load(entropy_items).to(tl.float32)
        else:
            last = N
            if ends is not None:
                last = tl.load(ends + B - 1).to(tl.int32)
            d_entropy = -entropy_coef / tl.maximum(count_tokens(mask, entropy_mask, 0, last), 1.0)
    spread = 1.0
    if rewards is not None:
        if SCALE_REWARDS == "batch":
            _, _, std = reward_statistics(rewards, 0, B)
            spread = std + 1e-4
        for b in range(program, B, programs):
            group = b // group_size * group_size
            _, _, std = reward_statistics(rewards, group, group + group_size)
            tl.store(zero_std + b, (std <= 1e-8).to(tl.float32))

    sequence = -1
    advantage = 0.0
    sequence_weight = weight
    for n in range(program, N, programs):
        kept = n >= 0
        b = n // T
        start = b * T
        end = start + T
        if ends is not None:
            b = find_sequence(ends, B, n)
            kept = b < B
            b = tl.minimum(b, B - 1)
            end = tl.load(ends + b).to(tl.int32)
            start = tl.load(ends + b - 1, mask=b > 0, other=0).to(tl.int32)
        if mask is not None:
            kept &= tl.load(mask + n) != 0
        position = tl.cast(n, tl.int64)
        row = logits + (position // T) * stride_b + (position % T) * stride_t
        if kept:
            # What concerns the sequence, unless the row before was of the same one.
            if b != sequence:
                sequence = b
                if REDUCTION == BY_SEQUENCE:
                    sequence_weight = weight / tl.maximum(count_tokens(mask, None, start, end), 1.0)
                if rewards is not None:
                    group = b // group_size * group_size
                    best, mean, std = reward_statistics(rewards, group, group + group_size)
                    if SCALE_REWARDS == "group":
                        spread = std + 1e-4
                    reward = tl.load(rewards + b).to(tl.float32)
                    advantage = tl.where(reward == reward, (reward - best - mean) / spread, 0.0)
            if rewards is None:
                advantage = tl.load(advantages + (n if PER_TOKEN_ADVANTAGES else b)).to(tl.float32)
            if token_weights is not None:
                sequence_weight = tl.load(token_weights + n)

            target = tl.load(completion_ids + n)
            inside = (target >= 0) & (target < V)
            logp, entropy, shift, total = row_statistics(
                row,
                stride_v,
                V,
                tl.where(inside, target, 0).to(tl.int32),
                slope,
                cap,
                cap_in,
                HAS_SOFTCAP,
                True,
                LANES,
                UNROLL,
            )
            logp = tl.where(inside, logp, float("nan"))

            old_logp = logp
            if old_logps is not None:
                old_logp = tl.load(old_logps + n).to(tl.float32)
            ref_logp = 0.0
            if HAS_KL:
                ref_logp = tl.load(ref_logps + n).to(tl.float32)
            correction = 1.0
            if sampler_ratio is not None:
                correction = tl.load(sampler_ratio + (n if PER_TOKEN_SAMPLER_RATIO else b)).to(tl.float32)
            chosen = n >= 0
            if entropy_mask is not None:
                chosen = tl.load(entropy_mask + n) != 0
            if entropy_threshold is not None:
                chosen = entropy >= tl.load(entropy_threshold).to(tl.float32)
            loss, d_logp, kl, ratio, clip = token_loss(
                logp,
                old_logp,
                ref_logp,
                advantage,
                correction,
                chosen,
                low,
                high,
                delta,
                dual_clip,
                beta,
                tau_pos,
                tau_neg,
                TERM,
                HAS_DUAL_CLIP,
                HAS_KL,
                KL_ESTIMATOR,
                BIAS_CORRECTION,
            )
            tl.store(logps + n, logp)
            tl.store(entropies + n, entropy)
            tl.store(losses + n, loss * sequence_weight)
            tl.store(ratios + n, ratio)
            tl.store(clips + n, clip)
            if HAS_KL:
                tl.store(kls + n, kl)
            d_logp = tl.where(inside, d_logp * sequence_weight, 0.0)
            d_row = tl.where(chosen, d_entropy, 0.0)
            if out is not None:
                out_row = out + (position // T) * out_stride_b + (position % T) * out_stride_t
                if (d_logp != 0.0) | (d_row != 0.0):
                    row_gradient(
                        row,
                        stride_v,
                        out_row,
                        out_stride_v,
                        V,
                        tl.where(inside, target, -1).to(tl.int32),
                        logp,
                        entropy,
                        shift,
                        total,
                        d_logp,
                        d_row,
                        slope,
                        cap,
                        cap_in,
                        HAS_SOFTCAP,
                        ENTROPY_BONUS,
                        LANES,
                        UNROLL,
                    )
                else:
                    row_zero(out_row, out_stride_v, V, LANES, UNROLL)
        else:
            tl.store(logps + n, 0.0)
            tl.store(entropies + n, 0.0)
            if out is not None:
                out_row = out + (position // T) * out_stride_b + (position % T) * out_stride_t
                row_zero(out_row, out_stride_v, V, LANES, UNROLL)


def programs_on(device: torch.device, lanes: int) -> int:
    """How many programs run at a time; a few in the interpreter."""
    if device.type != "cuda":
        return 3
    gpu = torch.cuda.get_device_properties(device)
    return gpu.max_threads_per_multi_processor // lanes * gpu.multi_processor_count


def grpo_loss_rows(
    rows: tuple[torch.Tensor, ...],
    zero_std: torch.Tensor | None,
    out: torch.Tensor | None,
    logits: torch.Tensor,
    completion_ids: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    advantages: torch.Tensor | None,
    rewards: torch.Tensor | None,
    old_logps: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    entropy_mask: torch.Tensor | None,
    sampler_ratio: torch.Tensor | None,
    entropy_threshold: torch.Tensor | None,
    num_items: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    entropy_items: torch.Tensor | None,
    *,
    group_size: int,
    divisor: float,
    term: str,
    reduction: str,
    low: float,
    high: float,
    delta: float | None,
    dual_clip: float | None,
    beta: float,
    kl_estimator: str,
    bias_correction: bool,
    tau_pos: float,
    tau_neg: float,
    entropy_coef: float,
    scale_rewards: str,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Write what each row leaves behind to ``rows``, and the gradient of the logits to ``out`` unless that is None.

    ``rows`` are logps, entropies, weighted losses, KL, ratios and clips: (N,) float32 each. A masked row writes the
    first two only, as 0. ``zero_std`` (B,) float32 says whose rewards' group has no spread, if there are rewards.
    ``logits`` and ``out``, which may be the same, are (B, T, V) or, packed, (1, N, V), with any strides; the other
    tensors are contiguous. ``term`` is "clipped", "cispo" or "sapo". The sum over tokens is divided by ``divisor``,
    by ``num_items``, or, as ``reduction`` says, by the "tokens" of the batch or the "sequence_tokens", each
    sequence's own times ``divisor``; ``token_weights`` (N,) float32 take the place of all that. ``entropy_items``
    is what the entropy bonus is divided by, in place of the tokens that count.
    """
    T, V = logits.shape[-2:]
    N = completion_ids.numel()
    B = logits.size(0) if cu_seqlens is None else cu_seqlens.numel() - 1
    shape = SHORT_ROWS if V * logits.element_size() <= SHORT else LONG_ROWS
    programs = programs_on(logits.device, shape["LANES"])
    _grpo_loss_kernel[(max(min(N, programs), 1),)](
        logits,
        completion_ids,
        mask,
        None if cu_seqlens is None else cu_seqlens[1:],
        advantages,
        rewards,
        old_logps,
        ref_logps,
        entropy_mask,
        sampler_ratio,
        entropy_threshold,
        num_items,
        token_weights,
        entropy_items,
        out,
        *rows,
        zero_std,
        B,
        T,
        N,
        V,
        group_size,
        *logits.stride(),
        *(logits if out is None else out).stride(),
        **logits_arguments(temperature, logit_scale, softcap),
        divisor=divisor,
        low=low,
        high=high,
        delta=float("inf") if delta is None else delta,
        dual_clip=1.0 if dual_clip is None else dual_clip,
        beta=beta,
        tau_pos=tau_pos,
        tau_neg=tau_neg,
        entropy_coef=entropy_coef,
        HAS_SOFTCAP=softcap is not None,
        TERM=TERMS[term],
        REDUCTION=REDUCTIONS.get(reduction, BY_CONSTANT),
        SCALE_REWARDS=scale_rewards,
        PER_TOKEN_ADVANTAGES=advantages is not None and advantages.shape == completion_ids.shape,
        PER_TOKEN_SAMPLER_RATIO=sampler_ratio is not None and sampler_ratio.shape == completion_ids.shape,
        HAS_DUAL_CLIP=dual_clip is not None,
        HAS_KL=beta != 0.0,
        KL_ESTIMATOR=kl_estimator,
        BIAS_CORRECTION=bias_correction,
        ENTROPY_BONUS=entropy_coef != 0.0,
        **shape,
    )
