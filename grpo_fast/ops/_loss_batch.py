"""What ``grpo_loss`` and ``linear_grpo_loss`` share: their arguments beside the model, checked, and their result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.config import GRPOLossConfig
from grpo_fast.ops._checks import FLOATS, IDS, MASKS, Shapes, check_positive
from grpo_fast.ops.group_advantages import check_groups
from grpo_fast.reference import Sequences, group_advantages_ref, grpo_loss_ref


class GRPOLossOutput(NamedTuple):
    """What the loss ops return.

    Attributes:
        loss: Scalar, differentiable.
        logps: Log-probabilities of the completion tokens, per token, detached; 0 where masked.
        entropy: Entropy of the distribution at each token in nats, detached; 0 where masked.
        metrics: Detached scalars on the device, under TRL's names: ``entropy``, ``policy_loss``,
            ``num_active_tokens``, ``ratio/mean``, ``ratio/max``; with beta, ``kl``; with rewards,
            ``frac_reward_zero_std``; for clipped losses ``clip_ratio/low_mean``, ``low_min``, ``high_mean``,
            ``high_max`` and ``region_mean``; ``cispo_clip_ratio`` and ``vespo/phi_seq_mean`` for theirs.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


@dataclass(kw_only=True)
class LossBatch:
    """The arguments of a GRPO loss beside the model. ``grpo_loss`` documents each."""

    completion_ids: Tensor
    completion_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    advantages: Tensor | None = None
    rewards: Tensor | None = None
    group_size: int | None = None
    group_ids: Tensor | None = None
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    sampling_logps: Tensor | None = None
    importance_sampling_ratio: Tensor | None = None
    entropy_mask: Tensor | None = None
    entropy_threshold: float | Tensor | None = None
    num_items_in_batch: float | Tensor | None = None
    config: GRPOLossConfig
    token_dims: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.token_dims = ("B", "T") if self.cu_seqlens is None else ("N",)

    def check(self, shapes: Shapes, *, ref_logps_follow: bool = False) -> None:
        """Raise ValueError or TypeError for the first argument that is wrong; ``ref_logps`` may follow later."""
        c, token = self.config, self.token_dims
        if not isinstance(c, GRPOLossConfig):
            raise TypeError(f"config: got {type(c).__name__}, want a GRPOLossConfig")
        shapes.check("completion_ids", self.completion_ids, token, dtypes=IDS)
        shapes.optional("completion_mask", self.completion_mask, token, dtypes=MASKS)
        self._check_packing(shapes)
        self._check_advantages(shapes)
        for name in ("old_logps", "ref_logps", "sampling_logps"):
            shapes.optional(name, getattr(self, name), token)
        if c.beta != 0.0 and self.ref_logps is None and not ref_logps_follow:
            raise ValueError(f"ref_logps: got None with beta={c.beta}, want the reference model's log-probs")
        shapes.optional("importance_sampling_ratio", self.importance_sampling_ratio, token, ("B",), ("B", 1))
        shapes.optional("entropy_mask", self.entropy_mask, token, dtypes=MASKS)
        if self.entropy_mask is not None and self.entropy_threshold is not None:
            raise ValueError("entropy_threshold: got one beside entropy_mask, want only one of the two")
        if isinstance(self.entropy_threshold, Tensor):
            shapes.check("entropy_threshold", self.entropy_threshold, ())
        elif self.entropy_threshold is not None and not isinstance(self.entropy_threshold, (int, float)):
            raise TypeError(f"entropy_threshold: got {self.entropy_threshold!r}, want a number of nats")
        self._check_num_items(shapes)

    def _check_packing(self, shapes: Shapes) -> None:
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is None:
            return
        shapes.check("cu_seqlens", cu_seqlens, ("B + 1",), dtypes=IDS)
        shapes.dims["B"] = shapes.dims["B + 1"] - 1
        if shapes.dims["B"] < 0:
            raise ValueError("cu_seqlens: got shape (0,), want (B + 1,) starting with 0")
        if self.config.loss_type == "dr_grpo" and self.config.max_completion_length is None:
            raise ValueError(
                "config.max_completion_length: got None with cu_seqlens and loss_type='dr_grpo', want a length in "
                "tokens (packed input has no padded length to take)"
            )
        # On a GPU the values stay unread (reading them would stall it); rows past the last end count as padding.
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            steps, ends = cu_seqlens.diff(), (int(cu_seqlens[0]), int(cu_seqlens[-1]))
            if ends[0] != 0 or ends[1] > shapes.dims["N"] or bool((steps < 0).any()):
                raise ValueError(
                    f"cu_seqlens: got {cu_seqlens.tolist()}, want 0, then non-decreasing ends up to N = "
                    f"{shapes.dims['N']}"
                )

    def _check_advantages(self, shapes: Shapes) -> None:
        if (self.advantages is None) == (self.rewards is None):
            both = "both" if self.rewards is not None else "neither"
            raise ValueError(f"advantages: got {both} advantages and rewards, want exactly one of the two")
        if self.rewards is not None:
            shapes.check("rewards", self.rewards, ("B",))
            check_groups(shapes, self.group_size, self.group_ids)
            return
        shapes.check("advantages", self.advantages, ("B",), ("B", 1), self.token_dims)
        for name in ("group_size", "group_ids"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: got one with advantages, want it only with rewards")

    def _check_num_items(self, shapes: Shapes) -> None:
        n = self.num_items_in_batch
        if isinstance(n, Tensor):
            shapes.check("num_items_in_batch", n, (), dtypes=FLOATS + IDS)
        elif n is not None:
            check_positive("num_items_in_batch", n)
        if n is not None and not self.config.divides_by_items:
            raise ValueError(
                f"num_items_in_batch: got one with loss_type={self.config.loss_type!r}, which does not divide by it; "
                "want None, or loss_type dapo, cispo or vespo"
            )

    @property
    def counts_everything(self) -> bool:
        """Whether no token can be masked."""
        return self.completion_mask is None and self.cu_seqlens is None

    def is_known_by_token(self) -> bool:
        """Whether a token's loss and gradient follow from its own row of logits."""
        c = self.config
        return (
            c.importance_sampling_level == "token"
            and c.loss_type != "vespo"
            and c.off_policy_mask_threshold is None
            and (c.entropy_coef == 0.0 or self.entropy_threshold is None)  # a mean over those it selects
        )

    def live(self, sequences: Sequences, advantages: Tensor) -> Tensor | None:
        """Per token, bool: where the gradient is not known to be 0 before the log-probs are. None: everywhere.

        ``advantages`` are per token.
        """
        chosen = None if self.entropy_mask is None else self.entropy_mask.bool()
        if self.config.beta != 0.0:
            return None
        live = chosen
        if self.config.entropy_coef == 0.0:
            live = advantages != 0
            if self.importance_sampling_ratio is not None:
                live = live & (sequences.per_token(self.importance_sampling_ratio, 1.0) != 0)
            if chosen is not None:
                live = live & chosen
        if live is None or self.is_known_by_token():
            return live
        return sequences.spread(sequences.sum(live.to(sequences.dtype)) > 0)  # a sequence's tokens need each other

    def sequences(self, dtype: torch.dtype) -> Sequences:
        """The layout of the per-token tensors."""
        return Sequences(self.completion_ids, self.completion_mask, self.cu_seqlens, dtype)

    def group_advantages(self) -> tuple[Tensor, Tensor | None]:
        """The advantages, and the share of completions whose group has no spread, None without rewards."""
        if self.rewards is None:
            assert self.advantages is not None
            return self.advantages, None
        advantages, zero_std = group_advantages_ref(
            self.rewards,
            group_size=self.group_size,
            group_ids=self.group_ids,
            scale=self.config.scale_rewards,
        )
        return advantages, zero_std.to(advantages.dtype).sum() / max(zero_std.numel(), 1)

    def loss(self, logps: Tensor, entropy: Tensor, sequences: Sequences) -> GRPOLossOutput:
        """The reference loss from per-token log-probs and entropies."""
        advantages, zero_std = self.group_advantages()
        loss, metrics = grpo_loss_ref(
            logps,
            entropy,
            sequences,
            advantages=advantages,
            old_logps=self.old_logps,
            ref_logps=self.ref_logps,
            sampling_logps=self.sampling_logps,
            importance_sampling_ratio=self.importance_sampling_ratio,
            entropy_mask=self.entropy_mask,
            entropy_threshold=self.entropy_threshold,
            num_items_in_batch=self.num_items_in_batch,
            config=self.config,
        )
        if zero_std is not None:
            metrics["frac_reward_zero_std"] = zero_std.to(loss.dtype)
        return GRPOLossOutput(loss, logps.detach(), entropy.detach(), metrics)
