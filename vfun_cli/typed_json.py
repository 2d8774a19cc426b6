"""JSON that anybody may have edited: read with bounds on its size and depth, its fields of the types and ranges stated.

    STATE = {"step": whole(), "family": text(), "layouts": optional(items(record({"until": whole()})))}
    state = read_object(folder / "state.json", STATE)

A field that is null counts as left out. Fields that are not stated may hold anything: newer versions write more.
"""

import json
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vfun_cli.errors import CheckpointError, first_line
from vfun_cli.files import LONGEST_NAME, has_too_long_a_name, open_bounded
from vfun_cli.lfs import refuse_lfs_pointer

Check = Callable[[str, Any], None]
"""Takes the name and the value of a field; raises ValueError, which says what is wrong with it."""

LARGEST_FILE = 1 << 26
"""Bytes; the index of a model of a million tensors is as large."""

DEEPEST = 64
"""Lists and objects inside each other; released configurations have up to six."""

LARGEST_NUMBER = 2**63 - 1
LONGEST_PATH = 4096


def read_object(path: Path, fields: Mapping[str, Check] | None = None, *, hint: str | None = None) -> dict[str, Any]:
    """The object of a JSON file, once its fields have passed their checks.

    Raises:
        CheckpointError: the file cannot be read, is no JSON object, or a field is not what it should be; names both.
    """
    refuse_lfs_pointer(path)
    try:
        with open_bounded(path, LARGEST_FILE) as file:
            content = file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", hint=hint, at=path) from None
    try:
        return parse_object(content, str(path), fields, hint=hint)
    except CheckpointError as error:
        error.at = path
        raise


def parse_object(
    content: bytes | str,
    where: str,
    fields: Mapping[str, Check] | None = None,
    *,
    unique: bool = False,
    hint: str | None = None,
) -> dict[str, Any]:
    """The same of a text; ``where`` names it in errors.

    Args:
        unique: refuse a name that an object has twice, of which Python takes the last and other readers the first.

    Raises:
        CheckpointError: as of ``read_object``.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        found = json.loads(text, object_pairs_hook=_once if unique else None)
        if is_deeper(found, DEEPEST):
            raise ValueError(_TOO_DEEP)
    except RecursionError:
        raise CheckpointError(f"{where} is damaged: {_TOO_DEEP}.", hint=hint) from None
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: it is not valid JSON ({first_line(error)}).", hint=hint) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is damaged: it holds no JSON object.", hint=hint)
    check_fields(found, fields or {}, where, hint=hint)
    return found


def check_fields(
    content: Mapping[str, Any], fields: Mapping[str, Check], where: str, *, hint: str | None = None
) -> None:
    """Let an object pass whose fields pass their checks.

    Raises:
        CheckpointError: one does not; names it.
    """
    try:
        for name, check in fields.items():
            check(name, content.get(name))
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: {error}.", hint=hint) from None


# What a field may be ------------------------------------------------------------------------------------------------


def whole(least: int = 0, most: int = LARGEST_NUMBER) -> Check:
    """A whole number in a range."""

    def check(name: str, value: Any) -> None:
        if type(value) is not int or not least <= value <= most:
            _refuse(name, value, f"a whole number from {least} to {most}")

    return check


def number(least: float = -math.inf, most: float = math.inf) -> Check:
    """A finite number in a range, whole or not."""

    def check(name: str, value: Any) -> None:
        # comparing is exact for every integer; math.isfinite would overflow
        if type(value) not in (int, float) or not -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT:
            _refuse(name, value, "a finite number")
        if not least <= value <= most:
            _refuse(name, value, f"a number from {least:g} to {most:g}")

    return check


_LARGEST_FLOAT = 1.7976931348623157e308


def text(longest: int = 4096) -> Check:
    """Text that can be written as UTF-8, without NUL."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or len(value) > longest:
            _refuse(name, value, f"text of at most {longest} characters")
        if "\0" in value or not _can(value.encode):
            _refuse(name, value, "text without NUL and half characters")

    return check


def text_or_path(name: str, value: Any) -> None:
    """Text of any meaning: also the path of a file whose name is no UTF-8."""
    if not isinstance(value, str) or len(value) > LONGEST_PATH:
        _refuse(name, value, f"a path of at most {LONGEST_PATH} characters")
    if "\0" in value or not _can(lambda: os.fsencode(value)):
        _refuse(name, value, "a path without NUL and half characters")


def file_path(name: str, value: Any) -> None:
    """The same of what a file can be called."""
    text_or_path(name, value)
    if has_too_long_a_name(value):
        _refuse(name, value, f"a path whose names have at most {LONGEST_NAME} bytes")


def one_of(*known: str | int) -> Check:
    """One of a few values."""

    def check(name: str, value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in known):
            _refuse(name, value, f"one of {', '.join(map(str, known))}" if len(known) > 1 else f"{known[0]}")

    return check


def flag(name: str, value: Any) -> None:
    """True or false."""
    if not isinstance(value, bool):
        _refuse(name, value, "true or false")


def file_inside(name: str, value: Any) -> None:
    """The path of a file below the folder that the JSON lies in."""
    text()(name, value)
    if not stays_inside(value):
        _refuse(name, value, "the path of a file inside the folder")


def optional(check: Check) -> Check:
    """The same, or nothing."""

    def check_if_there(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return check_if_there


def items(check: Check, *, least: int = 0, most: int = 1_000_000) -> Check:
    """A list of such values."""

    def check_all(name: str, value: Any) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            _refuse(name, value, f"a list of {least} to {most} values")
        for number, item in enumerate(value):
            check(f"{name}[{number}]", item)

    return check_all


def mapping(check: Check, key: Check | None = None) -> Check:
    """An object whose values are such values, under any names that are text; ``key`` checks them further."""
    check_key = key or text()

    def check_all(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            _refuse(name, value, "an object")
        for inner, item in value.items():
            check_key(f"a name in {name}", inner)
            check(f"{name}[{shown(inner)}]", item)

    return check_all


def record(fields: Mapping[str, Check]) -> Check:
    """An object with these fields."""

    def check_all(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            _refuse(name, value, "an object")
        for inner, check in fields.items():
            check(f"{name}.{inner}", value.get(inner))

    return check_all


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects lie in it more than ``most`` within each other; what shows or writes it recurses."""
    level = [value]
    for _ in range(most + 1):
        inside = [each for each in level if isinstance(each, dict | list)]
        if not inside:
            return False
        level = [item for each in inside for item in (each.values() if isinstance(each, dict) else each)]
    return True


def stays_inside(name: str) -> bool:
    """Whether the path of that name, from a folder, is of something in the folder."""
    inside = PurePosixPath(name)
    return bool(inside.parts) and not inside.is_absolute() and ".." not in inside.parts


def shown(value: Any) -> str:
    """A value in an error: in one line, short, without characters that steer a terminal."""
    return reprlib.repr(value)


# -------------------------------------------------------------------------------------------------------------------

_TOO_DEEP = f"lists and objects lie more than {DEEPEST} deep inside each other"


def _refuse(name: str, value: Any, takes: str) -> None:
    if value is None:
        raise ValueError(f"{name} is missing")
    raise ValueError(f"{name} is {shown(value)}; it takes {takes}")


def _can(encode: Callable[[], bytes]) -> bool:
    try:
        encode()
    except UnicodeEncodeError:
        return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a name twice")
    return found
