"""One working directory with all demos for the whole session."""

import os
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
