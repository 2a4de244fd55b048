"""One command line for all commands: ``PRESET --overrides``, and errors in one line."""

import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from bevt_lib.base.config import flatten


def override(recipe: Any, arguments: Sequence[str]) -> Any:
    """Apply ``--section.field value`` arguments to a recipe; a switch needs no value.

    Raises ValueError that names the field, the value and the nearest field that exists.
    """
    known = flatten(recipe)
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}: overrides look like --run.seed 1")
        flag, equals, attached = word[2:].partition("=")
        name = flag.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "see --help"
            raise ValueError(f"unknown option --{flag}: {hint}")
        if equals:
            text = attached
        elif isinstance(known[name], bool) and (not words or words[0].startswith("--")):
            text = "true"
        elif words:
            text = words.pop(0)
        else:
            raise ValueError(f"option --{flag} needs a value")
        recipe = _replace(recipe, name.split("."), text, flag)
    return recipe


def _replace(node: Any, path: list[str], text: str, flag: str) -> Any:
    hint = typing.get_type_hints(type(node))[path[0]]
    old = getattr(node, path[0])
    new = _replace(old, path[1:], text, flag) if path[1:] else _parse(text, hint, flag)
    try:
        return dataclasses.replace(node, **{path[0]: new})
    except ValueError as error:
        raise ValueError(f"--{flag} {text}: {error}") from None


def _parse(text: str, hint: Any, flag: str) -> Any:
    """Read one value as its field's type says."""
    try:
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        if hint in (int, float, str):
            return hint(text)
        items = typing.get_args(hint)
        if typing.get_origin(hint) is tuple and items[0] in (int, float, str):
            values = tuple(items[0](word) for word in text.split(","))
            if items[-1] is not Ellipsis and len(values) != len(items):
                raise ValueError
            return values
    except (KeyError, ValueError):
        kind = hint.__name__ if isinstance(hint, type) and not isinstance(
            hint, types.GenericAlias) else str(hint)  # fmt: skip
        raise ValueError(f"--{flag} {text}: not a value of type {kind}") from None
    raise ValueError(f"--{flag} can't be set on the command line: write a preset")


def choose(presets: dict[str, Callable[[], Any]], arguments: Sequence[str], command: str) -> Any:
    """Read ``PRESET --overrides``: the named preset's recipe with the overrides applied."""
    names = ", ".join(presets)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m bevt_lib.{command} PRESET [--section.field value ...]")
        print(f"presets: {names}\nfields of a preset and their values: PRESET --help")
        raise SystemExit(0 if arguments else 2)
    name, *rest = arguments
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {names}"
        raise ValueError(f"unknown preset {name!r}: {hint}")
    recipe = presets[name]()
    if "-h" in rest or "--help" in rest:
        print((presets[name].__doc__ or "").strip())
        for key, value in flatten(recipe).items():
            print(f"  --{key.replace('_', '-')} {value!r}")
        raise SystemExit(0)
    return override(recipe, rest)


# RuntimeErrors whose cause a user can mend: what they hold, and the cure.
MENDABLE = {
    "DataLoader worker": "often for lack of memory: fewer --data.workers; the same command "
                         "continues from the last checkpoint",
    "OutOfMemoryError": "a smaller --run.micro-batch, or --run.checkpoint-activations",
    "deterministic implementation": "train without --run.deterministic",
}  # fmt: skip


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command: an error its user can mend ends in one line on stderr and exit status 2.

    ``BEVT_TRACEBACK=1`` shows the traceback as well.
    """
    said, status = "", 2
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        said, status = "interrupted: the same command continues from the last checkpoint", 130
    except (ValueError, OSError) as error:
        if os.environ.get("BEVT_TRACEBACK"):
            raise
        # A loader process wraps its error in a traceback: the last line is the error itself.
        line = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        said = "error: " + re.sub(r"^[\w.]*Error: ", "", line)
    except RuntimeError as error:
        cure = next((cure for mark, cure in MENDABLE.items() if mark in repr(error)), "")
        if not cure or os.environ.get("BEVT_TRACEBACK"):
            raise
        said = f"error: {str(error).splitlines()[0]} ({cure})"
    if said:  # here the error is forgotten, and with it the threads that its frames kept alive
        print(said, file=sys.stderr)
        raise SystemExit(status)
