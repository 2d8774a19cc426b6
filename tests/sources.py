"""The package's own code, for tests of its rules."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "vfun_cli"


@cache
def parsed(path: Path) -> ast.Module:
    """What a module of the package says; each is read once, for all rules."""
    return ast.parse(path.read_text(encoding="utf-8"))
