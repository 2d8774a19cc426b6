"""The errors a user can act on, one class per exit code.

    VfunError
    ├── RunError          1   the run failed
    │   └── Unforeseen        of something that may not happen again
    ├── ConfigError       2   usage or configuration
    ├── MetadataError     3   data rejected
    ├── FitError          4   does not fit in memory
    ├── CheckpointError   5   checkpoint or export invalid, resume refused
    └── EnvironmentFault  6  missing package, no such device

Every error says what was found, where, why it cannot go on, and (``hint``) the next command.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class VfunError(Exception):
    """Base of all errors that end a command with one message and an exit code."""

    exit_code = 1
    usual_hint: str | None = None
    """The next step where an error names none of its own."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint
        self.rank: int | None = None
        """The training process that met it, where all of them raise it together."""


class RunError(VfunError):
    """The run started and failed."""

    exit_code = 1


class Unforeseen(RunError):
    """The run failed of what nobody wrote a message for: an error of a library, or a fault of vfun."""


class ConfigError(VfunError):
    """An option, a configuration file or a combination of options is wrong."""

    exit_code = 2
    usual_hint = "The command's --help and docs/options.md say what each option takes."

    def __init__(self, message: str, *, hint: str | None = None, option: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.option = option
        """The one that is wrong, where it is one."""


class MetadataError(VfunError):
    """The dataset or its metadata cannot be trained on."""

    exit_code = 3
    usual_hint = "Every problem of the metadata at once: vfun validate-meta"

    def with_command(self, command: str) -> "MetadataError":
        """The same where the metadata are known: the hint names them to ``vfun validate-meta`` if it names none yet."""
        hint = re.sub("vfun validate-meta(?! [^-])", lambda _: command, self.hint or "")
        return MetadataError(self.message, hint=hint)


class FitError(VfunError):
    """The run needs more memory than there is."""

    exit_code = 4


class CheckpointError(VfunError):
    """A checkpoint, a model directory or an export is not what it should be."""

    exit_code = 5
    usual_hint = "Copy or download these files again, or name an older checkpoint."

    def __init__(self, message: str, *, hint: str | None = None, at: Path | None = None) -> None:
        super().__init__(message, hint=hint)
        self.at = at
        """The file or folder that is missing or damaged, where it is one: ``families.releases`` says how to get it."""


class EnvironmentFault(VfunError):
    """The machine lacks a package, a device or a permission."""

    exit_code = 6
    usual_hint = "Mend this on the machine, or choose another place with --output-dir."


class Interrupted(VfunError):
    """Ctrl-C while there was nothing to save."""

    exit_code = 130


class StoppedAtOnce(VfunError):
    """A second Ctrl-C ended the run without saving."""

    exit_code = 130


EXIT_PREEMPTED = 75
"""State saved after a preemption signal: run ``vfun resume``."""

EXIT_INTERRUPTED = StoppedAtOnce.exit_code
"""Stopped by Ctrl-C."""

EXIT_CLOSED_PIPE = 141
"""Whoever read stdout has gone (``vfun ... | head``): what a shell says of a program that SIGPIPE ended."""


def as_flag(name: str) -> str:
    """An option as it is typed: ``--max-train-steps`` for ``max_train_steps``."""
    return f"--{name.replace('_', '-')}"


def first_line(error: BaseException) -> str:
    """What another library says first, without its full stop, to stand in a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest known word, or an empty string."""
    near = get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
