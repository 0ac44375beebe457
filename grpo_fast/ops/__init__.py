"""The public ops, one a file: input checks, choice of implementation, autograd."""
