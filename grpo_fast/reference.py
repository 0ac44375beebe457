"""The specification: every quantity grpo_fast computes, in plain PyTorch.

One definition of the loss math. Kernels are tested against this file, and this file against TRL's own
``GRPOTrainer``. It is also the CPU path (``impl="torch"``): differentiable by autograd, in float32 for half
precision inputs and in the inputs' own precision otherwise.

The data flow, top to bottom in this file::

    logits ----------------> logps_and_entropy_ref --+
    hidden, weight --------> linear_logps_ref -------+--> grpo_loss_ref --> loss, metrics
    rewards ---------------> group_advantages_ref ---+

Shapes: B sequences of T tokens, V the vocabulary, H the hidden size. Per-token tensors are padded (B, T) or
packed (N,); ``Sequences`` is the only code that knows which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_fast.config import CLIPPED_LOSSES, GRPOLossConfig

#: Elements of a chunk's logits when they are computed from hidden states: 2**24 float32 values are 64 MiB.
CHUNK_ELEMENTS = 2**24
#: Powers of two by which elements of a gradient that is to be sparse are told apart.
SPARSE_POWERS = 16
#: And how many times the tolerance a row's error may come to.
SPARSE_MOST_ERROR = 4.0


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 when an input is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# Log-probabilities and entropy ---------------------------------------------------------------------------------


def scaled_logits(logits: Tensor, temperature: float, logit_scale: float, softcap: float | None) -> Tensor:
    """The exponents of the softmax: scale, then softcap, then temperature."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def logps_and_entropy_ref(
    logits: Tensor,
    index: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of ``index`` (...,) and the entropy in nats under softmax(``logits`` (..., V)).

    An index outside [0, V) gives NaN; positions where ``mask`` (...,) is 0 give 0 and no gradient, whatever
    they hold. A logit of -inf is a banned token: probability 0, no gradient, nothing added to the entropy. With
    ``label_smoothing`` s the log-prob becomes (1 - s) logp + s times the mean log-prob of all V tokens.
    """
    z = logits.to(accumulation_dtype(logits))
    if mask is not None:
        z = z.masked_fill(~mask.bool().unsqueeze(-1), 0.0)
    log_p = torch.log_softmax(scaled_logits(z, temperature, logit_scale, softcap), dim=-1)
    inside = (index >= 0) & (index < logits.size(-1))
    logps = log_p.gather(-1, torch.where(inside, index, 0).long().unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        logps = (1 - label_smoothing) * logps + label_smoothing * log_p.mean(-1)
    logps = torch.where(inside, logps, torch.nan)
    # 0 log 0 = 0, in the gradient too: the -inf is replaced before it meets a product.
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    if mask is not None:
        logps, entropy = (torch.where(mask.bool(), x, 0.0) for x in (logps, entropy))
    return logps, entropy


def map_rows(
    fn: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], mask: Tensor | None, chunk_rows: int
) -> tuple[Tensor, ...]:
    """Apply ``fn`` to chunks of the rows that ``mask`` (N,) keeps; 0 for the others.

    ``rows`` are tensors with N rows each. ``fn`` gets ``chunk_rows`` of them at a time and returns vectors; what
    it builds in between is recomputed in the backward, so memory is that of one chunk.
    """
    # Under torch.compile the number of kept rows is unknown, so every row is computed and the mask applied after.
    kept = None if mask is None or torch.compiler.is_compiling() else mask.bool().nonzero().squeeze(-1)
    if kept is not None:
        rows = tuple(r.index_select(0, kept) for r in rows)
    elif mask is not None:
        rows = tuple(r.masked_fill(~mask.bool().view(-1, *[1] * (r.dim() - 1)), 0) for r in rows)
    chunks = zip(*(r.split(chunk_rows) for r in rows), strict=True)
    parts = [checkpoint(fn, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    outputs = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    if mask is None:
        return outputs
    if kept is None:
        return tuple(torch.where(mask.bool(), x, 0.0) for x in outputs)
    return tuple(x.new_zeros(mask.numel()).index_copy(0, kept, x) for x in outputs)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits (n, V) of ``hidden`` (n, H) in the precision of ``weight``, whatever autocast says."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(weight.dtype), weight, bias)


def linear_logps_ref(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``logps_and_entropy_ref`` of the logits ``hidden`` (..., H) @ ``weight`` (V, H)^T + ``bias`` (V,).

    The logits are never whole in memory, and rows that ``mask`` drops are not projected.
    """
    dtype = accumulation_dtype(hidden, weight)
    w = weight.to(dtype)
    b = None if bias is None else bias.to(dtype)

    def chunk(h: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return logps_and_entropy_ref(
            project(h, w, b),
            ids,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            label_smoothing=label_smoothing,
        )

    logps, entropy = map_rows(
        chunk,
        (hidden.reshape(-1, hidden.size(-1)), index.reshape(-1)),
        None if mask is None else mask.reshape(-1),
        chunk_rows or max(1, CHUNK_ELEMENTS // weight.size(0)),
    )
    return logps.view(index.shape), entropy.view(index.shape)


# Sequences and advantages --------------------------------------------------------------------------------------


class Sequences:
    """How per-token values belong to sequences: padded (B, T), or packed (N,) with ``cu_seqlens`` (B + 1,).

    Attributes:
        mask: bool, the shape of a per-token tensor; True where a token counts.
        count: Number of sequences B.
        lengths: (B,) float, tokens that count in each sequence.
        width: The padded length T; None when packed.
    """

    def __init__(self, ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype) -> None:
        self.mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.count = ids.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        self.width = ids.shape[1] if cu_seqlens is None else None
        self._owner = None
        if cu_seqlens is not None:
            rows = torch.arange(ids.numel(), device=ids.device)
            owner = torch.searchsorted(cu_seqlens[1:].to(rows.dtype), rows, right=True)
            self.mask = self.mask & (owner < self.count)  # rows past the last sequence are padding
            self._owner = owner.clamp(max=max(self.count - 1, 0))
        self.dtype = dtype
        self.lengths = self.mask.sum(-1, dtype=dtype) if cu_seqlens is None else self.sum(self.mask.to(dtype))

    def sum(self, x: Tensor) -> Tensor:
        """Sum of a per-token tensor over each sequence's tokens that count: (B,)."""
        x = torch.where(self.mask, x, 0.0)
        if self._owner is None:
            return x.sum(-1)
        return x.new_zeros(self.count).index_add(0, self._owner, x)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of a per-token tensor over each sequence's tokens that count: (B,); 0 where there are none."""
        return self.sum(x) / self.lengths.clamp(min=1.0)

    def total(self, x: Tensor) -> Tensor:
        """Sum of a per-token tensor over all tokens that count: a scalar."""
        return torch.where(self.mask, x, 0.0).sum()

    def spread(self, x: Tensor) -> Tensor:
        """Give each token its sequence's value of ``x`` (B,)."""
        return x.unsqueeze(-1).expand_as(self.mask) if self._owner is None else x[self._owner]

    def is_per_token(self, x: Tensor) -> bool:
        """Whether ``x`` has a value a token, rather than one a sequence as (B,) or (B, 1)."""
        return x.shape == self.mask.shape

    def per_token(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """``x`` of shape (B,), (B, 1) or per token, as a per-token tensor with ``fill`` where nothing counts."""
        rows = x if self.is_per_token(x) else self.spread(x.reshape(self.count))
        return torch.where(self.mask, rows.to(self.dtype), fill)


def group_advantages_ref(
    rewards: Tensor, *, group_size: int | None = None, group_ids: Tensor | None = None, scale: str = "group"
) -> tuple[Tensor, Tensor]:
    """Group-relative advantages (B,) of ``rewards`` (B,), and whether each one's group has no spread (B,) bool.

    A = (r - mean_group r) / (std + 1e-4), std with Bessel's correction over the group or the batch, or A without
    the division. Groups are runs of ``group_size`` or equal ``group_ids``. A NaN reward is unscorable: left out
    of mean and std, advantage 0. Groups of equal rewards get exactly 0 (DeepSeekMath, arXiv 2402.03300, 4.1.2).
    """
    r = rewards.to(accumulation_dtype(rewards))
    scorable = ~torch.isnan(r)

    def over_group(x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        """Reduce each member's group (last axis) and give the result to the member. x: (B,) -> (B,)."""
        if group_ids is None:
            assert group_size is not None
            groups = x.view(-1, group_size)
            return reduce(groups, -1).unsqueeze(-1).expand_as(groups).reshape(-1)
        neutral = -torch.inf if reduce is torch.amax else 0.0
        return reduce(torch.where(group_ids[:, None] == group_ids[None, :], x, neutral), -1)

    if r.numel() == 0:
        return r, torch.zeros_like(scorable)
    # Rewards are taken relative to the group's best first, so that equal rewards cancel exactly in any dtype.
    best = over_group(torch.where(scorable, r, -torch.inf), torch.amax)
    relative = torch.where(scorable, r - best, 0.0)
    count = over_group(scorable.to(r.dtype), torch.sum)
    deviation = torch.where(scorable, relative - over_group(relative, torch.sum) / count.clamp(min=1.0), 0.0)
    group_std = (over_group(deviation.square(), torch.sum) / (count - 1).clamp(min=1.0)).sqrt()
    if scale == "group":
        advantages = deviation / (group_std + 1e-4)
    elif scale == "batch":
        mean = torch.where(scorable, r, 0.0).sum() / scorable.sum().clamp(min=1)
        squares = torch.where(scorable, r - mean, 0.0).square().sum()
        advantages = deviation / ((squares / (scorable.sum() - 1).clamp(min=1)).sqrt() + 1e-4)
    else:
        advantages = deviation
    return advantages, group_std <= 1e-8


# The loss ------------------------------------------------------------------------------------------------------


def kl_ref(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference): k1, k2 or k3 (Schulman, "Approximating KL divergence")."""
    d = ref_logps - logps
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return torch.expm1(d) - d  # exp(d) - d - 1 without the cancellation


def _clipped_term(ratio: Tensor, advantages: Tensor, config: GRPOLossConfig) -> Tensor:
    clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.clip_high)
    bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
    term = -torch.min(bounded * advantages, clipped * advantages)
    if config.dual_clip is not None:
        term = torch.where(advantages < 0, torch.min(term, -config.dual_clip * advantages), term)
    return term


def _cispo_weight(ratio: Tensor, config: GRPOLossConfig) -> Tensor:
    if config.cispo_bounds == "absolute":
        return ratio.clamp(max=config.clip_high).detach()
    return ratio.clamp(1 - config.epsilon_low, 1 + config.clip_high).detach()


def _sapo_term(ratio: Tensor, advantages: Tensor, config: GRPOLossConfig) -> Tensor:
    tau = torch.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def _vespo_weight(
    log_ratio: Tensor,
    advantages: Tensor,
    sampler_ratio: Tensor | None,
    sequences: Sequences,
    config: GRPOLossConfig,
) -> Tensor:
    """phi = exp(lambda + k log w - lambda w), w the ratio of the whole sequence: detached, per token."""
    floor = math.log(1e-8)
    log_w = sequences.sum(log_ratio.detach().clamp(-20.0, 20.0))
    if sampler_ratio is not None:
        log_sampler = sampler_ratio.to(log_w.dtype).log().clamp(floor, 20.0)
        per_token = sequences.is_per_token(sampler_ratio)
        log_w = log_w + (sequences.sum(log_sampler) if per_token else log_sampler.reshape(-1))
    log_w = sequences.spread(log_w.clamp(floor, 20.0))
    positive = advantages >= 0
    k = torch.where(positive, config.vespo_k_pos, config.vespo_k_neg)
    decay = torch.where(positive, config.vespo_lambda_pos, config.vespo_lambda_neg).clamp(min=1e-4)
    return torch.exp(decay + k * log_w - decay * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def token_weights(sequences: Sequences, num_items: float | Tensor | None, c: GRPOLossConfig) -> Tensor:
    """What each token's term is multiplied by in the sum over all tokens: a scalar, or per token."""
    one = sequences.lengths.new_ones(())
    count = max(sequences.count, 1)  # an empty batch has loss 0
    if c.loss_type in ("grpo", "sapo"):
        return sequences.spread(one / (sequences.lengths.clamp(min=1.0) * count))
    if c.loss_type == "luspo":
        return one / count
    if c.loss_type == "dr_grpo":
        length = sequences.width if c.max_completion_length is None else c.max_completion_length
        assert length is not None  # the ops refuse packed input without it
        return one / (count * max(length, 1))
    if c.loss_type == "bnpo" or num_items is None:
        return one / sequences.lengths.sum().clamp(min=1.0)
    if isinstance(num_items, Tensor):
        return one / num_items.to(one.dtype).clamp(min=1.0)
    return one / max(float(num_items), 1.0)


def grpo_loss_ref(
    logps: Tensor,
    entropy: Tensor,
    sequences: Sequences,
    *,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    config: GRPOLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO loss (a scalar) and its metrics from per-token log-probs and entropies.

    The order of the terms is that of TRL 1.16: policy term, off-policy mask, entropy mask, rollout correction,
    plus beta KL, reduction, minus the entropy bonus. Arguments are those of ``grpo_fast.grpo_loss``.
    """
    c = config
    logps, entropy = sequences.per_token(logps), sequences.per_token(entropy)
    adv = sequences.per_token(advantages)
    old = logps.detach() if old_logps is None else sequences.per_token(old_logps)

    log_ratio = logps - old
    if c.importance_sampling_level == "sequence":
        ratio = sequences.spread(sequences.mean(log_ratio).exp())
    else:
        ratio = log_ratio.exp()

    if c.loss_type in CLIPPED_LOSSES:
        policy = _clipped_term(ratio, adv, c)
    elif c.loss_type == "cispo":
        policy = -_cispo_weight(ratio, c) * adv * logps
    elif c.loss_type == "sapo":
        policy = _sapo_term(ratio, adv, c)
    else:
        phi = _vespo_weight(log_ratio, adv, importance_sampling_ratio, sequences, c)
        policy = -phi * adv * logps

    if c.off_policy_mask_threshold is not None:
        sampling = old if sampling_logps is None else sequences.per_token(sampling_logps)
        drift = sequences.mean((sampling - logps.detach()).nan_to_num(nan=0.0))
        policy = policy * ((adv >= 0) | (sequences.spread(drift) <= c.off_policy_mask_threshold))
    chosen = sequences.mask
    if entropy_threshold is not None:
        chosen = chosen & (entropy.detach() >= entropy_threshold)
    if entropy_mask is not None:
        chosen = chosen & entropy_mask.bool()
    if chosen is not sequences.mask:
        policy = torch.where(chosen, policy, 0.0)
    if importance_sampling_ratio is not None and c.loss_type != "vespo":
        policy = policy * sequences.per_token(importance_sampling_ratio, 1.0)

    per_token = policy
    kl = None
    if c.beta != 0.0:
        assert ref_logps is not None  # the ops refuse a beta without them
        kl = kl_ref(logps, sequences.per_token(ref_logps), c.kl_estimator)
        if c.use_bias_correction_kl:
            kl = kl * ratio
        per_token = policy + c.beta * kl

    policy_loss = sequences.total(per_token * token_weights(sequences, num_items_in_batch, c))
    loss = policy_loss
    if c.entropy_coef != 0.0:
        bonus = torch.where(chosen, entropy, 0.0).sum() / chosen.sum().clamp(min=1)
        loss = loss - c.entropy_coef * bonus

    with torch.no_grad():
        one_a_sequence = not sequences.is_per_token(advantages)
        metrics = _metrics(ratio, adv, entropy, kl, sequences, c, one_a_sequence)
        metrics["policy_loss"] = policy_loss.detach()
        if c.loss_type == "vespo":
            metrics["vespo/phi_seq_mean"] = _average(phi, sequences, one_a_sequence)
    return loss, metrics


def _average(x: Tensor, sequences: Sequences, per_sequence: bool) -> Tensor:
    """Mean over tokens, or over sequences for what has one value a sequence."""
    if per_sequence:
        return sequences.mean(x).sum() / max(sequences.count, 1)
    return sequences.total(x) / sequences.lengths.sum().clamp(min=1.0)


def _metrics(
    ratio: Tensor,
    adv: Tensor,
    entropy: Tensor,
    kl: Tensor | None,
    sequences: Sequences,
    c: GRPOLossConfig,
    one_a_sequence: bool,
) -> dict[str, Tensor]:
    """Scalars under TRL's names. ``one_a_sequence``: the advantages have one value a sequence."""
    has_tokens = sequences.lengths > 0

    def extreme(x: Tensor, reduce: Callable[[Tensor], Any], empty: float) -> Tensor:
        """The smallest or largest of the sequences' means; NaN when no sequence has a token."""
        padded = torch.cat([torch.where(has_tokens, sequences.mean(x), empty), x.new_full((1,), empty)])
        return torch.where(has_tokens.any(), reduce(padded), torch.nan)

    per_sequence = c.importance_sampling_level == "sequence"
    bounded = ratio if c.delta is None else ratio.clamp(max=c.delta)
    largest = torch.where(sequences.mask, ratio, -torch.inf)
    metrics = {
        "entropy": _average(entropy, sequences, per_sequence=False),
        "num_active_tokens": sequences.lengths.sum(),
        "ratio/mean": _average(ratio, sequences, per_sequence),
        "ratio/max": torch.cat([largest.reshape(-1), ratio.new_full((1,), -torch.inf)]).max(),
    }
    if kl is not None:
        metrics["kl"] = _average(kl, sequences, per_sequence=False)
    if c.loss_type in CLIPPED_LOSSES:
        low = ((bounded < 1 - c.epsilon_low) & (adv < 0)).to(ratio.dtype)
        high = ((bounded > 1 + c.clip_high) & (adv > 0)).to(ratio.dtype)
        metrics["clip_ratio/low_mean"] = _average(low, sequences, per_sequence and one_a_sequence)
        metrics["clip_ratio/low_min"] = extreme(low, torch.min, torch.inf)
        metrics["clip_ratio/high_mean"] = _average(high, sequences, per_sequence and one_a_sequence)
        metrics["clip_ratio/high_max"] = extreme(high, torch.max, -torch.inf)
        metrics["clip_ratio/region_mean"] = _average(low + high, sequences, per_sequence and one_a_sequence)
    elif c.loss_type == "cispo":
        bound = c.clip_high if c.cispo_bounds == "absolute" else 1 + c.clip_high
        clipped = ((ratio > bound) & (adv > 0)).to(ratio.dtype)
        metrics["cispo_clip_ratio"] = _average(clipped, sequences, per_sequence and one_a_sequence)
    return metrics


# Distillation --------------------------------------------------------------------------------------------------


def divergence_ref(student_log_p: Tensor, teacher_log_p: Tensor, beta: float) -> Tensor:
    """Generalized Jensen-Shannon divergence of each row, in nats (GKD, arXiv 2306.13649, section 2).

    ``beta`` 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher); between them
    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student. (..., V) -> (...).
    """

    def kl(p: Tensor, q: Tensor) -> Tensor:
        impossible = p == -torch.inf  # 0 log 0 = 0
        return (p.exp() * (p.masked_fill(impossible, 0.0) - q.masked_fill(impossible, 0.0))).sum(-1)

    if beta == 0.0:
        return kl(teacher_log_p, student_log_p)
    if beta == 1.0:
        return kl(student_log_p, teacher_log_p)
    # Where neither is possible, the gradient of a mixture of -inf would be NaN.
    neither = (student_log_p == -torch.inf) & (teacher_log_p == -torch.inf)
    s, t = (x.masked_fill(neither, 0.0) for x in (student_log_p, teacher_log_p))
    mixture = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
    return beta * kl(teacher_log_p, mixture) + (1 - beta) * kl(student_log_p, mixture)


def linear_divergence_ref(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """``divergence_ref`` per token (...,) from both models' hidden states; no gradient to the teacher."""
    dtype = accumulation_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    ws, wt = student_weight.to(dtype), teacher_weight.detach().to(dtype)
    bs, bt = (None if b is None else b.to(dtype) for b in (student_bias, teacher_bias))

    def chunk(hs: Tensor, ht: Tensor) -> tuple[Tensor]:
        zs = scaled_logits(project(hs, ws, bs), temperature, student_logit_scale, student_softcap)
        with torch.no_grad():
            zt = scaled_logits(project(ht, wt, bt), temperature, teacher_logit_scale, teacher_softcap)
        return (divergence_ref(torch.log_softmax(zs, -1), torch.log_softmax(zt, -1), beta),)

    (divergence,) = map_rows(
        chunk,
        (
            student_hidden.reshape(-1, student_hidden.size(-1)),
            teacher_hidden.reshape(-1, teacher_hidden.size(-1)),
        ),
        None if mask is None else mask.reshape(-1),
        chunk_rows or max(1, CHUNK_ELEMENTS // (2 * student_weight.size(0))),
    )
    return divergence.view(student_hidden.shape[:-1])


# Sparse gradients ------------------------------------------------------------------------------------------------


def sparse_rows_ref(
    gradient: Tensor, at_target: Tensor, usual: float | Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """From which size on ``sparse_grad_tol`` keeps elements of rows of the logits' gradient.

    An element as large as the threshold is kept. A smaller one, x, is left out of the gradients of head and bias. For
    the hidden states it is raised to the threshold t with the probability |x| / t, else dropped: on average it is
    what it was, with the variance |x| (t - |x|). So the square of either error, as expected, is at most t times the
    sum of what is smaller. One threshold for all rows makes the most of it. It is the largest of ``usual`` times 2^-k
    with which that is at most the square of ``tolerance`` times the norm of the sampled tokens' elements, and so of
    the gradient; and t itself, and so any element's error, at most ``tolerance`` times ``usual``. A row whose own
    error would come to ``SPARSE_MOST_ERROR`` times as much has a smaller threshold; of a row r > 1 times as large as
    usual, sqrt(r) times that.

    Args:
        gradient: (n, V) float.
        at_target: (n,) the sampled tokens' elements of it.
        usual: A scalar, how large those are in the root mean square over the rows that are taken together.

    Returns:
        The thresholds (n,), and for which rows (n,) bool the powers of two that are tried are enough.
    """
    usual = float(usual)
    relative = gradient.abs() / usual
    powers = (-torch.frexp(relative).exponent).clamp(min=0).where(relative > 0, SPARSE_POWERS)
    sums = relative.new_zeros(len(relative), SPARSE_POWERS + 1)
    sums.scatter_add_(1, powers.clamp(max=SPARSE_POWERS).long(), relative)
    below = sums.flip(1).cumsum(1).flip(1)  # of each power, what is smaller
    tried = 2.0 ** -torch.arange(SPARSE_POWERS + 1, device=below.device).to(below.dtype)
    for_all = below.sum(0) * tried <= tolerance**2 * len(below)
    most = (SPARSE_MOST_ERROR * tolerance) ** 2 * (at_target.abs() / usual).clamp(min=1.0)
    fit = for_all & (tried <= tolerance) & (below * tried <= most[:, None])
    first = fit.int().argmax(1)  # below times the threshold grows with it
    return usual * tried[first], fit[:, -1]
