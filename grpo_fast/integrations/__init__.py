"""grpo_fast inside other libraries, a module a library; nothing else in the package patches another.

None is imported by ``import grpo_fast``. Each names the versions it supports and raises outside of them, and raises
for every option that it does not honour.
"""

#: What the ops may keep of logits and their gradients (``workspace_bytes``) inside a trainer. A quarter of their own
#: default: the loss is a tenth of a step, so its speed matters less than its memory, and the activations of the whole
#: model lie beside it.
WORKSPACE_BYTES = 512 * 2**20
