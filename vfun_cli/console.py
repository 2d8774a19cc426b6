"""The two consoles: results on stdout, everything said about the work on stderr.

What is printed is taken literally: no markup, no emoji names, and no character that moves the cursor, colours or
reorders a terminal. Captions, paths and tensor names come from anywhere; our own styles are ``rich.text.Text``.
"""

import io
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from vfun_cli.errors import EnvironmentFault, VfunError

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls but tab and newline; ESC and CSI begin a terminal's commands
    "\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff"  # bidirectional controls and what has no width
    "\u2028\u2029\ud800-\udfff]"  # other ends of lines; halves of characters, which stand for bytes of odd file names
)
_RAW_BYTES = range(0xDC80, 0xDD00)
"""What Python makes of bytes of a file name that are no UTF-8: the byte and 0xDC00."""


def visible(text: str) -> str:
    """The text with every character that would not be seen on a terminal, or would work on it, as an escape."""
    return _UNSEEN.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    if code in _RAW_BYTES:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class OutputClosed(BaseException):
    """Whoever read stdout has gone, as ``head`` does: nobody is left to tell anything."""


class _Stream(io.TextIOBase):
    """stdout or stderr of this moment, and what it means that it cannot be written."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def _now(self) -> TextIO:
        if getattr(sys, self.name) is None:  # the process was started without one: ">&-"
            setattr(sys, self.name, Path(os.devnull).open("w", encoding="utf-8"))
        stream: TextIO = getattr(sys, self.name)
        return getattr(stream, "rich_proxied_file", stream)  # beside a bar, Rich stands between to print above it

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._now.encoding or "utf-8"

    def isatty(self) -> bool:
        return self._now.isatty()

    def fileno(self) -> int:
        return self._now.fileno()

    def write(self, text: str) -> int:
        try:
            return self._now.write(text)
        except OSError as error:
            self._failed(error)
            return 0

    def write_file(self, content: bytes) -> None:
        """The bytes of a text in UTF-8, whatever the stream's own encoding is."""
        self.flush()
        bytes_of = getattr(self._now, "buffer", None)
        if bytes_of is None:  # a stream that is none of Python's own
            self.write(content.decode())
            return
        try:
            bytes_of.write(content)
        except OSError as error:
            self._failed(error)

    def flush(self) -> None:
        try:
            self._now.flush()
        except OSError as error:
            self._failed(error)

    def close(self) -> None:
        """Nothing: the stream is Python's own. As of Python 3.13 it would say at exit that it cannot flush."""

    def _failed(self, error: OSError) -> None:
        """What is said about the work may be lost, the work not; results must arrive."""
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, self.fileno())  # the rest goes nowhere, what Python writes at its end included
        os.close(descriptor)
        if self.name == "stderr":
            return
        if isinstance(error, BrokenPipeError):
            raise OutputClosed from None
        raise EnvironmentFault(
            f"the results cannot be written to stdout: {error.strerror}.", hint="Send them to another place."
        ) from None


class _Console(Console):
    """Rich's, without anything that a text could do to the terminal."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__(file=cast(TextIO, stream), highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        """A plain text, escaped before it is measured."""
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything else, once it is laid out."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


_stdout = _Stream("stdout")
out = _Console(_stdout)
err = _Console(_Stream("stderr"))


def never_fail() -> None:
    """Write what the encoding of stdout lacks (a bar, an arrow, a caption) as escapes; Python's stderr does so itself.

    For the start of a process: LANG=C, a Windows code page or PYTHONIOENCODING must not end a command.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


_printed: list[int] = []


def json_objects() -> int:
    """How many JSON objects this process has printed."""
    return len(_printed)


def print_json(content: dict[str, Any]) -> None:
    """One JSON object with the schema number on stdout: UTF-8 in any locale."""
    _printed.append(len(content))
    in_utf8 = _stdout.encoding.lower().replace("-", "") == "utf8"
    text = json.dumps({"schema": 1, **content}, ensure_ascii=not in_utf8)
    _stdout.write(_UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def print_file(content: bytes) -> None:
    """What would be a file on stdout, which may be sent into one."""
    _stdout.write_file(content)


def flush() -> None:
    """Let a failure to write results show now, while it can still be told."""
    _stdout.flush()


def hint(text: str) -> None:
    """A suggestion, on stderr."""
    _say(Text(_indented(text), "dim"))


def warn(text: str) -> None:
    """Something the user should know that does not stop the command."""
    _say(Text.assemble(("warning:", "yellow"), " ", _indented(text)))


def report(error: VfunError) -> None:
    """What, where, why, and the next command."""
    _say(Text.assemble(("error:", "bold red"), " ", _indented(error.message)))
    if error.hint:
        _say(Text.assemble(("next:", "cyan"), " ", _indented(error.hint)))


def trace(error: BaseException) -> None:
    """Where an error was raised, for --debug."""
    _say(Text(_indented("".join(traceback.format_exception(error)))))


def _say(text: Text) -> None:
    err.print(text, soft_wrap=True)


def _indented(text: str) -> str:
    """No line but the first begins at the margin, where our own words stand: a file name may hold a newline."""
    return re.sub(r"\n(?!\s)", "\n  ", text)
