"""Fused chains of operations, which Lathe does not ask for: megatron-core names the type in an annotation."""


class Sequential:
    """A chain of operations."""


class FusibleOperation:
    """A part of one."""
