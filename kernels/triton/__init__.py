"""Triton kernels, one op a file; they import torch and triton only. ``grpo_fast.backend`` says which ops have one."""
