"""The garbage collector rests while large packages are imported."""

import gc
import importlib
from pathlib import Path

import pytest

from vfun_cli.imports import uncollected


def test_the_collector_rests_during_an_import_and_is_then_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes_the_collector.py").write_text("import gc\nWORKS = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with uncollected():
        module = importlib.import_module("notes_the_collector")
    assert not module.WORKS and gc.isenabled()
    with pytest.raises(ModuleNotFoundError), uncollected():
        importlib.import_module("is_nowhere")
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
