"""``vfun resume`` and ``train --resume-from-checkpoint``: two ways to the same continuation."""

import json
import shlex
from pathlib import Path

import pytest

from tests.commands.conftest import TRAIN, TRAINED, Vfun

pytestmark = pytest.mark.slow

RESUME = ("resume", "--demo")
AGAIN = (*TRAIN, *TRAINED[:-2], "--resume-from-checkpoint", "latest")
"""The same run, but for the accumulation, which is typed nowhere."""


@pytest.fixture(autouse=True)
def workplace(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


@pytest.mark.parametrize("command", [RESUME, AGAIN], ids=["resume", "train"])
def test_on_another_number_of_processes_a_step_stays_what_it_was(command: tuple[str, ...], vfun: Vfun) -> None:
    said = vfun(*command, "--ddp", "--num-processes", "2", "--dry-run", "--json")
    assert said.code == 0, said.err
    config = json.loads(said.out)["config"]
    assert (config["num_processes"], config["gradient_accumulation_steps"]) == (2, 1)


@pytest.mark.parametrize("command", [RESUME, AGAIN], ids=["resume", "train"])
def test_another_accumulation_on_as_many_processes_is_refused_with_the_command_that_is_not(
    command: tuple[str, ...], vfun: Vfun
) -> None:
    refused = vfun(*command, "--gradient-accumulation-steps", "1", "--dry-run")
    assert refused.code == 5 and "gradient_accumulation_steps 2 -> 1" in refused.err
    vfun_word, *allowed = shlex.split(refused.err.partition("you mean it: ")[2])
    assert vfun_word == "vfun"
    said = vfun(*allowed, "--dry-run", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["config"]["gradient_accumulation_steps"] == 1


def test_the_checkpoint_of_another_command_is_refused_with_the_command_that_takes_it(vfun: Vfun) -> None:
    refused = vfun("lora", *AGAIN[1:], "--dry-run")
    assert refused.code == 5 and "a run of vfun train wan-s2v" in refused.err, refused.err
    _, *taken = shlex.split(refused.err.partition("next: ")[2])
    assert vfun(*taken, "--dry-run").code == 0
