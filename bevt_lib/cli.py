"""One command line for all commands, by tyro: presets, files of values, options.

tyro reads a value by its field's type and explains a field by the comment beside it. Every error is
one line.
"""

import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from bevt_lib.base.config import UNUSED, flatten
from bevt_lib.training.run_folder import ITEMS, RENAMED

RECORDED = (ITEMS, "tokens.sha256")  # what a run writes into config.json beside its recipe
ABOUT_FILES = """
    --config FILE takes values from a file: a run's config.json (or its folder), what --run.dry-run
    printed, or some {"section.field": value} of your own. They replace the preset's values, and
    options replace them. Without PRESET, the file's "name" says which one.

    --run.dry-run prints the plan, and below it the recipe as such a file: to keep, diff and share.
"""


def choose(presets: Mapping[str, Callable[[], Any]], arguments: Sequence[str], command: str) -> Any:
    """Read ``PRESET --config FILE --section.field value ...`` and give the recipe.

    Raises ValueError that names the option, its value and the fix.
    """
    words, prog = list(arguments), f"python -m bevt_lib.{command}"
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {prog} PRESET [--config FILE] [--section.field value ...]\n\npresets:")
        for name, preset in presets.items():
            text = f"  {name:16}{(preset.__doc__ or '').splitlines()[0]}"
            print(textwrap.fill(text, 90, subsequent_indent=" " * 18, break_on_hyphens=False))
        print("\nPRESET --help explains a preset and its fields")
        raise SystemExit(0 if words else 2)
    name = "" if words[0].startswith("-") else words.pop(0)
    values, unused = take_config(words), UNUSED.get(command, ())
    name = name or as_text(values.get("name", ""))
    if name not in presets:
        hint = nearest(name, presets, f"choose from {', '.join(presets)}")
        raise ValueError(f"unknown preset {name!r}: {hint}")
    words = [f"--{k}={as_text(v)}" for k, v in values.items() if not k.startswith(unused)] + words
    text = f"{presets[name].__doc__}{ABOUT_FILES}"
    return parse(presets[name](), words, f"{prog} {name}", text, unused)


def print_plan(plan: str, recipe: Any) -> None:
    """Print what a dry run shows: the plan, an empty line, and the recipe as JSON for --config."""
    fields = {key: value for key, value in flatten(recipe).items() if key != "run.dry_run"}
    text = re.sub(r"\.0(?=,?\n)", "", json.dumps(fields, indent=1))  # 100 and 100.0 look the same
    print(f"{plan}\n\n{text}")


def take_config(words: list[str]) -> dict[str, Any]:
    """Take ``--config FILE`` out of words; give the file's {"section.field": value}."""
    place = next((i for i, word in enumerate(words) if word.split("=")[0] == "--config"), None)
    if place is None:
        return {}
    end = place + 1 + ("=" not in words[place])
    path = Path("=".join(words[place:end]).partition("=")[2])
    del words[place:end]
    path = path / "config.json" if path.is_dir() else path
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text[text.rfind("\n{") + 1 :])  # above it a dry run prints its plan
        return {RENAMED.get(k, k): v for k, v in found.items() if not k.startswith(RECORDED)}
    except (ValueError, AttributeError):
        raise ValueError(f'{path} is not a valid JSON of {{"section.field": value}}') from None


def parse(
    form: Any, words: Sequence[str], prog: str = "", text: str = "", unused: tuple[str, ...] = ()
) -> Any:
    """Read words into a dataclass; or print its help, under ``text``, and exit.

    ``form`` is a class, whose fields without a default are positional, or a recipe, of which fields
    whose names begin as ``unused`` says are left out. Raises ValueError that names the option, its
    value and the fix.
    """
    import tyro  # here, because the library doesn't need it
    from tyro import _errors, conf  # the hook for errors is private: hence the exact version

    recipe = None if isinstance(form, type) else form
    known = list(flatten(recipe) if recipe else form.__dataclass_fields__)

    def explain(event: _errors.ParseErrorEvent) -> None:
        raise ValueError(one_line(event, words, known, unused)) from None

    if {"-h", "--help"} & set(words):
        print(inspect.cleandoc(text), end="\n\n")
    with _errors.on_parse_error(explain):
        return tyro.cli(
            type(recipe) if recipe else form, default=recipe or tyro.MISSING_NONPROP, args=words,
            prog=prog, description="", registry=reading_rules(recipe, unused),
            config=(conf.FlagConversionOff, conf.PositionalRequiredArgs,
                    conf.PositionalMetavarFromFieldName))  # fmt: skip


def reading_rules(recipe: Any, unused: tuple[str, ...]) -> Any:
    """Tell tyro how we write switches and a recipe's tuples, and which fields are left out."""
    from tyro import constructors as c

    rules = c.ConstructorRegistry()

    @rules.primitive_rule
    def one_word(info: c.PrimitiveTypeInfo) -> c.PrimitiveConstructorSpec | None:
        """A switch: alone, or with true or false. A tuple: a,b or a JSON list."""
        kinds = typing.get_args(info.type)
        if info.type is not bool and not (recipe and info.type_origin is tuple):
            return None
        flat = kinds and not any(map(typing.get_args, kinds))
        names = ["..." if kind is ... else kind.__name__.upper() for kind in kinds]
        metavar = ",".join(names) if flat else "JSON" if kinds else "[true|false]"
        return c.PrimitiveConstructorSpec(
            nargs=1 if kinds else (0, 1), metavar=metavar, is_instance=lambda value: True,
            instance_from_str=lambda words: from_text(info.type, "".join(words)),
            str_from_instance=lambda value: [
                ",".join(map(str, value)) if flat else as_text(value)])  # fmt: skip

    shown = {}
    for name, part in {"": recipe, **vars(recipe)}.items() if unused else ():
        if hasattr(part, "__dataclass_fields__"):
            found: Any = rules.get_struct_spec(c.StructTypeInfo.make(type(part), part, False))
            used = (f for f in found.fields
                    if not f"{name}.{f.name}".strip(".").startswith(unused))  # fmt: skip
            rebuild: Any = wraps(type(part))(
                lambda part=part, **new: dataclasses.replace(part, **new)
            )
            shown[type(part)] = c.StructConstructorSpec(rebuild, tuple(used))
    rules.struct_rule(lambda info: shown.get(info.type))
    return rules


def from_text(kind: Any, text: str) -> Any:
    """Read a number, a text, a switch, or a tuple: a,b or a JSON list."""
    kinds = typing.get_args(kind)
    if kind is bool:
        return ("false", "true").index(text.lower() or "true") == 1
    if not kinds:
        return kind(text)
    found = json.loads(text) if text[:1] == "[" else text.split(",") if text else []
    kinds = kinds[:1] * len(found) if ... in kinds else kinds
    return tuple(from_text(k, as_text(value)) for k, value in zip(kinds, found, strict=True))


def one_line(event: Any, words: Sequence[str], known: list[str], unused: tuple[str, ...]) -> str:
    """Say in one line what tyro found wrong with words."""
    from tyro import _errors as found

    options = re.findall(r"--\w.*?(?= --\w|$)", " ".join(words))
    typed = {field_of(text.split()[0]): text for text in options}
    match event:
        case found.UnrecognizedArgs(tokens=[word, *_]):
            flag = word.partition("=")[0]
            if not word.startswith("-"):
                return f"unexpected argument {word!r}: see --help"
            if field_of(word) in known:
                return f"{flag} means nothing to this command: leave it out"
            used = [f"--{f.replace('_', '-')}" for f in known if not f.startswith(unused)]
            return f"unknown option {flag}: {nearest(flag, used, 'see --help')}"
        case found.MissingArgs(missing_arguments=places):
            return f"missing {' and '.join(str(p.arg.lowered.metavar) for p in places)}: see --help"
        case found.InstantiationFailure(argument=None, message=message):
            named = [text for field, text in typed.items() if field.split(".")[-1] in message]
            return f"{' '.join(named or typed.values())}: {message}"
    flag = event.argument.lowered.name_or_flags[-1]
    if isinstance(event, found.BadValue):
        return f"option {flag} needs a value (usage: {event.prog} --help)"
    return f"{typed.get(field_of(flag), flag)}: {event.argument.lowered.metavar} expected"


def field_of(word: str) -> str:
    """Give the field that an option names."""
    return word[2:].partition("=")[0].replace("-", "_")


def as_text(value: Any) -> str:
    """Write a value as options take it."""
    return value if isinstance(value, str) else json.dumps(value)


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Say what may have been meant by an unknown name."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else otherwise


# RuntimeErrors whose cause a user can fix: what they hold, and the fix.
FIXES = {
    "DataLoader worker": "often out of memory: fewer --data.workers; the same command goes on",
    "OutOfMemoryError": "a smaller --run.micro-batch, or --run.checkpoint-activations",
    "deterministic implementation": "train without --run.deterministic",
}


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command: an error its user can fix ends in one line on stderr and exit status 2.

    ``BEVT_TRACEBACK=1`` shows the traceback as well.
    """
    message, status = "", 2
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # who reads it, as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        message, status = "interrupted: the same command continues from the last checkpoint", 130
    except (ValueError, OSError, RuntimeError) as error:
        message = explain_error(error)
        if not message or os.environ.get("BEVT_TRACEBACK"):
            raise
    if message:  # outside of except: the error's frames, and their threads, are gone
        print(message, file=sys.stderr)
        raise SystemExit(status)


def explain_error(error: Exception) -> str:
    """Say an error in one line; nothing if it is a RuntimeError that its user can't fix."""
    lines = str(error).strip().splitlines() or [repr(error)]
    if isinstance(error, RuntimeError):
        fixes = [fix for mark, fix in FIXES.items() if mark in repr(error)]
        return f"error: {lines[0]} ({fixes[0]})" if fixes else ""
    # A loader process wraps its error in a traceback: the last line is the error itself.
    return "error: " + re.sub(r"^[\w.]*Error: ", "", lines[-1])
