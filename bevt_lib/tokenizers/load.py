"""Load any frozen tokenizer from its file: a :class:`bevt_lib.tokenizers.base.FrozenTokenizer`."""

import json
import zipfile
from pathlib import Path

from bevt_lib.base.files import read_tensors
from bevt_lib.tokenizers import dalle, peco
from bevt_lib.tokenizers.base import FrozenTokenizer
from bevt_lib.tokenizers.openai_files import CONVERTED, FILES, load_pickles

# By the header entry that tells a file's kind: (the architecture in it, the tensors) to the
# tokenizer.
KINDS = {"dalle": dalle.build_dalle, "peco": peco.build_peco}


def load_tokenizer(path: str | Path) -> FrozenTokenizer:
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


def _load(path: Path) -> FrozenTokenizer:
    if path.is_dir():
        encoder, decoder = (path / name for name in FILES)
        if encoder.exists():
            return load_pickles(encoder, decoder if decoder.exists() else None)
        path = path / CONVERTED
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}: give --tokens.weights a .safetensors file, or "
                         f"the folder of OpenAI's {' and '.join(FILES)}")  # fmt: skip
    if path.suffix == ".pkl" or zipfile.is_zipfile(path):
        return load_pickles(path, None)
    header, state = read_tensors(path)
    for kind, build in KINDS.items():
        if kind in header:
            return build(json.loads(header[kind]), state)
    if "blocks.input.w" in state:  # out of a released checkpoint, in the package's names
        full = {f"encoder.{k}": v for k, v in state.items()}
        return dalle.build_dalle(dalle.architecture(state), full)
    raise ValueError(f"{path} holds no tokenizer: make one with python -m bevt_lib.train_tokenizer")
