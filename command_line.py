"""Command lines: tyro's parser for a dataclass of flags, with refusals of one line. Importable without torch."""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from typing import Literal, get_args, get_origin

import tyro

from endings import Refused


def shorten(value) -> str:
    """The value as text for a message, truncated to 24 characters."""
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def parse_flags(flags, args=None, default=None):
    """Command line -> instance of the dataclass `flags`; missing flags come from the instance `default`.

    --help shows the flags of each base class as a group. It prints and exits; bad input raises `Refused`.
    """
    args = sys.argv[1:] if args is None else list(args)
    _check_words(flags, args)
    groups = [base for base in reversed(flags.__bases__) if dataclasses.is_dataclass(base)]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            if not groups:
                return tyro.cli(flags, args=args, default=default, use_underscores=True)
            parts = tyro.cli(_nested(flags, groups, default or flags()), args=args, use_underscores=True)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise Refused(_one_line(errors.getvalue())) from None
    return flags(**{name: value for part in vars(parts).values() for name, value in vars(part).items()})


def _nested(flags, groups, default):
    """The class that makes tyro show groups: a dataclass with one field per group, with the values of `default`."""
    fields = []
    for group in groups:
        values = {field.name: getattr(default, field.name) for field in dataclasses.fields(group)}
        fields.append((group.__name__.removesuffix("Flags"), group, group(**values)))
    nested = dataclasses.make_dataclass("Flags", fields, frozen=True)
    nested.__doc__ = flags.__doc__
    return tyro.conf.OmitArgPrefixes[nested]


def _check_words(flags, args) -> None:
    """Refuse unknown flags, empty or malformed values and invalid choices before tyro prints its box."""
    types = {f"--{field.name}": field.type for field in dataclasses.fields(flags)}
    may_be_empty = [f"--{field.name}" for field in dataclasses.fields(flags) if field.default == ""]
    known = [*types, *(f"--no_{flag[2:]}" for flag, type_ in types.items() if type_ is bool)]
    for i, word in enumerate(args):
        if word in ("-h", "--help"):
            return
        if not re.match(r"--?[a-zA-Z]", word):
            continue
        given, equals, value = word.partition("=")
        flag = given.replace("-", "_").replace("__", "--", 1)
        if flag not in known:
            nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0.65)
            right = f"the nearest is {nearest[0]}" if nearest else "--help lists them"
            raise Refused(f"unrecognized flag {shorten(given)}; {right}")
        has_value = equals or i + 1 < len(args)
        value = value if equals else "".join(args[i + 1 : i + 2])
        kinds = get_args(types.get(flag)) or (types.get(flag),)
        if flag not in types or types[flag] is bool:  # one of known's switches
            if equals or value.lower() in ("true", "false", "1", "0"):
                name = flag.removeprefix("--no_").removeprefix("--")
                raise Refused(f"{flag} {shorten(value)}: takes no value; --{name} switches it on, --no_{name} off")
        elif has_value and not value and flag not in may_be_empty:  # such as an unset variable of the shell
            raise Refused(f"{flag}: must not be empty")
        if get_origin(types.get(flag)) is Literal and value not in kinds:
            raise Refused(f"{flag} {shorten(value)}: must be one of {', '.join(kinds)}")
        for number, right in ((int, "a whole number"), (float, "a number")):
            if number in kinds and value and not (value == "None" and type(None) in kinds):
                try:
                    number(value)
                except ValueError:
                    raise Refused(f"{flag} {value}: must be {right}") from None


def _one_line(box: str) -> str:
    """tyro's boxed message as one line, without its pointers to --help."""
    message = re.split("Argument helptext|For full helptext", box.partition("\n")[2])[0]
    lines = (line.strip("│╰╯╭╮─|+- ") for line in message.splitlines())  # - and + on ASCII terminals
    return " ".join(" ".join(lines).split())
