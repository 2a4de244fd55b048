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
from collections.abc import Callable, Iterable, Sequence
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


def choose(presets: dict[str, Callable[[], Any]], arguments: Sequence[str], command: str) -> Any:
    """Read ``PRESET --config FILE --section.field value ...`` and give the recipe.

    Raises ValueError that names the option, its value and the fix.
    """
    words, prog = list(arguments), f"python -m bevt_lib.{command}"
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {prog} PRESET [--config FILE] [--section.field value ...]\n\npresets:")
        for name, preset in presets.items():
            text = f"  {name:16}{inspect.cleandoc(preset.__doc__ or '').splitlines()[0]}"
            print(textwrap.fill(text, 90, subsequent_indent=" " * 18, break_on_hyphens=False))
        print("\nPRESET --help explains a preset and its fields")
        raise SystemExit(0 if words else 2)
    name = "" if words[0].startswith("-") else words.pop(0)
    values, unused = take_config(words), UNUSED.get(command, ())
    name = name or as_text(values.get("name", ""))
    if name not in presets:
        hint = nearest(name, presets, f"choose from {', '.join(presets)}")
        raise ValueError(f"unknown preset {name!r}: {hint}")
    held = [f"--{k}={as_text(v)}" for k, v in values.items() if not k.startswith(unused)]
    text = f"{presets[name].__doc__}{ABOUT_FILES}"
    return parse(presets[name](), held + words, f"{prog} {name}", text, unused)


def override(recipe: Any, words: Sequence[str]) -> Any:
    """Give a recipe with the values of ``--section.field value`` words, checked all together."""
    return parse(recipe, words)


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


def with_recipe(plan: str, recipe: Any) -> str:
    """Give what a dry run prints: the plan, an empty line, and the recipe as JSON for --config."""
    fields = {key: value for key, value in flatten(recipe).items() if key != "run.dry_run"}
    text = re.sub(r"\.0(?=,?\n)", "", json.dumps(fields, indent=1))  # 100 and 100.0 look the same
    return f"{plan}\n\n{text}"


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

    def explain(event: _errors.ParseErrorEvent) -> None:
        raise ValueError(one_line(event, words, known, unused)) from None

    if {"-h", "--help"} & set(words):
        print(inspect.cleandoc(text), end="\n\n")
    recipe = None if isinstance(form, type) else form
    known = list(flatten(recipe) if recipe else form.__dataclass_fields__)
    with _errors.on_parse_error(explain):
        return tyro.cli(
            type(recipe) if recipe else form, default=recipe or tyro.MISSING_NONPROP, args=words,
            prog=prog, description="", registry=reading_rules(recipe, unused),
            config=(conf.FlagConversionOff, conf.PositionalRequiredArgs,
                    conf.PositionalMetavarFromFieldName),
        )  # fmt: skip


def reading_rules(recipe: Any, unused: tuple[str, ...]) -> Any:
    """Tell tyro how we write switches and a recipe's tuples, and which fields are left out."""
    from tyro import conf
    from tyro import constructors as c

    rules, registry = c.ConstructorRegistry(), c.ConstructorRegistry

    @rules.primitive_rule
    def one_word(info: c.PrimitiveTypeInfo) -> c.PrimitiveConstructorSpec | None:
        """A switch: alone, or with true or false. A tuple: a,b or a JSON list."""
        kinds = typing.get_args(info.type)
        if info.type is not bool and not (recipe and info.type_origin is tuple):
            return None
        parts: Any = [registry.get_primitive_spec(c.PrimitiveTypeInfo.make(kind, set()))
                      for kind in kinds if kind is not ...]  # fmt: skip
        nested = any(map(typing.get_args, kinds))

        def switch(words: list[str]) -> bool:
            return ("false", "true").index(" ".join(words).lower() or "true") == 1

        def values(words: list[str]) -> tuple:
            text = words[0]
            found = json.loads(text) if text[:1] == "[" else text.split(",") if text else []
            each = zip(parts * len(found) if ... in kinds else parts, found, strict=True)
            return tuple(part.instance_from_str([as_text(value)]) for part, value in each)

        return c.PrimitiveConstructorSpec(
            nargs=1 if kinds else (0, 1), instance_from_str=values if kinds else switch,
            metavar="JSON" if nested else
            ",".join([p.metavar for p in parts] + ["..."] * (... in kinds)) or "[true|false]",
            str_from_instance=lambda value: [
                ",".join(map(str, value)) if kinds and not nested else as_text(value)],
            is_instance=lambda value: True,
        )  # fmt: skip

    shown, suppress = {}, typing.cast(Any, conf.Suppress)
    for name, part in {"": recipe, **vars(recipe)}.items() if unused else ():
        if dataclasses.is_dataclass(part):
            spec: Any = registry.get_struct_spec(c.StructTypeInfo.make(type(part), part, False))
            shown[type(part)] = dataclasses.replace(spec, fields=tuple(
                dataclasses.replace(f, type=suppress[f.type])
                if f"{name}.{f.name}".strip(".").startswith(unused) else f
                for f in spec.fields))  # fmt: skip
    rules.struct_rule(lambda info: shown.get(info.type))
    return rules


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
            known = [option(field) for field in known if not field.startswith(unused)]
            return f"unknown option {flag}: {nearest(flag, known, 'see --help')}"
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


def option(field: str) -> str:
    """Write a field as an option."""
    return "--" + field.replace("_", "-")


def as_text(value: Any) -> str:
    """Write a value as options take it."""
    return value if isinstance(value, str) else json.dumps(value)


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Say what may have been meant by an unknown name."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else otherwise


# RuntimeErrors whose cause a user can fix: what they hold, and the fix.
FIXES = {
    "DataLoader worker": "often for lack of memory: fewer --data.workers; the same command "
                         "continues from the last checkpoint",
    "OutOfMemoryError": "a smaller --run.micro-batch, or --run.checkpoint-activations",
    "deterministic implementation": "train without --run.deterministic",
}  # fmt: skip


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command: an error its user can fix ends in one line on stderr and exit status 2.

    ``BEVT_TRACEBACK=1`` shows the traceback as well.
    """
    message, status = "", 2
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        message, status = "interrupted: the same command continues from the last checkpoint", 130
    except (ValueError, OSError) as error:
        if os.environ.get("BEVT_TRACEBACK"):
            raise
        # A loader process wraps its error in a traceback: the last line is the error itself.
        line = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        message = "error: " + re.sub(r"^[\w.]*Error: ", "", line)
    except RuntimeError as error:
        fix = next((fix for mark, fix in FIXES.items() if mark in repr(error)), "")
        if not fix or os.environ.get("BEVT_TRACEBACK"):
            raise
        message = f"error: {str(error).splitlines()[0]} ({fix})"
    if message:  # outside of except: the error's frames, and their threads, are gone
        print(message, file=sys.stderr)
        raise SystemExit(status)
