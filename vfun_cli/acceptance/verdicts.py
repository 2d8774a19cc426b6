"""From what a row's commands did to whether it is right."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vfun_cli.acceptance.rows import Row
from vfun_cli.errors import CheckpointError

Kind = Literal["right", "wrong", "skipped", "not run"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""``skipped``: the machine lacks what the row needs, or what it comes after did not work; ``not run``: out of time."""

MEASURED = ("grad_norm", "seconds", "tokens_per_second", "memory_bytes")
"""What is kept of a run's last step beside its loss."""

LEAST_LOSS = 1e-6
"""A difference from a smaller loss is not taken relative to it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the commands of a row did."""

    exit_codes: tuple[int, ...]
    """Of those that ran; after an unexpected one, no other ran."""
    said: str = ""
    """By the last one."""
    losses: Mapping[int, float | None] = field(default_factory=dict)
    """By step; None is no finite number."""
    last_step: Mapping[str, Any] = field(default_factory=dict)
    """Some numbers of the last one: MEASURED."""
    weights: tuple[Path, ...] = ()
    """Checkpoints and exports that are compared; where a command failed they need not be there."""
    seconds: float = 0.0
    too_long: bool = False
    """It was ended because it took longer than a row may."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one row."""

    kind: Kind
    why: str = ""
    deviation: float | None = None
    """The largest relative difference from the losses and weights of the reference, or from a forecast."""


def judge(row: Row, outcome: Outcome, reference: Outcome | None) -> Verdict:
    """Whether a row that ran is right.

    Args:
        reference: of the row that it is compared with; it need not have been right.
    """
    if why := _fault(row, outcome):
        return Verdict(kind="wrong", why=why)
    if row.says_how_far_off:
        return _as_it_says(row, outcome)
    if row.reference is None:
        return Verdict(kind="right")
    if reference is None or not reference.losses:
        return Verdict(kind="wrong", why=f"nothing to compare with: {row.reference} has no losses")
    try:
        off, what = max([*_losses_off(row, outcome, reference), *_weights_off(row, outcome, reference)])
    except CheckpointError as error:
        return Verdict(kind="wrong", why=error.message)
    if off <= row.bound:
        return Verdict(kind="right", deviation=off)
    return Verdict(kind="wrong", why=what, deviation=off)


def _as_it_says(row: Row, outcome: Outcome) -> Verdict:
    found = _OFF.search(outcome.said)
    if found is None:
        return Verdict(kind="wrong", why=f"did not say how far it is off: {_error(outcome.said)}")
    off = float(found[1])
    if off <= row.bound:
        return Verdict(kind="right", deviation=off)
    return Verdict(kind="wrong", why=f"what was forecast is {off:.3g} off", deviation=off)


_OFF = re.compile(r"^at most (\S+) off$", re.MULTILINE)


def _losses_off(row: Row, outcome: Outcome, reference: Outcome) -> Iterator[tuple[float, str]]:
    """How far the loss of each step is off, and that in words."""
    for step in row.steps or reference.losses:
        found, wanted = outcome.losses.get(step), reference.losses.get(step)
        what = f"the loss of step {step} is {_shown(found)}, that of {row.reference} {_shown(wanted)}"
        yield _deviation(found, wanted), what


def _weights_off(row: Row, outcome: Outcome, reference: Outcome) -> Iterator[tuple[float, str]]:
    """How far the weights of each checkpoint and export are off, and that in words.

    Raises:
        CheckpointError: of an outcome or its reference, which is not there or cannot be read.
    """
    from vfun_cli.checkpoints.compare import distance
    from vfun_cli.checkpoints.reader import open_checkpoint

    for found, wanted in zip(outcome.weights, reference.weights, strict=True):
        off = distance(open_checkpoint(found).weights, open_checkpoint(wanted).weights)
        yield off, f"the weights of {found.name} are {off:.3g} off those of {row.reference}"


def _fault(row: Row, outcome: Outcome) -> str:
    """What is wrong with a row in itself; nothing: an empty text."""
    if outcome.too_long:
        return f"ended after {outcome.seconds:.0f} s"
    if unwanted := [text for text in row.never_says if text in outcome.said]:
        return f"said {unwanted[0]!r}: {_error(outcome.said)}"
    expected = [0] * (len(row.commands) - 1) + [row.exit_code]
    for code, wanted in zip(outcome.exit_codes, expected, strict=False):
        if code != wanted:
            return f"exit code {code} instead of {wanted}: {_error(outcome.said)}"
    if absent := [text for text in row.says if text not in outcome.said]:
        return f"did not say {absent[0]!r}: {_error(outcome.said)}"
    if row.losses and not outcome.losses:
        return "recorded no loss"
    if bad := [step for step, loss in outcome.losses.items() if loss is None]:
        return f"the loss of step {bad[0]} is no number"
    return ""


def _shown(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.6g}"


def _deviation(loss: float | None, reference: float | None) -> float:
    if loss is None or reference is None:
        return math.inf
    return abs(loss - reference) / max(abs(reference), LEAST_LOSS)


def _error(said: str) -> str:
    """The first error that a command told, or its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[0] if errors else (lines or ["it said nothing"])[-1]
