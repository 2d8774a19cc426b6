"""A small reader of shell text: its commands and what its variables are by then. Nothing is ever run.

Read are comments, quotes, continued lines, variables with their defaults, arrays and several commands. What only a
shell can know (conditions, loops, functions, the output of commands) is left out and said, never guessed.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from vfun_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a word."""

    text: str
    """Characters, the name of a variable, or as it stands what only a shell can work out."""
    kind: Literal["text", "variable", "unread"] = "text"
    quoted: bool = False
    """Blanks of an expansion that is not quoted end the word."""
    default: tuple["Part", ...] | None = None
    """Of a variable, if it is not set."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """One word of a command."""

    line: int
    parts: tuple[Part, ...]
    array: "tuple[Word, ...] | None" = None
    """What ``NAME=(...)`` has between its brackets."""

    @property
    def settled(self) -> bool:
        """Whether the text says all of it."""
        return all(part.kind == "text" for part in self.parts)

    @property
    def variables(self) -> tuple[str, ...]:
        """Those whose values the text does not say."""
        return tuple(part.text for part in self.parts if part.kind == "variable")

    @property
    def text(self) -> str:
        """With ``$NAME`` for what is not settled."""
        return "".join(_MARKS[part.kind].format(part.text) for part in self.parts)

    @property
    def typed(self) -> str:
        """As it is typed into a shell for the same meaning."""
        if self.settled:
            return shlex.quote(self.text)
        pieces = (
            re.sub(r'([\\"$`])', r"\\\1", part.text) if part.kind == "text" else _TYPED[part.kind].format(part.text)
            for part in self.parts
        )
        return f'"{"".join(pieces)}"'

    def filled_in(self, environ: Mapping[str, str]) -> str:
        """With the values of variables that the script does not say; without one, the variable as it stands."""
        return "".join(
            environ.get(part.text, f"${part.text}") if part.kind == "variable" else part.text for part in self.parts
        )

    def after(self, start: int) -> "Word":
        """The same without its first characters, which are settled."""
        parts = list(self.parts)
        while parts and start >= len(parts[0].text):
            start -= len(parts.pop(0).text)
        if parts and start:
            parts[0] = replace(parts[0], text=parts[0].text[start:])
        return replace(self, parts=tuple(parts))


_MARKS = {"text": "{}", "variable": "${}", "unread": "{}"}
_TYPED = {"text": "{}", "variable": "${{{}}}", "unread": "{}"}


@dataclass(frozen=True, kw_only=True)
class Remark:
    """Something about the script that its reader should know."""

    line: int
    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of the script, variables replaced as far as they are known."""

    line: int
    words: tuple[Word, ...]
    exported: Mapping[str, Word]
    """The variables that a program started here sees, as far as the script sets them."""
    assigned: Mapping[str, Word]
    """Those that are set and not exported."""
    expanded: frozenset[str] = frozenset()
    """Variables that were used anywhere up to here."""
    inside: str | None = None
    """The construct around it that is not read: ``if``, ``for``, ..."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a script says."""

    commands: tuple[Command, ...]
    remarks: tuple[Remark, ...]


def read(text: str, name: str) -> Script:
    """The commands of a shell script. ``name``: what errors call it.

    Raises:
        ConfigError: a quote or a bracket stays open, or a line that was to go on does not.
    """
    remarks: list[Remark] = []
    if "\r\n" in text:
        line = text[: text.index("\r\n")].count("\n") + 1
        remarks.append(Remark(line=line, what="lines end as on Windows", why="bash fails on them; read all the same"))
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n")
    scanner = _Scanner(plain, name)
    statements = list(_statements(scanner.tokens()))
    return _interpret(statements, name, [*remarks, *scanner.remarks])


# From characters to words -----------------------------------------------------------------------------------------

_OPERATOR = re.compile(r"&&|\|\||;;|;|\|&|\||&(?!>)|\(|\)")
_REDIRECT = re.compile(r"(?:&>>?|\d*(?:<<<|>>|>\||<>|>&|<&|[<>]))")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SPECIAL = "@*#?-$!0123456789"
_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=", re.ASCII)
_LOST_CONTINUATION = re.compile(r"\\[ \t]+(?=\n)")
_HERE = re.compile(r"<<-?[ \t]*(['\"]?)([A-Za-z_][\w.-]*)\1")
_WITH_DEFAULT = re.compile(r"([A-Za-z_]\w*):?[-=](.*)", re.ASCII | re.DOTALL)
_WHOLE_ARRAY = re.compile(r"([A-Za-z_]\w*)\[[@*]\]", re.ASCII)
_CLOSING = {"(": ")", "{": "}"}


@dataclass(frozen=True, kw_only=True)
class _Operator:
    """What stands between commands; a redirection is one word with what it leads to."""

    line: int
    text: str


class _Scanner:
    """Where in the text we are."""

    def __init__(self, text: str, name: str, line: int = 1) -> None:
        self.text, self.name, self.first_line = text, name, line
        self.at = 0
        self.remarks: list[Remark] = []
        self.pending: list[tuple[int, str]] = []
        """Here-documents that begin behind this line: where they were announced, and the line that ends them."""
        self.over_lines: list[int] = []
        """Where quotes begin that do not end in their line."""

    @property
    def line(self) -> int:
        return self.first_line + self.text.count("\n", 0, self.at)

    def fault(self, line: int, what: str, hint: str) -> ConfigError:
        return ConfigError(f"{self.name}, line {line}: {what}.", hint=hint)

    def tokens(self, until: str = "") -> Iterator[Word | _Operator]:
        """Words and operators, up to an operator ``until``, or the end."""
        while True:
            self._skip_blanks()
            line = self.line
            if self.at >= len(self.text):
                if until:
                    raise self.fault(line, f"the bracket is not closed: {until} is missing", "Close it.")
                return
            if self.text[self.at] == "\n":
                self.at += 1
                yield _Operator(line=line, text="\n")
                self._skip_here_documents()
            elif found := _HERE.match(self.text, self.at):
                self.pending.append((line, found[2]))
                self.at = found.end()
            elif found := _REDIRECT.match(self.text, self.at):
                self.at = found.end()
                yield self._redirection(line, found[0])
            elif found := _OPERATOR.match(self.text, self.at):
                self.at = found.end()
                if found[0] == until:
                    return
                yield _Operator(line=line, text=found[0])
            else:
                yield self._word()

    def _redirection(self, line: int, operator: str) -> _Operator:
        if self.text.startswith("(", self.at):  # >(...): to another command
            return _Operator(line=line, text=f"{operator}{self._balanced('(')}")
        self._skip_blanks()
        ends = self.at >= len(self.text) or self.text[self.at] == "\n"
        return _Operator(line=line, text=operator if ends else f"{operator} {self._word().text}")

    def _skip_blanks(self) -> None:
        """Blanks, comments, and ends of lines that are none."""
        while self.at < len(self.text):
            if self.text[self.at] in " \t\r":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif found := _LOST_CONTINUATION.match(self.text, self.at):
                self._lost(found)
            elif self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return

    def _lost(self, found: "re.Match[str]") -> None:
        why = "to bash the command ends there, without the options that follow; read as going on"
        self.remarks.append(Remark(line=self.line, what="blanks behind the backslash", why=why))
        self.at = min(found.end() + 1, len(self.text))

    def _skip_here_documents(self) -> None:
        for line, ending in self.pending:
            rest = re.compile(rf"^\t*{re.escape(ending)}$", re.MULTILINE).search(self.text, self.at)
            if rest is None:
                raise self.fault(line, f"the text that begins here does not end: no line {ending}", "Close it.")
            self.at = min(rest.end() + 1, len(self.text))
            self.remarks.append(Remark(line=line, what=f"the text up to {ending}", why="not read"))
        self.pending.clear()

    def _word(self) -> Word:
        line, parts = self.line, list[Part]()
        while self.at < len(self.text):
            here = self.text[self.at]
            if here in " \t\r\n" or _LOST_CONTINUATION.match(self.text, self.at):
                break
            if here == "(" and len(parts) == 1 and _ARRAY.fullmatch(parts[0].text):
                self.at += 1
                inside = [token for token in self.tokens(until=")") if isinstance(token, Word)]
                return Word(line=line, parts=tuple(parts), array=tuple(inside))
            if here in "<>;&|()":
                break
            if here == "\\":
                parts.append(Part(text=self.text[self.at + 1 : self.at + 2].strip("\n"), quoted=True))
                self.at += 2
            elif here == "'":
                parts.append(self._single())
            elif here == '"':
                parts += self._double()
            elif here in "$`":
                parts.append(self._expansion(quoted=False))
            else:
                end = re.compile(r"[ \t\r\n<>;&|()\\'\"$`]|\Z").search(self.text, self.at)
                assert end is not None
                parts.append(Part(text=self.text[self.at : end.start()]))
                self.at = end.start()
        return Word(line=line, parts=_joined(parts))

    def _single(self) -> Part:
        start = self.at
        end = self.text.find("'", start + 1)
        if end < 0:
            raise self._open_quote(start)
        self._note_lines(start, end)
        self.at = end + 1
        return Part(text=self.text[start + 1 : end], quoted=True)

    def _double(self) -> list[Part]:
        start, parts, literal = self.at, list[Part](), ""
        self.at += 1
        while True:
            if self.at >= len(self.text):
                raise self._open_quote(start)
            here = self.text[self.at]
            if here == '"':
                break
            if here == "\\" and self.text[self.at + 1 : self.at + 2] in ("$", "`", '"', "\\", "\n"):
                literal += self.text[self.at + 1].strip("\n")
                self.at += 2
            elif here in "$`":
                parts += [Part(text=literal, quoted=True), self._expansion(quoted=True)]
                literal = ""
            else:
                literal += here
                self.at += 1
        self._note_lines(start, self.at)
        self.at += 1
        return [*parts, Part(text=literal, quoted=True)]

    def _note_lines(self, start: int, end: int) -> None:
        if "\n" in self.text[start:end]:
            self.over_lines.append(self.first_line + self.text.count("\n", 0, start))

    def _open_quote(self, start: int) -> ConfigError:
        """Named is the first quote that goes over its line: the last one in the file is seldom the faulty one."""
        line = min([*self.over_lines, self.first_line + self.text.count("\n", 0, start)])
        return self.fault(line, f"the quote {self.text[start]} that is opened here is not closed", "Close it.")

    def _expansion(self, *, quoted: bool) -> Part:
        start = self.at
        if self.text[start] == "`":
            end = self.text.find("`", start + 1)
            if end < 0:
                raise self._open_quote(start)
            self.at = end + 1
            return Part(text=self.text[start : self.at], kind="unread", quoted=quoted)
        self.at += 1
        following = self.text[self.at : self.at + 1]
        if following == "(":
            return Part(text=f"${self._balanced('(')}", kind="unread", quoted=quoted)
        if following == "{":
            line = self.line
            return self._braced(self._balanced("{")[1:-1], line, quoted=quoted)
        if following == "'" and not quoted:
            return self._single()
        if found := _NAME.match(self.text, self.at):
            self.at = found.end()
            return Part(text=found[0], kind="variable", quoted=quoted)
        if following and following in _SPECIAL:
            self.at += 1
            return Part(text=following, kind="variable", quoted=quoted)
        return Part(text="$", quoted=True)

    def _braced(self, inside: str, line: int, *, quoted: bool) -> Part:
        if _NAME.fullmatch(inside) or inside in tuple(_SPECIAL) or _WHOLE_ARRAY.fullmatch(inside):
            return Part(text=inside, kind="variable", quoted=quoted)
        if found := _WITH_DEFAULT.fullmatch(inside):
            default = _Scanner(f'"{found[2]}"' if '"' not in found[2] else found[2], self.name, line)._word()
            return Part(text=found[1], kind="variable", quoted=quoted, default=default.parts)
        return Part(text=f"${{{inside}}}", kind="unread", quoted=quoted)

    def _balanced(self, opening: str) -> str:
        """From an opening bracket to the one that closes it, both included."""
        start, depth, line = self.at, 0, self.line
        while self.at < len(self.text):
            here = self.text[self.at]
            if here == "\\":
                self.at += 2
                continue
            if here == "'" and opening == "(":
                self._single()
                continue
            depth += (here == opening) - (here == _CLOSING[opening])
            self.at += 1
            if depth == 0:
                return self.text[start : self.at]
        raise self.fault(line, f"the bracket {opening} that is opened here is not closed", "Close it.")


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Pieces of text beside each other as one, if they are alike; an empty word keeps one piece."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if last is not None and last.kind == part.kind == "text" and last.quoted == part.quoted:
            found[-1] = replace(last, text=last.text + part.text)
        elif part.text or not found:
            found.append(part)
    return tuple(found)


# From words to commands -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Statement:
    """Words up to an operator."""

    line: int
    before: str
    """The operator in front of it."""
    words: list[Word] = field(default_factory=list)
    redirections: list[str] = field(default_factory=list)


def _statements(tokens: Iterator[Word | _Operator]) -> Iterator[_Statement]:
    now = _Statement(line=1, before="\n")
    for token in tokens:
        if isinstance(token, Word):
            if not now.words:
                now.line = token.line
            now.words.append(token)
        elif token.text not in _BETWEEN:
            now.redirections.append(token.text)
        else:
            if now.words or token.text in ("(", ")"):
                yield now
            now = _Statement(line=token.line, before=token.text)
    if now.words or now.before == ")":
        yield now


_BETWEEN = ("\n", "&&", "||", ";;", ";", "|&", "|", "&", "(", ")")
_BLOCKS = {"if": "fi", "for": "done", "while": "done", "until": "done", "select": "done", "case": "esac", "{": "}"}
"""What opens a construct that is not read, and what closes it."""
_MIDDLE = ("then", "else", "elif", "do", "!")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=", re.ASCII)
_DECLARING = ("export", "declare", "typeset", "local", "readonly")
_UNKNOWN = None


@dataclass(kw_only=True)
class _State:
    """What variables are at a place of the script."""

    values: dict[str, tuple[Word, ...] | None] = field(default_factory=dict)
    """One word, or those of an array; None: set by what is not read."""
    exported: set[str] = field(default_factory=set)
    lines: dict[str, int] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    expanded: set[str] = field(default_factory=set)


def _interpret(statements: Sequence[_Statement], name: str, remarks: list[Remark]) -> Script:
    state, commands = _State(remarks=remarks), list[Command]()
    opened: list[tuple[str, str, int]] = []
    for statement in statements:
        if statement.before == "(":
            opened.append((")", "(", statement.line))
        elif statement.before == ")" and opened and opened[-1][0] == ")":
            opened.pop()
        words = statement.words
        while words:
            first = words[0].text
            if first in _BLOCKS or first == "function":
                opened.append((_BLOCKS.get(first, ""), first, statement.line))
                if not _BLOCKS.get(first):
                    opened.pop()
                why = "not read: what it decides cannot be told without running it"
                if first not in ("{", "function"):
                    state.remarks.append(Remark(line=statement.line, what=first, why=why))
                if first in ("for", "select") and len(words) > 1:
                    state.values[words[1].text] = _UNKNOWN
                words = [] if first in ("for", "case", "select", "function") else words[1:]
            elif opened and first == opened[-1][0]:
                opened.pop()
                words = words[1:]
            elif first in _MIDDLE:
                words = words[1:]
            else:
                break
        inside = next((what for _, what, _ in opened), None)
        unsure = inside is not None or statement.before in ("&&", "||")
        if words:
            commands += _take(statement, words, state, name, inside=inside, unsure=unsure)
    return Script(commands=tuple(commands), remarks=tuple(sorted(state.remarks, key=lambda remark: remark.line)))


def _take(
    statement: _Statement, words: Sequence[Word], state: _State, name: str, *, inside: str | None, unsure: bool
) -> Iterator[Command]:
    """Notes what a statement assigns, and gives the command that it is."""
    if words[0].text.startswith("--"):
        raise ConfigError(
            f"{name}, line {words[0].line}: it begins with {words[0].text}, but the command before it has ended: "
            f"a line before lacks the backslash at its end, or is empty or a comment.",
            hint="Put the backslash there, or move the comment away, so that no option is lost.",
        )
    own: dict[str, Word] = {}
    rest = list(words)
    declaring = rest[0].text if rest[0].text in _DECLARING else None
    if declaring:
        rest = [word for word in rest[1:] if not word.text.startswith("-")]
    assignments = []
    while rest and (found := _ASSIGNMENT.match(_unexpanded(rest[0]))):
        assignments.append((found[1], bool(found[2]), rest.pop(0), found.end()))
    alone = declaring or not rest
    for variable, appends, word, start in assignments:
        value = _value(word, start, state)
        if not alone:
            own.update({variable: value[0]} if value else {})
            continue
        _assign(state, variable, value, word, appends=appends, unsure=unsure)
        if declaring == "export":
            state.exported.add(variable)
    if declaring:
        state.exported |= {word.text for word in rest} if declaring == "export" else set()
        return
    if not rest:
        return
    expanded = tuple(piece for word in rest for piece in _expanded(word, state))
    if not expanded:
        return
    for redirection in statement.redirections:
        state.remarks.append(
            Remark(line=statement.line, what=redirection, why="not kept: redirect vfun's output as you like")
        )
    exported = {**_seen(state, state.exported), **own}
    rest_of_them = _seen(state, state.values.keys() - state.exported)
    yield Command(
        line=words[0].line,
        words=expanded,
        exported=exported,
        assigned=rest_of_them,
        expanded=frozenset(state.expanded),
        inside=inside,
    )


def _unexpanded(word: Word) -> str:
    return word.parts[0].text if word.parts and word.parts[0].kind == "text" and not word.parts[0].quoted else ""


def _value(word: Word, start: int, state: _State) -> tuple[Word, ...]:
    """What is assigned: one word, or those of an array."""
    if word.array is not None:
        return tuple(piece for each in word.array for piece in _expanded(each, state))
    quoted = tuple(replace(part, quoted=True) for part in word.after(start).parts)
    return (_expanded(replace(word, parts=quoted or (Part(text="", quoted=True),)), state)[0],)


def _assign(state: _State, variable: str, value: tuple[Word, ...], word: Word, *, appends: bool, unsure: bool) -> None:
    state.lines[variable] = word.line
    before = state.values.get(variable, ())
    by_command = any(part.kind == "unread" for each in value for part in each.parts)
    if unsure or by_command or (appends and before is None):
        state.values[variable] = _UNKNOWN
        why = "set under a condition" if unsure else "set by a command, which is not run"
        state.remarks.append(Remark(line=word.line, what=variable, why=f"{why}: its value is not known"))
    elif not appends or not before:
        state.values[variable] = value
    elif word.array is not None:
        state.values[variable] = (*before, *value)
    else:  # a text gets longer, an array its first entry
        first = replace(before[0], parts=_joined((*before[0].parts, *value[0].parts)))
        state.values[variable] = (first, *before[1:])


def _seen(state: _State, names: "set[str]") -> dict[str, Word]:
    """Of these variables, those that hold one known text."""
    known = {name: state.values.get(name) for name in sorted(names)}
    return {
        name: replace(value[0], line=state.lines[name]) for name, value in known.items() if value and len(value) == 1
    }


def _expanded(word: Word, state: _State) -> list[Word]:
    """The words that a word becomes: expansions that are not quoted are parted at their blanks."""
    done: list[list[Part]] = [[]]
    began = False
    for part in word.parts:
        if part.kind != "variable":
            done[-1].append(part)
            began = began or bool(part.text) or part.quoted
            continue
        value = _looked_up(part, state, word.line)
        if not value:
            continue
        if _WHOLE_ARRAY.fullmatch(part.text):
            done[-1] += value[0].parts
            done += [list(entry.parts) for entry in value[1:]]
            began = True
        elif part.quoted:
            done[-1] += [replace(piece, quoted=True) for piece in value[0].parts]
            began = True
        else:
            for piece in value[0].parts:
                if piece.kind != "text":
                    done[-1].append(piece)
                    began = True
                    continue
                bits = re.split(r"[ \t\n]+", piece.text)
                done[-1].append(Part(text=bits[0]))
                done += [[Part(text=bit)] for bit in bits[1:]]
                began = began or bool(piece.text.strip())
    if not began:
        return []
    whole = [parts for parts in done if len(done) == 1 or any(part.text or part.quoted for part in parts)]
    return [Word(line=word.line, parts=_joined(parts)) for parts in whole]


def _looked_up(part: Part, state: _State, line: int) -> tuple[Word, ...]:
    """The words of a variable; itself, where the script does not say them."""
    array = _WHOLE_ARRAY.fullmatch(part.text)
    name = array[1] if array else part.text
    state.expanded.add(name)
    if name not in state.values and part.default is not None:
        default = Word(line=line, parts=part.default)
        why = f"not set in the script: read as its default, {default.text!r}"
        state.remarks.append(Remark(line=line, what=name, why=why))
        return (default,)
    value = state.values.get(name)
    return (Word(line=line, parts=(replace(part, default=None),)),) if value is None else value
