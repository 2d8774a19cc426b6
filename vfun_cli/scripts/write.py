"""A translated launch as the command line and as the ``vfun.toml`` that start it."""

import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vfun_cli.config.options import options, plain, plain_kind, typed_entries
from vfun_cli.config.strategies import STRATEGY_FLAGS
from vfun_cli.errors import as_flag
from vfun_cli.scripts.rows import Setting

if TYPE_CHECKING:
    from vfun_cli.scripts.translate import Translation

_STRATEGY_FLAG = {
    strategy: flag.replace("_", "-") for flag, strategy in STRATEGY_FLAGS.items() if not flag.startswith("use_")
}


def as_typed(setting: Setting) -> list[str]:
    """An option as words of a shell, quoted for it."""
    name, option = setting.name, as_flag(setting.name)
    if setting.word is not None:
        return [f"{option}={setting.word.typed}"]
    return [shlex.quote(word) for word in words_of(name, option, setting)]


def words_of(name: str, option: str, setting: Setting) -> list[str]:
    """An option as a program gets it."""
    value = setting.value if setting.raw is None else setting.raw
    if name == "strategy" and value in _STRATEGY_FLAG:
        return [f"--{_STRATEGY_FLAG[value]}"]
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    if isinstance(value, tuple):
        return [word for entry in typed_entries(name, value) for word in _pair(option, entry)]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return _pair(option, str(plain(value)))


def _pair(option: str, value: str) -> list[str]:
    return [f"{option}={value}"] if value.startswith("-") else [option, value]


def arguments(translation: "Translation", environ: Mapping[str, str]) -> list[str]:
    """The command as a program gets it, without ``vfun``; ``environ``: what the script's unset variables are."""
    found = [translation.command, translation.family]
    for setting in translation.settings:
        option = as_flag(setting.name)
        if setting.word is None:
            found += words_of(setting.name, option, setting)
        else:
            found.append(f"{option}={setting.word.filled_in(environ)}")
    return found


def command_line(translation: "Translation") -> str:
    """The command, to be pasted into a shell."""
    variables = [f"{name}={word.typed}" for name, word in translation.environment.items()]
    first = " ".join([*variables, "vfun", translation.command, translation.family])
    return " \\\n  ".join([first, *(" ".join(as_typed(setting)) for setting in translation.settings)])


def toml(translation: "Translation") -> str:
    """The same as a ``vfun.toml``."""
    start = " ".join(["vfun", translation.command, translation.family])
    lines = [f"# {translation.launch.script.text}, started by: {start}"]
    lines += [f"# Export it too: {name}={word.typed}" for name, word in translation.environment.items()]
    lines += ["", f"[{_key(translation.family)}]"]
    for setting in translation.settings:
        if setting.word is not None:
            lines.append(
                f"# {setting.name} = {double_quoted(setting.word.text)}  # the script does not say it: type it"
            )
        else:
            value = setting.value if setting.raw is None else setting.raw
            lines.append(f"{setting.name} = {_value(setting.name, value)}")
    return "\n".join([*lines, ""]).replace("\r", " ")


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(str(each) if isinstance(each, int) else double_quoted(str(each)) for each in value)}]"
    if isinstance(value, int | float):
        return repr(float(value)) if plain_kind(options()[name][1]) is float else str(value)
    return double_quoted(str(plain(value)))


def _key(name: str) -> str:
    """A name as a key of TOML: bare, where it may be."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else double_quoted(name)


def double_quoted(value: str) -> str:
    """A basic string of TOML, which is a double-quoted one of YAML too."""
    escaped = "".join(_ESCAPES.get(letter) or (letter if letter.isprintable() else _escape(letter)) for letter in value)
    return f'"{escaped}"'


_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}


def _escape(letter: str) -> str:
    return f"\\U{ord(letter):08x}"
