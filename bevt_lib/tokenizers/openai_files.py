"""The two pickles in which OpenAI publishes DALL-E's tokenizer: read safely, converted once.

https://cdn.openai.com/dall-e/encoder.pkl and decoder.pkl hold whole modules of the DALL-E package.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import dall_e
from filelock import FileLock
from torch import Tensor, nn

from bevt_lib.base import distributed
from bevt_lib.base.files import read_pickle, read_tensors, sha256, write_tensors
from bevt_lib.tokenizers.dalle import BLOCKS, DalleTokenizer, architecture, build_dalle

URL = "https://cdn.openai.com/dall-e/"
FILES = {"encoder.pkl": dall_e.Encoder, "decoder.pkl": dall_e.Decoder}
CONVERTED = "dalle.safetensors"  # what is made of both files, beside them
# What OpenAI's pickles may name besides tensors and plain values. Never made from a file.
CLASSES = (*FILES.values(), *BLOCKS, dall_e.utils.Conv2d,
           nn.Sequential, nn.ReLU, nn.MaxPool2d, nn.Identity, nn.Upsample)  # fmt: skip


def load_pickles(encoder: Path, decoder: Path | None) -> DalleTokenizer:
    """Load OpenAI's pickles; they are turned into a safetensors file beside them, once.

    It is made anew where it is damaged or the SHA-256 of a pickle isn't the one in its header.
    Where it can't be written, the pickles are read on every start, and stderr says so. Raises
    ValueError in one line for other files than OpenAI's.
    """
    paths = {"encoder": encoder, "decoder": decoder} if decoder else {"encoder": encoder}
    sources = {path.name: sha256(path) for path in paths.values()}
    target = encoder.with_name(CONVERTED if decoder else f"{encoder.name}.safetensors")
    made = _made_from(sources, target)
    if made:
        return made
    try:
        with FileLock(target.with_name(f".{target.name}.lock")):
            made = _made_from(sources, target)  # by another process, while this one waited
            if not made:
                made = _convert(paths)
                header = json.dumps(made.architecture | {"sources": sources})
                write_tensors(target, made.state_dict(), {DalleTokenizer.kind: header})
    except OSError as error:
        if distributed.rank() == 0:
            print(f"can't write {target} ({error.strerror or error}): {' and '.join(sources)} "
                  "will be read anew on every start", file=sys.stderr)  # fmt: skip
    return made or _convert(paths)


def _convert(paths: Mapping[str, Path]) -> DalleTokenizer:
    """Build the tokenizer of the pickles {"encoder": path, ...}."""
    parts = {part: read_part(path, f"{part}.pkl") for part, path in paths.items()}
    state = {f"{part}.{k}": v for part, s in parts.items() for k, v in s.items()}
    return build_dalle(architecture(parts["encoder"]), state)


def _made_from(sources: Mapping[str, str], target: Path) -> DalleTokenizer | None:
    """Load the file made of these pickles; None where there is none, or a damaged one."""
    try:
        header, state = read_tensors(target)
    except (ValueError, OSError):
        return None
    found = json.loads(header.get(DalleTokenizer.kind, "{}"))
    return build_dalle(found, state) if found.get("sources") == sources else None


def read_part(path: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors of a file that should be OpenAI's ``name``: a pickled module of theirs.

    Nothing in it is run, and nothing but its parameters is taken. Raises ValueError in one line.
    """
    with path.open("rb") as file:
        start = file.read(200)
    again = f"fetch it again: wget -O {name} {URL}{name}"
    if start.startswith(b"\x80"):
        raise ValueError(f"{path} is an old pickle, not a zip as torch writes since 1.6; {again}")
    if not start.startswith(b"PK"):
        line = start.decode(errors="replace").strip().split("\n")[0][:60]
        raise ValueError(f"{path} is not OpenAI's {name} but begins with {line!r}: a web page, or "
                         f"the log that wget -o writes? {again}")  # fmt: skip
    module, kind = read_pickle(path, CLASSES), FILES[name]
    if not isinstance(module, kind):
        found = type(module).__name__
        raise ValueError(f"{path} holds a {found}, not DALL-E's {kind.__name__}; {again}")
    try:
        return dict(_parameters(module))
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} holds a broken {kind.__name__}; {again}") from None


def _parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """List (name, tensor) without calling the module: old pickles lack attributes."""
    for name, value in vars(module)["_parameters"].items():
        yield prefix + name, value.detach()
    for name, child in vars(module)["_modules"].items():
        yield from _parameters(child, f"{prefix}{name}.")
