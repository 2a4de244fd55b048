"""Ship a finished run: its weights in few bytes, and how they came about.

    python data/ship_weights.py RUN_FOLDER NAME "COMMAND"

Writes weights/NAME.safetensors and weights/NAME.json beside this file. Matrices are stored as 8-bit
floats (float8_e4m3fn), tokenizers' as 16-bit; the shipped file is what notebooks and tests use
and what the next stage starts from. The JSON holds the command, the configuration, the losses of
the first 20 steps, the curves, and the SHA-256 of every source picture and film of the training
split.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

from bevt_lib.base import files
from bevt_lib.datasets import synthetic
from bevt_lib.presets import TRAIN_TOKENIZER
from bevt_lib.train_tokenizer import build_model
from bevt_lib.training import checkpoint
from bevt_lib.training.run_folder import read_metrics
from bevt_lib.weights.load import read_file, read_weights, save_weights

CURVE_STEP = 25  # steps averaged into one point of the curve


def main(run: Path, name: str, command: str) -> None:
    folder = checkpoint.latest(run)
    if folder is None:
        raise ValueError(f"{run} holds no whole checkpoint")
    target = Path(__file__).parent / "weights" / f"{name}.safetensors"
    if name in TRAIN_TOKENIZER:
        model = build_model(TRAIN_TOKENIZER[name]())
        model.load_state_dict(read_file(folder))
        model.tokenizer().save(target, torch.float16)
    else:
        save_weights(read_weights(folder), target, torch.float8_e4m3fn)
    history = read_metrics(run)
    kinds = ("loss", "accuracy", "mse", "perceptual", "perplexity")
    keys = [k for k in history[0] if k.endswith(kinds)]
    curve = {
        key: [
            round(sum(e[key] for e in part) / len(part), 4)
            for part in (history[i : i + CURVE_STEP] for i in range(0, len(history), CURVE_STEP))
        ]
        for key in keys
    }
    config = json.loads((run / "config.json").read_text()) | {"run.folder": ""}  # a path of ours
    card = {
        "command": command,
        "config": config,
        "steps": len(history),
        "first_losses": [entry["loss"] for entry in history[:20]],
        "curve_step": CURVE_STEP,
        "curve": curve,
        "held_out": [
            {k: v for k, v in e.items() if k == "step" or k.startswith("val/")}
            for e in history
            if any(k.startswith("val/") for k in e)
        ],
        "training_files": {
            path.relative_to(files.data_folder()).as_posix(): sha256(path)
            for path in training_files(with_film=name in TRAIN_TOKENIZER)
        },
    }
    target.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    print(target, target.stat().st_size)


def training_files(with_film: bool) -> list[Path]:
    """List the source files that the training split is rendered from."""
    cutouts = [path for kind in synthetic.cutout_splits()["seen"] for path in kind]
    film = sorted((files.data_folder() / "film").glob("*.mp4")) if with_film else []
    return synthetic.photo_splits()["train"] + cutouts + film


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
