"""What does not depend on torch: the recipes."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
