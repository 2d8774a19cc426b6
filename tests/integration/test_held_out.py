"""The held-out loss is a function of the weights alone, under every strategy, and the training does not notice it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.integration.matrix import HELD_OUT, STEPS, STRATEGIES, Run, extra, launch, losses, resumed, straight
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

Trained = Callable[[str], None]
Found = dict[tuple[int, str], list[float]]
HALF, LAST = STEPS["train"] // 2, 6


def found(run: Run) -> Found:
    return jobs.held_out(RunDir(run.folder))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_training_does_not_notice_it(strategy: str, trained: Trained) -> None:
    trained(strategy)
    run = extra(HELD_OUT, strategy)
    assert list(found(run)) == [(0, "trained"), (HALF, "trained"), (LAST, "trained")]
    assert len({tuple(each) for each in found(run).values()}) == 3, "it changes with the weights"
    assert losses(run) == losses(straight("wan-s2v", strategy))[:LAST] and len(losses(run)) == LAST


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_equal_to_the_bit_after_a_resume(strategy: str, trained: Trained) -> None:
    trained(strategy)
    whole = found(extra(HELD_OUT, strategy))
    del whole[0, "trained"]
    assert found(resumed(extra(HELD_OUT, strategy))) == whole


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_two_ranks_begin_with_the_bits_of_one(strategy: str, trained: Trained) -> None:
    """ZeRO-3 rounds otherwise, in training too: it is compared with itself, below."""
    trained("single")
    trained(strategy)
    one, two = (found(extra(HELD_OUT, name))[0, "trained"] for name in ("single", strategy))
    assert one == two and len(one) == 10


def test_the_moving_average_has_a_loss_of_its_own(trained: Trained) -> None:
    trained("single")
    average = found(extra("average", "single"))
    assert list(average) == [(step, weights) for step in (0, 3) for weights in ("trained", "ema")]
    assert average[0, "ema"] == average[0, "trained"] == found(extra(HELD_OUT, "single"))[0, "trained"]
    assert average[3, "ema"] != average[3, "trained"]


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_it_leaves_no_sharded_weight_gathered(strategy: str, trained: Trained) -> None:
    trained(strategy)
    noted = RunDir(extra(HELD_OUT, strategy).folder).logs.glob("noted-rank-*.json")
    assert [json.loads(rank.read_text())["left"] for rank in noted] == [[0, 0, 0], [0, 0, 0]]


@dataclass(frozen=True, kw_only=True)
class OnOneRank(Run):
    """Looks at what two ranks have trained, and trains nothing."""

    source: Run

    def checkpoint(self) -> Path:
        return RunDir(self.source.folder).checkpoint(HALF)


def look_alone(under: str, strategies: Sequence[str]) -> dict[str, Found]:
    """The held-out loss that one process finds of each strategy's checkpoint."""
    runs = []
    for strategy in strategies:
        source = extra(HELD_OUT, strategy)
        options: dict[str, Any] = {**source.options, "max_train_steps": HALF, "num_processes": 1}
        runs.append(
            OnOneRank(name=f"alone-{strategy}", family=source.family, strategy=under, options=options, source=source)
        )
    launch(runs)
    return {strategy: found(run) for strategy, run in zip(strategies, runs, strict=True)}


@pytest.mark.long
@pytest.mark.ahead.with_args(look_alone, "single", ["ddp", "fsdp", "zero2"], needs=["ddp", "fsdp", "zero2"])
def test_one_process_finds_the_bits_that_two_ranks_found(result: dict[str, Found]) -> None:
    assert len(result) == 3
    for strategy, alone in result.items():
        assert alone == {(HALF, "trained"): found(extra(HELD_OUT, strategy))[HALF, "trained"]}


@pytest.mark.ahead.with_args(look_alone, "zero3", ["zero3"], needs=["zero3"])
def test_one_rank_of_zero3_finds_the_bits_that_two_found(result: dict[str, Found]) -> None:
    assert result["zero3"] == {(HALF, "trained"): found(extra(HELD_OUT, "zero3"))[HALF, "trained"]}


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_equal_to_the_bit_after_kill_9_and_a_resume(strategy: str, workplace: Path, tmp_path: Path) -> None:
    """Looks before the kill that the run takes again are recorded once."""

    def train(run: RunDir) -> jobs.Job:
        return jobs.start(
            "train", "wan-s2v", "--demo", "--strategy", strategy, "--output-dir", run.root, "--max-train-steps", 6,
            "--checkpointing-steps", 2, "--validation-rows", 2, "--validation-steps", 1, cwd=workplace,
        )  # fmt: skip

    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    jobs.finish(train(whole))
    job = train(killed)
    jobs.wait_for(lambda: (3, "trained") in jobs.held_out(killed), job)
    jobs.kill_all(job)
    assert 3 <= jobs.last_step(killed) < 6
    jobs.finish(jobs.start("resume", killed.root, cwd=workplace))
    assert list(jobs.held_out(whole)) == [(step, "trained") for step in range(7)]
    assert jobs.held_out(killed) == jobs.held_out(whole) and jobs.losses(killed) == jobs.losses(whole)
