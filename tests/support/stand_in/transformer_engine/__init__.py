"""A stand-in for Transformer Engine on the host; see the README beside this package."""

__version__ = "2.12.0"

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
