"""The dialect of errors and docstrings, read from the code: what each error says, and how each docstring says so."""

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.sources import PACKAGE, parsed
from vfun_cli import errors

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

GAP = "{}"
"""Stands in a text for a value that is known only when the error is raised."""
UNKNOWN = "\0"
"""A text that is made elsewhere: nothing is known of it here."""

COMMAND = re.compile(r"vfun |pip |unset |export [A-Z_]+=")
SENTENCE_END = re.compile(r"[.?]( ?\{\})?$")
"""A full stop; what did_you_mean adds, or a command that another function makes, may follow."""
UPPER_START = frozenset({"A", "An", "It", "Its", "No", "Not", "Only", "That", "The", "There", "These", "This", "You"})
"""Ordinary words with which a message must not start in upper case: it follows "error: "."""

ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}


def file_of(module: str) -> str | None:
    """The file below the package of a dotted name such as ``vfun_cli.errors``."""
    path = "/".join(module.split(".")[1:])
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if (PACKAGE / file).is_file()), None)


@cache
def constants(module: str) -> dict[str, ast.expr]:
    """Values that a module's names have at its top level, imported ones included."""
    found: dict[str, ast.expr] = {}
    for node in parsed(PACKAGE / module).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vfun_cli"):
            file = file_of(node.module)
            known = constants(file) if file else {}
            found |= {alias.name: known[alias.name] for alias in node.names if alias.name in known}
    return found


def texts(node: ast.expr, module: str) -> list[str]:
    """Every text that an expression can be, gaps and all."""
    match node:
        case ast.Constant(value=None):
            return [""]
        case ast.Constant(value=str(value)):
            return [value]
        case ast.JoinedStr(values=parts):
            return joined([texts(part, module) for part in parts])
        case ast.FormattedValue(value=ast.Name(id=name)) if name in constants(module):
            return [text.replace(UNKNOWN, GAP) for text in texts(constants(module)[name], module)]
        case ast.FormattedValue(value=ast.IfExp() as choice):
            return [text.replace(UNKNOWN, GAP) for text in texts(choice, module)]
        case ast.FormattedValue(value=ast.Attribute(attr="message")):
            return [UNKNOWN]  # of another error
        case ast.FormattedValue():
            return [GAP]
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return joined([texts(left, module), texts(right, module)])
        case ast.IfExp(body=first, orelse=second):
            return texts(first, module) + texts(second, module)
        case ast.BoolOp(op=ast.Or(), values=values):
            return [text for value in values for text in texts(value, module)]
        case ast.Name(id=name) if name in constants(module):
            return texts(constants(module)[name], module)
        case ast.Call(func=ast.Name(id="did_you_mean")):
            return [GAP]
        case ast.Call(func=ast.Attribute(attr="join", value=ast.Constant(value="\n"))):
            return ["\n"]
        case ast.Call(func=ast.Name(id="printable"), args=[inner]):
            return texts(inner, module)
        case _:
            return [UNKNOWN]


def joined(parts: list[list[str]]) -> list[str]:
    return ["".join(choice) for choice in itertools.product(*parts)]


def raised(module: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """(line, messages, hints) of every error that a module makes."""
    for node in ast.walk(parsed(PACKAGE / module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
            hints = [text for word in node.keywords if word.arg == "hint" for text in texts(word.value, module)]
            yield node.lineno, texts(node.args[0], module), hints


def is_command(hint: str) -> bool:
    """Whether a hint is a command and nothing else: after its words come options, paths and values."""
    if not COMMAND.match(hint):
        return False
    words = hint.split()
    return all(
        not word.isalpha() or word.isupper() or before.startswith("-") for before, word in itertools.pairwise(words[1:])
    )


def faults_of_message(text: str) -> Iterator[str]:
    if "\n" in text:  # a sentence and a list
        return
    if UNKNOWN not in text and not SENTENCE_END.search(text):
        yield "ends without a full stop"
    if text.split(" ", maxsplit=1)[0] in UPPER_START:
        yield "starts in upper case"


def faults_of_hint(text: str) -> Iterator[str]:
    if not text or UNKNOWN in text or is_command(text):
        return
    if not is_command(text.rpartition(": ")[2]) and not SENTENCE_END.search(text):
        yield "ends without a full stop"
    if re.match(r"[a-z]+[ ,:]", text) and not COMMAND.match(text):  # a name or a path may start it as it is written
        yield "starts in lower case"


def faults(module: str) -> list[str]:
    found = []
    for line, messages, hints in raised(module):
        said = [(text, "message", fault) for text in messages for fault in faults_of_message(text)]
        said += [(text, "hint", fault) for text in hints for fault in faults_of_hint(text)]
        said += [
            (text, "text", "has an option with underscores")
            for text in (*messages, *hints)
            if re.search(r"--[a-z]+_[a-z_]+", text)
        ]
        found += [f"{module}:{line}: the {part} {fault}: {text}" for text, part, fault in said]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_errors_speak_in_whole_sentences(module: str) -> None:
    assert not faults(module), "\n".join(faults(module))


def test_errors_are_read_wherever_they_are_made() -> None:
    made = [error for module in MODULES for error in raised(module)]
    assert len(made) >= 200
    unknown = [error for error in made if any(UNKNOWN in text for text in error[1])]
    assert len(unknown) < len(made) / 10


def test_usual_hints_are_sentences() -> None:
    hints = [kind.usual_hint for name in ERRORS if (kind := getattr(errors, name)).usual_hint]
    assert len(hints) >= 4
    assert not [hint for hint in hints if list(faults_of_hint(hint))]


@pytest.mark.parametrize(
    ("hint", "command"),
    [
        ("vfun resume {}", True),
        ("vfun validate-meta --fix OUT", True),
        ("pip install {}", True),
        ("vfun resume continues it.", False),
        ("Run vfun resume.", False),
    ],
)
def test_a_bare_command_is_told_from_a_sentence(hint: str, command: bool) -> None:
    assert is_command(hint) == command


def docstrings() -> Iterator[tuple[str, str]]:
    """(place, text) of every docstring, those of modules and classes included."""
    for module in MODULES:
        for node in ast.walk(parsed(PACKAGE / module)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"{module}: {getattr(node, 'name', '')}", text


def test_docstrings_name_their_errors_in_a_raises_block() -> None:
    sentence = re.compile(r"\bRaises? \w*(Error|Fault)\b|^\s*Raises [^:]", re.MULTILINE)
    found = [place for place, text in docstrings() if sentence.search(text)]
    assert not found, "\n".join(found)


def test_docstrings_point_to_sections_that_exist() -> None:
    page = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+)", page, re.MULTILINE)
    code = "\n".join((PACKAGE / module).read_text(encoding="utf-8") for module in MODULES)
    named = re.findall(r"docs/numerics\.md,\s+([A-Z][^).]+)", code)
    assert len(named) >= 4
    assert not set(named) - set(sections)
