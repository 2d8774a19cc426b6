"""One working directory with all demos for the whole session."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.matrix import Run, all_runs, launch, prepare_demo


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the demo of every family; the tests of this folder run inside it."""
    folder = tmp_path_factory.mktemp("integration")
    before = Path.cwd()
    os.chdir(folder)
    prepare_demo()
    yield folder
    os.chdir(before)


LAUNCHES = ("single", "zero3", "fsdp", "zero2", "ddp", "zero3-offload")
"""The one that fills the cache, since on another number of threads the encoders round otherwise; then longest first."""
ENDS = ("single", "fsdp", "zero2", "zero3", "ddp", "zero3-offload")
"""The same as they end."""


@pytest.fixture(scope="session")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Two commands at a time: the start of one is work for one core, and two ranks that wait for each other leave a
    part of both cores idle.
    """
    with ThreadPoolExecutor(2) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def trained(workplace: Path, pool: ThreadPoolExecutor, request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Waits until everything of a strategy is trained, each strategy in one launch.

    The launches of all strategies that tests of this session name or need begin at once, before all other commands.
    """
    items = request.session.items
    named = {*map(strategy_of, items), *(need for item in items for need in needs_of(item))} - {None}
    if named:
        named.add("single")
    launches: dict[str, Future[None]] = {}

    def begin(strategy: str) -> None:
        if strategy != "single":
            launches["single"].result()
        launch(all_runs(strategy))

    def wait(strategy: str) -> None:
        if strategy not in launches:
            launches[strategy] = pool.submit(begin, strategy)
        launches[strategy].result()

    for strategy in LAUNCHES:
        if strategy in named:
            launches[strategy] = pool.submit(begin, strategy)
    return wait


@pytest.fixture(scope="session")
def results(
    trained: Callable[[str], None], pool: ThreadPoolExecutor, request: pytest.FixtureRequest
) -> dict[pytest.Item, "Future[Any]"]:
    """What the commands of marked tests come to: ``@pytest.mark.ahead.with_args(work, *arguments, needs=strategies)``.

    ``work`` begins with the session, beside other tests, when the strategies that it needs are trained; with
    ``needs=None`` after nothing: it has a cache of its own.
    """

    def after(needs: Sequence[str], work: Callable[..., Any], *arguments: Any) -> Any:
        for strategy in needs:
            trained(strategy)
        return work(*arguments)

    marks = {item: item.get_closest_marker("ahead") for item in request.session.items}
    return {item: pool.submit(after, needs_of(item), *mark.args) for item, mark in marks.items() if mark is not None}


@pytest.fixture
def result(results: dict[pytest.Item, "Future[Any]"], request: pytest.FixtureRequest) -> Any:
    """What the work of this test has returned; its failure is the test's."""
    return results[request.node].result()


@pytest.fixture(scope="session", autouse=True)
def _begun(request: pytest.FixtureRequest) -> None:
    """Begins what is ahead before the first test that does not wait for it."""
    if any(item.get_closest_marker("ahead") is not None for item in request.session.items):
        request.getfixturevalue("results")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order in which what they wait for is there: launches as they end, then commands that are ahead.

    Of a session with other tests, the items are all of it.
    """

    def comes(item: pytest.Item) -> tuple[bool, int]:
        if item.path.parent != Path(__file__).parent:
            return False, 0
        strategy = strategy_of(item)
        return item.get_closest_marker("ahead") is not None, ENDS.index(strategy) if strategy else len(ENDS)

    items.sort(key=comes)


def needs_of(item: pytest.Item) -> Sequence[str]:
    """The strategies whose launch a test's own commands come after; of all of them the one that fills the cache."""
    mark = item.get_closest_marker("ahead")
    needs = None if mark is None else mark.kwargs.get("needs", ())
    return () if needs is None else ("single", *needs)


def strategy_of(item: pytest.Item) -> str | None:
    """The strategy that a test's parameters or mark name."""
    given, mark = parameters(item), item.get_closest_marker("strategy")
    if mark is not None:
        return str(mark.args[0])
    return given["cell"].strategy if "cell" in given else given.get("strategy")


def parameters(item: pytest.Item) -> Mapping[str, Any]:
    """Of a parametrised test; of another none."""
    return item.callspec.params if hasattr(item, "callspec") else {}


TABLE = Path(__file__).parents[2] / "README.md"
START, END = "<!-- matrix -->", "<!-- /matrix -->"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With WRITE_MATRIX=1, the README's support table from the outcomes of ``test_matrix.py``."""
    if not os.environ.get("WRITE_MATRIX"):
        return
    outcomes: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for item in session.items:
        cell = parameters(item).get("cell")
        if isinstance(cell, Run):
            outcomes[cell.command, cell.family, cell.strategy].append(item.stash.get(PASSED, False))
    if not outcomes:  # a session without the matrix
        return
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
