"""What becomes of each thing that a script says."""

from dataclasses import dataclass
from typing import Any, Literal

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
