"""Ranks that differ, or of which one fails, all raise the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.run.small_run import CONFIG, DESCRIBED, write_checkpoint
from tests.two_ranks import run_on_two_ranks
from vfun_cli import devices
from vfun_cli.errors import CheckpointError
from vfun_cli.training.agreement import statement
from vfun_cli.training.signals import PREEMPTED

BAD_CLIP = ["MetadataError", "row 7: the file ends."]


@pytest.mark.slow
def test_two_ranks_end_in_the_same_words(tmp_path: Path) -> None:
    run_on_two_ranks(Path(__file__).with_name("agreement_worker.py"), tmp_path)
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    assert second.pop("a foreign error") == "its own"
    assert first.pop("a foreign error") == ["Unforeseen", "ZeroDivisionError: by zero.", 1]
    assert second.pop("both fail") == ["FitError", "of 0.", 0] and first.pop("both fail")[:2] == ["FitError", "of 0."]
    assert second.pop("work that fails") == "its own" and first.pop("work that fails") == 1
    # what a rank raises itself goes as it came
    # rank 0 has its clips, or waits for them
    assert first.pop("a bad clip") == first.pop("a bad clip while others wait") == [*BAD_CLIP, 1]
    assert second.pop("a bad clip") == second.pop("a bad clip while others wait") == [*BAD_CLIP, None]
    assert second.pop("a lost checkpoint") == ["RunError", "no room.", 0]
    assert first.pop("a lost checkpoint") == ["RunError", "no room.", None]
    assert second.pop("one fails") == second.pop("full memory") == ["FitError", "no memory.", None]
    assert first.pop("one fails") == first.pop("full memory") == ["FitError", "no memory.", 1]
    assert first == second
    assert first.pop("work of one rank") == "done" and first.pop("work of one rank, stopped") == ["stopped", PREEMPTED]
    assert [first.pop(name) for name in ("nobody fails", "one directory", "one job")] == [None] * 3
    (kind, message, rank), plans = first.pop("two directories"), first.pop("two plans")
    assert (kind, rank) == ("ConfigError", 1) and f"{tmp_path}/run-1 is not the one that rank 0" in message
    difference = "the machines do not run the same: the plan is plan 1 on machine 1 and plan 0 on machine 0."
    assert plans == ["ConfigError", difference, 1]
    difference = "what --pretrained-model-name-or-path holds has another vae/weights.bin on machine 1 than on machine 0"
    assert first.pop("two models") == ["ConfigError", f"the machines do not run the same: {difference}.", 1]
    assert not first


def described(**changed: Any) -> dict[str, Any]:
    return {**DESCRIBED, "contents": {}, "plan_digest": "a", "resume": None, **changed}


def with_option(name: str, value: object) -> dict[str, Any]:
    return described(config={**CONFIG, name: value})


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("--learning-rate", with_option("learning_rate", 2e-5)),
        ("--cache", with_option("cache", "entries")),
        ("the command", described(command="lora")),
        ("the family", described(family="wan-s2v")),
        ("the plan", described(plan_digest="b")),
        ("what --train-data-dir holds", described(contents={"train_data_dir": "sampled-1:0"})),
    ],
)
def test_what_differs_between_machines_is_named(name: str, there: dict[str, Any]) -> None:
    here, other = statement(described()), statement(there)
    assert {each for each in {**here, **other} if here.get(each) != other.get(each)} == {name}


def test_a_place_of_a_machine_may_differ(tmp_path: Path) -> None:
    places = [
        {**CONFIG, **dict.fromkeys(("cache", "output_dir", "pretrained_model_name_or_path"), f"/mnt/{machine}"),
         "machine_rank": machine} for machine in (0, 1)
    ]  # fmt: skip
    assert statement(described(config=places[0])) == statement(described(config=places[1]))


def test_a_version_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = statement(described())
    monkeypatch.setattr(devices, "version", lambda package: "0.1" if package == "peft" else here[package])
    assert {name for name, value in statement(described()).items() if value != here[name]} == {"peft"}


def test_a_checkpoint_is_known_by_its_manifest(tmp_path: Path) -> None:
    for place, run in (("a", "1"), ("b", "1"), ("c", "2")):
        write_checkpoint(tmp_path / place / "checkpoint-4", run)
    same, copy, other = (
        statement(described(resume=str(tmp_path / place / "checkpoint-4")))["the checkpoint"] for place in "abc"
    )
    assert same == copy != other
    with pytest.raises(CheckpointError, match="no manifest"):
        statement(described(resume=str(tmp_path / "checkpoint-5")))
