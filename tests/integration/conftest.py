"""One working directory with all demos for the whole session."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.integration.matrix import all_runs, launch, prepare_demo


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the demo of every family; the tests of this folder run inside it."""
    folder = tmp_path_factory.mktemp("integration")
    before = Path.cwd()
    os.chdir(folder)
    prepare_demo()
    yield folder
    os.chdir(before)


@pytest.fixture(scope="session")
def trained(workplace: Path) -> Callable[[str], None]:
    """Trains everything of a strategy on its first call, in one launch."""

    @cache
    def run(strategy: str) -> None:
        launch(all_runs(strategy))

    return run


TABLE = Path(__file__).parents[2] / "README.md"
START, END = "<!-- matrix -->", "<!-- /matrix -->"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With WRITE_MATRIX=1, the README's support table from the outcomes of ``test_matrix.py``."""
    if not os.environ.get("WRITE_MATRIX"):
        return
    outcomes: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for item in session.items:
        cell = getattr(item, "callspec", None)
        if cell is not None and {"command", "family", "strategy"} <= set(cell.params):
            key = (cell.params["command"], cell.params["family"], cell.params["strategy"])
            outcomes[key].append(item.stash.get(PASSED, False))
    text = TABLE.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    TABLE.write_text(f"{before}{START}\n{render_table(outcomes)}{END}{after}", encoding="utf-8")


PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Remember whether the test itself passed."""
    outcome = yield
    if call.when == "call":
        item.stash[PASSED] = outcome.get_result().passed  # type: ignore[attr-defined]


def render_table(outcomes: dict[tuple[str, str, str], list[bool]]) -> str:
    """One row a family, one column a strategy; `full + LoRA` where all tests of both passed."""
    strategies = list(dict.fromkeys(strategy for _, _, strategy in outcomes))
    lines = ["| family | " + " | ".join(strategies) + " |", "|---" * (len(strategies) + 1) + "|"]
    for family in dict.fromkeys(family for _, family, _ in outcomes):
        found = []
        for strategy in strategies:
            works = [
                word
                for command, word in (("train", "full"), ("lora", "LoRA"))
                if outcomes.get((command, family, strategy)) and all(outcomes[command, family, strategy])
            ]
            found.append(" + ".join(works) or "no")
        lines.append(f"| `{family}` | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"
