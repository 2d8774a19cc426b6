"""What becomes of each thing that a script says."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vfun_cli.scripts.shell import Word

Outcome = Literal["kept", "translated", "without effect", "differs", "refused"]
OUTCOMES: tuple[Outcome, ...] = ("kept", "translated", "without effect", "differs", "refused")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One of them."""

    outcome: Outcome
    original: str
    """What the script says or, where it differs, what the original does."""
    vfun: str
    """What it becomes, or why it is left out."""
    line: int | None = None
    """Of the script; None: it says nothing of it."""

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {"outcome": self.outcome, "line": self.line, "original": self.original, "vfun": self.vfun}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An option of the run."""

    name: str
    value: Any
    """As the option's type has it; None where the script does not say it."""
    word: "Word | None" = None
    """What stands in the place of a value that the script does not say."""
    raw: str | None = None
    """Of a path, as it was typed: with ~ and its last slash."""
