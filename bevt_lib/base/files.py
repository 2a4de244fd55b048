"""Files: tensors that may be damaged, truncated or hostile are read safely; writes are atomic."""

import contextlib
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DIGEST = "tensors_sha256"  # key of a header: the :func:`digest` of the tensors written


@contextlib.contextmanager
def replace_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to; once written, that file replaces ``path``.

    Whatever interrupts the write, ``path`` is the whole old file or the whole new one. With
    ``sync`` the new bytes reach the disk first, so that this holds after a power cut too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        if sync:
            with part.open("rb+") as written:
                os.fsync(written.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_pickle(path: Path, allowed: Sequence[Any]) -> Any:
    """Read a torch pickle that holds only tensors, plain values and ``allowed`` classes.

    No code from the file is run: a pickle that asks for anything else is refused. Raises
    ValueError in one line for a damaged or refused file.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a pickle protocol that the next line refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)|(?:global|class|type) `?([\w.]+\.[\w.]+)", str(error))
        what = f"asks for {asked[1] or asked[2]}" if asked else "is not one that torch writes"
        refused = f"{path} is refused: its pickle {what}, and no code from a file is run"
        raise ValueError(refused) from None
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), "it ends early")[:120]
        what = f"is damaged or not a PyTorch checkpoint ({reason})"
        raise ValueError(f"{path} {what}: download or copy it again") from None


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a safetensors file: the entries of its header, and its tensors.

    Raises ValueError in one line for another kind of file, and for tensors that differ from those
    that :func:`write_tensors` wrote.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        what = f"is not a readable safetensors file ({error})"
        raise ValueError(f"{path} {what}: it may be a saved web page or a log") from None
    if DIGEST in header and header[DIGEST] != digest(tensors):
        raise ValueError(f"{path} is damaged (checksum mismatch of its tensors): copy it again")
    return header, tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, with the digest of its tensors in the header."""
    with replace_file(path) as part:
        save_tensors(tensors, part, {**header, DIGEST: digest(tensors)})


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in place, with the default file mode.

    By itself safetensors 0.8 makes a file that only its owner can read, so that no colleague could
    continue from a checkpoint.
    """
    path.touch()
    mode = path.stat().st_mode
    state = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(state, path, dict(header) if header else None)
    with contextlib.suppress(OSError):  # a disk without modes
        path.chmod(mode)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash the names, types, shapes and values of tensors: SHA-256 in hex."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def sha256(path: Path) -> str:
    """Hash the bytes of a file: SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_folder() -> Path:
    """Find the embedded data: $BEVT_DATA, or data/ beside the library.

    Raises ValueError where it is missing.
    """
    folder = Path(os.environ.get("BEVT_DATA") or Path(__file__).resolve().parents[2] / "data")
    if not (folder / "photos").is_dir():
        fix = "pip install -e . in a clone, or point BEVT_DATA at the clone's data folder"
        raise ValueError(f"no embedded data at {folder}: {fix}")
    return folder
