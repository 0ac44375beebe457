"""grpo_fast inside other libraries, a module a library; nothing else in the package patches another.

None is imported by ``import grpo_fast``. Each names the versions it supports and raises outside of them, and raises
for every option that it does not honour.
"""
