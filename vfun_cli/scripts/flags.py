"""Words of a command line as flags with their values, the way the originals' argparse reads them."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from vfun_cli.errors import ConfigError, did_you_mean
from vfun_cli.scripts.shell import Word

Arity = Literal["none", "one", "more"]
"""How many values a flag takes; ``more`` is one at least."""

_NUMBER = re.compile(r"-\.?\d")


@dataclass(frozen=True, kw_only=True)
class Typed:
    """A flag as the script has it."""

    name: str
    """In full, with underscores."""
    spelled: str
    """As it stands there, without its value."""
    line: int
    values: tuple[Word, ...]

    @property
    def text(self) -> str:
        """Of its values, as they are read."""
        return " ".join(word.text for word in self.values)

    @property
    def shown(self) -> str:
        """As it was typed, for people."""
        return f"--{self.name} {self.text}".strip()

    @property
    def settled(self) -> bool:
        """Whether the script says its value."""
        return all(word.settled for word in self.values)


def read_flags(
    words: Sequence[Word], known: Collection[str], arity: Callable[[str], Arity], where: str, program: str
) -> Iterator[Typed]:
    """The flags of a command line.

    Args:
        known: their names; an unambiguous beginning of one stands for it.
        where: begins the message of an error, before ``line``.
        program: whose flags they are, for such a message.

    Raises:
        ConfigError: a flag that there is not, a value that is missing, or one too many.
    """
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if "\n--" in re.sub(r"\n\s*", "\n", word.text):
            raise ConfigError(
                f"{where}, line {word.line}: a quote is opened here and closed lines later, so that options are "
                "inside of it.",
                hint="Close it where its value ends.",
            )
        spelled, equals, _ = word.text.partition("=")
        if not spelled.startswith("--") or not word.parts or word.parts[0].kind != "text":
            raise ConfigError(
                f"{where}, line {word.line}: {word.text!r} stands where a flag is expected.",
                hint="If it belongs to the value before it, quote both together.",
            )
        name = full_name(spelled.lstrip("-").replace("-", "_"), known)
        if name is None:
            plain = spelled.lstrip("-").replace("-", "_")
            raise ConfigError(
                f"{where}, line {word.line}: {spelled} is no flag of {program}.{did_you_mean(plain, known)}",
                hint="Correct it, or leave it out.",
            )
        takes, values = arity(name), list[Word]()
        if equals:
            values.append(word.after(len(spelled) + 1))
        elif takes != "none":
            while position < len(words) and _is_value(words[position]) and (takes == "more" or not values):
                values.append(words[position])
                position += 1
            if not values:
                raise ConfigError(f"{where}, line {word.line}: {spelled} has no value.", hint="Give it one.")
        yield Typed(name=name, spelled=spelled, line=word.line, values=tuple(values))


def full_name(typed: str, known: Collection[str]) -> str | None:
    """The flag that a name or its beginning means; None: none, or several."""
    if typed in known:
        return typed
    fitting = [name for name in known if name.startswith(typed)]
    return fitting[0] if len(fitting) == 1 and typed else None


def _is_value(word: Word) -> bool:
    return not word.text.startswith("-") or _NUMBER.match(word.text) is not None
