"""Load any frozen tokenizer from its file: a :class:`bevt_lib.tokenizers.base.FrozenTokenizer`.

Among them the two pickles in which OpenAI publishes DALL-E's tokenizer, read safely and converted
once: https://cdn.openai.com/dall-e/encoder.pkl and decoder.pkl hold whole modules of the DALL-E
package.
"""

import json
import sys
import zipfile
from pathlib import Path

import dall_e
from filelock import FileLock
from torch import Tensor, nn

from bevt_lib.base import distributed, files
from bevt_lib.tokenizers import base, dalle, peco

# By the entry of a file's header that tells its kind: (architecture, tensors) to the tokenizer.
KINDS = {"dalle": dalle.build_dalle, "peco": peco.build_peco}
URL = "https://cdn.openai.com/dall-e/"
FILES = {"encoder.pkl": dall_e.Encoder, "decoder.pkl": dall_e.Decoder}
CONVERTED = "dalle.safetensors"  # what is made of both files, beside them
# What OpenAI's pickles may name besides tensors and plain values. Never made from a file.
CLASSES = (*FILES.values(), *dalle.BLOCKS, dall_e.utils.Conv2d,
           nn.Sequential, nn.ReLU, nn.MaxPool2d, nn.Identity, nn.Upsample)  # fmt: skip


def load_tokenizer(path: str | Path) -> base.FrozenTokenizer:
    """Load any tokenizer: a safetensors file of ours, or what OpenAI publishes of DALL-E's.

    ``path`` is the file; the folder that holds OpenAI's ``encoder.pkl`` and ``decoder.pkl``; or an
    encoder alone, which encodes but can't paint: OpenAI's, or the one that ``convert_weights``
    takes out of a released BEVT checkpoint. Raises ValueError in one line for a missing or damaged
    file and for one of another kind.
    """
    try:
        return _load(Path(path))
    except ValueError as error:
        line = str(error).strip().splitlines()[-1]
        raise ValueError(line if str(path) in line else f"{path}: {line}") from None


def _load(path: Path) -> base.FrozenTokenizer:
    if path.is_dir():
        pickles = {name: path / name for name in FILES if (path / name).exists()}
        if "encoder.pkl" in pickles:
            return load_pickles(pickles)
        path = path / CONVERTED
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}: give --tokens.weights a .safetensors file, or "
                         f"the folder of OpenAI's {' and '.join(FILES)}")  # fmt: skip
    if path.suffix == ".pkl" or zipfile.is_zipfile(path):
        return load_pickles({"encoder.pkl": path})
    header, state = files.read_tensors(path)
    for kind, build in KINDS.items():
        if kind in header:
            return build(json.loads(header[kind]), state)
    if "blocks.input.w" in state:  # out of a released checkpoint, in the package's names
        full = {f"encoder.{k}": v for k, v in state.items()}
        return dalle.build_dalle(dalle.architecture(state), full)
    raise ValueError(f"{path} holds no tokenizer: make one with python -m bevt_lib.train_tokenizer")


def load_pickles(paths: dict[str, Path]) -> dalle.DalleTokenizer:
    """Load OpenAI's pickles {"encoder.pkl": path, ...}; turn them into a safetensors file, once.

    It lies beside them, and is made anew where it is damaged or the SHA-256 of a pickle isn't the
    one in its header. Where it can't be written, the pickles are read on every start, and stderr
    says so. Raises ValueError in one line for other files than OpenAI's.
    """
    sources, encoder = {p.name: files.sha256(p) for p in paths.values()}, paths["encoder.pkl"]
    target = encoder.with_name(CONVERTED if len(paths) == 2 else f"{encoder.name}.safetensors")
    if made := _made_from(sources, target):
        return made
    try:
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not (made := _made_from(sources, target)):  # by another process, meanwhile
                made = _convert(paths)
                header = json.dumps(made.architecture | {"sources": sources})
                files.write_tensors(target, made.state_dict(), {"dalle": header})
    except OSError as error:
        if distributed.rank() == 0:
            print(f"can't write {target} ({error.strerror or error}): {' and '.join(sources)} "
                  "will be read anew on every start", file=sys.stderr)  # fmt: skip
    return made or _convert(paths)


def _convert(paths: dict[str, Path]) -> dalle.DalleTokenizer:
    """Build the tokenizer of the pickles {"encoder.pkl": path, ...}."""
    parts = {name.removesuffix(".pkl"): read_part(path, name) for name, path in paths.items()}
    state = {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}
    return dalle.build_dalle(dalle.architecture(parts["encoder"]), state)


def _made_from(sources: dict[str, str], target: Path) -> dalle.DalleTokenizer | None:
    """Load the file made of these pickles; None where there is none, or a damaged one."""
    try:
        header, state = files.read_tensors(target)
    except (ValueError, OSError):
        return None
    found = json.loads(header.get("dalle", "{}"))
    return dalle.build_dalle(found, state) if found.get("sources") == sources else None


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
    module, kind = files.read_pickle(path, CLASSES), FILES[name]
    if not isinstance(module, kind):
        found = type(module).__name__
        raise ValueError(f"{path} holds a {found}, not DALL-E's {kind.__name__}; {again}")
    try:
        return _parameters(module)
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} holds a broken {kind.__name__}; {again}") from None


def _parameters(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Give {name: tensor} without calling the module: old pickles lack attributes."""
    found = {prefix + name: value.detach() for name, value in vars(module)["_parameters"].items()}
    for name, child in vars(module)["_modules"].items():
        found |= _parameters(child, f"{prefix}{name}.")
    return found
