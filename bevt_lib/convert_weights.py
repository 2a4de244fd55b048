"""Convert weights: ``python -m bevt_lib.convert_weights FILE OUT [--to FORMAT]``.

FILE: a checkpoint of released BEVT, Video-Swin, 2D Swin (its repository's or timm's), torchvision's
swin3d, or this kit's file or folder. OUT: a model folder of ours (``model.safetensors`` and
``config.json``) or, where it ends in ``.safetensors`` or ``.pth``, a file of tensors. Prints a
table of what was taken, what was left out, and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from bevt_lib import cli
from bevt_lib.base.config import require
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.classifier import Classifier
from bevt_lib.weights.formats import Recognised, architecture, export
from bevt_lib.weights.load import Report, load_strict, read_checkpoint, save_weights

TOKENIZER_FILE = "tokenizer_encoder.safetensors"  # beside model.safetensors, where a file holds one


@dataclass
class Options:
    """What the command line says."""

    file: Path  # a checkpoint file or a folder
    out: Path  # a folder, .safetensors or .pth
    to: Literal["ours", "bevt", "torchvision", "timm", "swin"] = "ours"  # whose names


def main(arguments: list[str]) -> None:
    """Read the command line, convert, and print the table."""
    given = cli.parse(Options, arguments, "python -m bevt_lib.convert_weights", __doc__ or "")
    print(convert(given.file, given.out, given.to))


def convert(source: Path, target: Path, format: str = "ours") -> str:
    """Convert one checkpoint; return the table. See the module's docstring.

    A released checkpoint's tokenizer goes to ``tokenizer_encoder.safetensors`` in the folder, and
    back into a released one from there. Raises ValueError where FILE holds no whole model and OUT
    is a folder, and where the other format has no place for what FILE holds.
    """
    found = read_checkpoint(source)
    beside = source / TOKENIZER_FILE
    if source.is_dir() and beside.exists():
        found.tokenizer = load_file(beside)
    report = report_of(list(found.state), found.left_out)
    as_file = target.suffix in (".safetensors", ".pth")
    if format == "ours" and not as_file:
        model = build_model(found, source)
        model.save_pretrained(target)
        shape = architecture(found.state, found.tokens) | {"released quirks": needs_quirks(found)}
        what = f"model folder {target}: " + ", ".join(f"{k} {v}" for k, v in shape.items())
        if found.tokenizer:
            save_weights(found.tokenizer, target / TOKENIZER_FILE)
            report.taken += [f"tokenizer.{k}" for k in found.tokenizer]
    else:
        require(as_file, f"{target}: {format} weights are a file: give .pth or .safetensors")
        state = found.state
        if format != "ours":
            state, left = export(found.state, format, found.tokenizer)
            report = report_of([name for name in found.state if name not in left], left)
        write_file(state, target, format)
        what = f"{format} weights {target}"
    return f"{source}: {found.format} weights\n{report.table()}\nwritten: {what}"


def report_of(taken: list[str], left_out: Mapping[str, str]) -> Report:
    """Report what was taken, and what was left out: {tensor: why}."""
    why = {("left_out", name): reason for name, reason in left_out.items()}
    return Report(taken=taken, left_out=list(left_out), why=why)


def build_model(found: Recognised, source: Path) -> BEVT | Classifier:
    """Build the model whose tensors these are, whole. Raises ValueError where some are lacking."""
    shape = architecture(found.state, found.tokens)
    kind = Classifier if "num_classes" in shape else BEVT
    try:
        if not {"num_classes", "vocab_size"} & shape.keys() or found.format in ("swin", "timm"):
            raise ValueError("an encoder without its heads")
        model = kind(**shape, released_quirks=needs_quirks(found))
        load_strict(model, found.state, str(source))
    except ValueError as error:
        raise ValueError(f"{source} is not a whole model ({error}): write a file, OUT.safetensors, "
                         "and start a training from it with --run.init") from None  # fmt: skip
    return model


def needs_quirks(found: Recognised) -> bool:
    """Whether the model needs the released quirks: its weights were trained with them."""
    return found.format in ("bevt", "torchvision")


def write_file(state: dict[str, torch.Tensor], target: Path, format: str) -> None:
    """Write tensors as safetensors, or as the pickle that the other code reads."""
    if target.suffix == ".safetensors":
        save_weights(state, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    wrapper = {"bevt": "state_dict", "swin": "model"}.get(format)
    plain = {k: v.contiguous() for k, v in state.items()}
    torch.save({wrapper: plain} if wrapper else plain, target)


if __name__ == "__main__":
    cli.run_command(main)
