"""The held-out loss and samples: functions of the weights alone, under every strategy; the training notices nothing."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import jobs
from tests.integration.matrix import (
    BROKEN_ROW,
    CUT_OFF,
    FIVE,
    HELD_OUT,
    HELD_OUT_ROWS,
    STEPS,
    STRATEGIES,
    Run,
    extra,
    launch,
    losses,
    resumed,
    straight,
)
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

Trained = Callable[[str], None]
Found = dict[tuple[int, str], list[float]]
HALF, LAST = STEPS["train"] // 2, 6
GOOD = [f"row-{row}" for row in range(HELD_OUT_ROWS) if row != BROKEN_ROW]
BY_AVERAGE = [f"{name}-ema" for name in GOOD]
WEIGHTS = ("trained", "ema")
SHARING = ("ddp", "fsdp", "zero3")
"""Strategies with a run of five rows: of whole weights on each rank, and of both kinds of shards."""


def found(run: Run) -> Found:
    return jobs.held_out(RunDir(run.folder))


def samples(run: Run, step: int) -> list[dict[str, str]]:
    """A digest of the pixels of each video of a step by its name, rank by rank."""
    folder, ranks = f"samples/step-{step}/", []
    for file in sorted(RunDir(run.folder).logs.glob("samples-rank-*.json")):
        digests = json.loads(file.read_text())
        ranks.append({name.removeprefix(folder): digests[name] for name in digests if name.startswith(folder)})
    return ranks


def merged(ranks: Sequence[dict[str, str]]) -> dict[str, str]:
    whole = {name: digest for rank in ranks for name, digest in rank.items()}
    assert len(whole) == sum(map(len, ranks)), "each is made once"
    return whole


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_training_does_not_notice_them(strategy: str, trained: Trained) -> None:
    trained(strategy)
    run = extra(HELD_OUT, strategy)
    assert list(found(run)) == [(step, weights) for step in (0, HALF, LAST) for weights in WEIGHTS]
    assert len({tuple(each) for each in found(run).values()}) == 5, "it changes with the weights"
    assert losses(run) == losses(straight("wan-s2v", strategy))[:LAST] and len(losses(run)) == LAST


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_they_are_equal_to_the_bit_after_a_resume(strategy: str, trained: Trained) -> None:
    trained(strategy)
    whole = {look: losses for look, losses in found(extra(HELD_OUT, strategy)).items() if look[0] > 0}
    run, again = extra(HELD_OUT, strategy), resumed(extra(HELD_OUT, strategy))
    assert found(again) == whole
    assert [samples(again, step) for step in (HALF, LAST)] == [samples(run, step) for step in (HALF, LAST)]
    assert merged(samples(again, HALF)) and not merged(samples(again, 0))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_two_ranks_begin_with_the_bits_of_one(strategy: str, trained: Trained) -> None:
    """ZeRO-3 rounds otherwise, in training too: it is compared with itself, below."""
    trained("single")
    trained(strategy)
    one, two = (found(extra(HELD_OUT, name))[0, "trained"] for name in ("single", strategy))
    assert one == two and len(one) == 10
    shared, alone = (merged(samples(extra(HELD_OUT, name), 0)) for name in (strategy, "single"))
    assert shared == alone and len(shared) == len(GOOD + BY_AVERAGE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_that_cannot_be_read_says_why_and_the_ranks_share_the_others(strategy: str, trained: Trained) -> None:
    trained(strategy)
    run, broken = RunDir(extra(HELD_OUT, strategy).folder), f"row-{BROKEN_ROW}"
    recorded = [record for record in jobs.records(run) if record.get("event") == "samples"]
    assert [(each["step"], each["made"], list(each["failed"])) for each in recorded] == [
        (step, len(GOOD + BY_AVERAGE), [broken, f"{broken}-ema"]) for step in (0, HALF, LAST)
    ]
    for step, record in zip((0, HALF, LAST), recorded, strict=True):
        said = json.loads((run.samples(step) / f"{broken}.json").read_text())["error"]
        assert CUT_OFF.name in said and said == record["failed"][broken]
        assert {path.stem for path in run.samples(step).glob("*.mp4")} == {*GOOD, *BY_AVERAGE}
        made = [list(rank) for rank in samples(extra(HELD_OUT, strategy), step)]
        assert made == [GOOD + BY_AVERAGE, []][: len(made)] and len(made) == (1 if strategy == "single" else 2)
    images = EventAccumulator(str(run.tensorboard()))
    images.Reload()
    shown = images.Images("samples/row-0")
    assert [image.step for image in shown] == [0, HALF, LAST] and shown[0].encoded_image_string[:6] == b"GIF89a"


@pytest.mark.parametrize("strategy", SHARING)
def test_two_ranks_share_five_rows_of_which_one_is_broken(strategy: str, trained: Trained) -> None:
    """Nothing is cached: a text encoder that the ranks share makes of a caption what the cache has of it."""
    trained(strategy)
    first, second = samples(extra(FIVE, strategy), 0)
    assert (list(first), list(second)) == (["row-0", "row-2", "row-4"], ["row-3"])
    assert first["row-0"] == merged(samples(extra(HELD_OUT, strategy), 0))["row-0"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_moving_average_has_a_loss_and_samples_of_its_own(strategy: str, trained: Trained) -> None:
    """Before the first step it is the weights, to the bit; afterwards the losses are those of one process."""
    trained("single")
    trained(strategy)
    run = extra(HELD_OUT, strategy)
    average, alone = found(run), found(extra(HELD_OUT, "single"))
    assert average[0, "ema"] == average[0, "trained"]
    first, last = (merged(samples(run, step)) for step in (0, LAST))
    for name, by_average in zip(GOOD, BY_AVERAGE, strict=True):
        assert first[name] == first[by_average] and last[name] != last[by_average]
    for step in (HALF, LAST):
        assert average[step, "ema"] != average[step, "trained"]
        for weights in WEIGHTS:
            assert average[step, weights] == pytest.approx(alone[step, weights], rel=0.02)


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


def look_alone(under: str, strategies: Sequence[str]) -> dict[str, tuple[Found, dict[str, str]]]:
    """The held-out loss that one process finds of each strategy's checkpoint, and the samples that it makes."""
    runs = []
    for strategy in strategies:
        source = extra(HELD_OUT, strategy)
        options: dict[str, Any] = {**source.options, "max_train_steps": HALF, "num_processes": 1}
        runs.append(
            OnOneRank(name=f"alone-{strategy}", family=source.family, strategy=under, options=options, source=source)
        )
    launch(runs)
    return {strategy: (found(run), merged(samples(run, HALF))) for strategy, run in zip(strategies, runs, strict=True)}


@pytest.mark.long
@pytest.mark.ahead.with_args(look_alone, "single", ["ddp", "fsdp", "zero2"], needs=["ddp", "fsdp", "zero2"])
def test_one_process_finds_the_bits_that_two_ranks_found(result: dict[str, tuple[Found, dict[str, str]]]) -> None:
    assert len(result) == 3
    for strategy, alone in result.items():
        assert alone == of_two_ranks(strategy)


def of_two_ranks(strategy: str) -> tuple[Found, dict[str, str]]:
    run = extra(HELD_OUT, strategy)
    made = merged(samples(run, HALF))
    assert len(made) == len(GOOD + BY_AVERAGE)
    return {(HALF, weights): found(run)[HALF, weights] for weights in WEIGHTS}, made


@pytest.mark.long
@pytest.mark.ahead.with_args(look_alone, "zero3", ["zero3"], needs=["zero3"])
def test_one_rank_of_zero3_finds_the_bits_that_two_found(result: dict[str, tuple[Found, dict[str, str]]]) -> None:
    assert result["zero3"] == of_two_ranks("zero3")


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_equal_to_the_bit_after_kill_9_and_a_resume(strategy: str, workplace: Path, tmp_path: Path) -> None:
    """Looks before the kill that the run takes again are recorded once."""

    def train(run: RunDir) -> jobs.Job:
        return jobs.start(
            "train", "wan-s2v", "--demo", "--strategy", strategy, "--output-dir", run.root, "--max-train-steps", 6,
            "--checkpointing-steps", 2, "--validation-rows", 2, "--validation-steps", 1,
            "--no-validation-samples", cwd=workplace,
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
