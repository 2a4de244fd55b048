"""Pixels to normalised floats by ImageNet's mean and standard deviation, as released."""

import torch
from torch import Tensor

MEAN = (123.675, 116.28, 103.53)  # ImageNet, RGB, 0 to 255; released configs
STD = (58.395, 57.12, 57.375)


def normalise(pixels: Tensor) -> Tensor:
    """Turn uint8 (B, T, H, W, 3) into normalised float32 (B, 3, T, H, W) by MEAN and STD."""
    mean = torch.tensor(MEAN, device=pixels.device)
    std = torch.tensor(STD, device=pixels.device)
    return ((pixels.float() - mean) / std).permute(0, 4, 1, 2, 3).contiguous()
