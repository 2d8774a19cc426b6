"""Checkpoints that the original scripts left are exported by the command, so that a project can change tools."""

import json
import shutil
from pathlib import Path

import pytest

from tests.jobs import Said, vfun_here
from vfun_cli.checkpoints.export import export

KINDS = ("fsdp-original", "zero2-original", "zero3-original")


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """The base as a released directory of Wan-S2V."""
    folder = tmp_path / "Wan2.2-S2V-14B"
    shutil.copytree(base, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "s2v"}))
    return folder


def run(*arguments: object) -> Said:
    return vfun_here("export-bf16", *arguments, "--json")


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_that_the_engine_held(kind: str, samples: Path, model: Path, tmp_path: Path) -> None:
    expected = export(samples / "single", tmp_path / "expected", base_dir=model)
    done = run(samples / kind, "--output", tmp_path / "out", "--pretrained-model-name-or-path", model)
    assert done.code == 0, done.err
    assert json.loads(done.out)["sha256"] == expected.sha256


def test_the_model_comes_from_the_variable_that_the_scripts_export(
    samples: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_NAME", str(model))
    assert run(samples / "zero2-original", "--output", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_without_the_model_the_command_asks_for_it(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_NAME", raising=False)
    done = vfun_here("export-bf16", str(samples / "zero3-original"), "--output", str(tmp_path / "out"))
    assert done.code == 5
    assert "a checkpoint of the original scripts" in done.err and "--pretrained-model-name-or-path" in done.err
    assert not (tmp_path / "out").exists()


def test_another_type_of_weights_is_written_on_request(samples: Path, model: Path, tmp_path: Path) -> None:
    where = ("--pretrained-model-name-or-path", model)
    found = {}
    for dtype in ("fp32", "bf16", "fp16"):
        done = run(samples / "zero2-original", "--output", tmp_path / dtype, "--dtype", dtype, *where)
        found[dtype] = json.loads(done.out)["bytes"]
    assert found["fp32"] == 2 * found["bf16"] == 2 * found["fp16"]
    assert run(samples / "zero2-original", "--output", tmp_path / "x", "--dtype", "int8", *where).code == 2
