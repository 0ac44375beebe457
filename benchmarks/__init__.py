"""Benchmarks of the ops beside their peers, run by ``grpo-fast bench``. Installed as ``grpo_fast.benchmarks``."""
