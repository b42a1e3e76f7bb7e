"""Tensors kept in FP8, of which the stand-in has none."""

import torch


class QuantizedTensor(torch.Tensor):
    """What a tensor kept in FP8 would be an instance of."""
