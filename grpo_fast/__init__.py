"""grpo_fast: the GRPO loss of DeepSeek-R1 as fused, drop-in PyTorch ops."""

from grpo_fast.config import GRPOLossConfig
from grpo_fast.ops._loss_batch import GRPOLossOutput
from grpo_fast.ops.group_advantages import group_advantages
from grpo_fast.ops.grpo_loss import grpo_loss
from grpo_fast.ops.linear_cross_entropy import linear_cross_entropy
from grpo_fast.ops.linear_distillation_loss import linear_distillation_loss
from grpo_fast.ops.linear_grpo_loss import linear_grpo_loss
from grpo_fast.ops.linear_selective_log_softmax import linear_selective_log_softmax
from grpo_fast.ops.selective_log_softmax import selective_log_softmax
from grpo_fast.version import __version__

__all__ = [
    "GRPOLossConfig",
    "GRPOLossOutput",
    "__version__",
    "group_advantages",
    "grpo_loss",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "selective_log_softmax",
]
