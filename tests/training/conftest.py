"""Fixtures of the training tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from live_models import LiveModel


@pytest.fixture(scope="session")
def live_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LiveModel]:
    """The demo of a family by name, made once."""
    folder: Path = tmp_path_factory.mktemp("live")
    made: dict[str, LiveModel] = {}

    def of(family: str) -> LiveModel:
        if family not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                made[family] = LiveModel(family, folder)
        return made[family]

    return of
