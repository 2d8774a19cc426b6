"""Where curves go beside metrics.jsonl, and under which names."""

from pathlib import Path
from typing import Any

import pytest

from vfun_cli.config import options
from vfun_cli.config.options import TRACKERS, RunConfig, parse
from vfun_cli.errors import ConfigError, EnvironmentFault
from vfun_cli.launch.job import check_packages
from vfun_cli.run import ownership
from vfun_cli.run.rundir import RunDir
from vfun_cli.training import trackers


def record() -> dict[str, Any]:
    return {**dict.fromkeys(trackers.CURVES, 1.0), "mfu": None, "step": 1}


def written(folder: Path) -> list[Path]:
    return [path.parent for path in folder.rglob("events*")]


def test_every_tracker_that_an_option_names_can_be_made() -> None:
    assert tuple(trackers.TRACKERS) == TRACKERS


def test_all_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None if name == "wandb" else name)
    assert RunConfig(report_to="all").trackers == ("tensorboard", "swanlab")
    assert RunConfig(report_to="wandb").trackers == ("wandb",), "asked for by name: refused where it is missing"
    assert RunConfig(report_to="none").trackers == ()
    assert RunConfig().trackers == ("tensorboard",)


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vfun_cli.devices.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault) as caught:
        check_packages(RunConfig(report_to="swanlab"))
    assert caught.value.hint == "pip install swanlab"


def test_a_tracker_of_accelerate_that_vfun_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("report_to", "comet_ml", "--report-to")
    assert "accelerate knows it" in caught.value.message
    assert caught.value.message.endswith("choose one of: tensorboard, wandb, swanlab, all, none.")


@pytest.mark.parametrize(("typed", "place"), [("logs", "run/logs"), ("curves/of", "run/curves/of"), ("../x", "x")])
def test_curves_go_to_the_logging_dir_which_starts_from_the_output_dir(typed: str, place: str, tmp_path: Path) -> None:
    run, config = RunDir(tmp_path / "run"), RunConfig(logging_dir=typed)
    board = trackers.TensorBoard(run, config)
    board.log(record())
    board.close()
    assert written(tmp_path) == [tmp_path / place / "tensorboard"]


def test_an_absolute_logging_dir_is_itself_and_nothing_of_it_is_the_runs_to_delete(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path / "run"), RunConfig(logging_dir=str(tmp_path / "all"))
    folder = run.tensorboard(config.logging_dir)
    with ownership.noting(run, folder):
        trackers.TensorBoard(run, config).close()
    assert written(tmp_path) == [tmp_path / "all/tensorboard"]
    assert not run.noted_json.exists()


def test_the_logging_dir_stays_with_a_run_directory_that_is_moved() -> None:
    assert RunConfig(logging_dir="logs").absolute().logging_dir == "logs"


def test_swanlab_gets_curves_pictures_and_the_projects_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swanlab = pytest.importorskip("swanlab")
    from PIL import Image

    asked = {}
    begin = swanlab.init
    monkeypatch.setattr(swanlab, "init", lambda **given: asked.update(given) or begin(**given, mode="offline"))
    config = RunConfig(tracker_project_name="clips")
    tracker = trackers.SwanLab(RunDir(tmp_path), config)
    Image.new("RGB", (8, 8)).save(tmp_path / "row-0.png")
    tracker.log(record())
    tracker.log_values({"held_out/loss": 1.0}, 1)
    tracker.log_videos([tmp_path / "row-0.png"], 1)
    tracker.close()
    assert asked["project"] == "clips"
    assert list((tmp_path / "logs/swanlab").rglob("*.swanlab"))
