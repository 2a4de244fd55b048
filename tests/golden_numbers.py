"""Where the golden numbers of the released code lie, and the rules by which inputs were made."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(os.environ.get("BEVT_GOLDEN", Path(__file__).parent / "golden"))
CASES = json.loads((FOLDER / "cases.json").read_text())
TOLERANCES = CASES["tolerances"]


def arrays(name: str):
    """Open one golden file by its name in cases.json."""
    return np.load(FOLDER / name)


def rule_weight(name: str, shape, scale: float) -> np.ndarray:
    """The MANIFEST's weight rule: float32 values for a released parameter name and shape."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    values = values.astype(np.float32) * np.float32(scale)
    parts = name.split(".")
    if len(parts) > 1 and parts[-1] == "weight" and parts[-2] in ("norm", "norm1", "norm2"):
        values = np.float32(1.0) + values
    return values


def rule_input(seed: int, shape) -> torch.Tensor:
    """The MANIFEST's input rule: a float32 tensor of the given shape."""
    values = np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)
    return torch.from_numpy(values)
