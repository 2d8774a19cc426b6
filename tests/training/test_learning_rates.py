"""The learning rate of every step: what transformers' and diffusers' get_scheduler give, and a floor."""

import dataclasses

import diffusers.optimization
import pytest
import torch
import transformers

from vfun_cli.config.options import ENDING_SCHEDULERS, LR_SCHEDULERS, RunConfig
from vfun_cli.training.optim import learning_rate

STEPS, WARMUP, PEAK = 40, 5, 3e-4


def config_of(scheduler: str, **options: object) -> RunConfig:
    base = RunConfig(learning_rate=PEAK, lr_scheduler=scheduler, lr_warmup_steps=WARMUP)
    return dataclasses.replace(base, **options)  # type: ignore[arg-type]


def rates(config: RunConfig) -> list[float]:
    return [learning_rate(step, config, STEPS) for step in range(STEPS + 1)]


def theirs(make: object, *given: object, **named: object) -> list[float]:
    """The rates that one of their schedulers sets, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule, found = make(*given, optimizer=optimizer, **named), []  # type: ignore[operator]
    for _ in range(STEPS + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("scheduler", LR_SCHEDULERS)
def test_rates_are_those_of_transformers(scheduler: str) -> None:
    more = {"cosine_with_restarts": {"num_cycles": 3}, "polynomial": {"power": 2.0}}.get(scheduler)
    config = config_of(scheduler, lr_num_cycles=3, lr_power=2.0)
    found = theirs(
        transformers.get_scheduler, scheduler, num_warmup_steps=WARMUP, num_training_steps=STEPS,
        scheduler_specific_kwargs=more,
    )  # fmt: skip
    assert rates(config) == pytest.approx(found, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("scheduler", LR_SCHEDULERS)
def test_rates_are_those_of_diffusers(scheduler: str) -> None:
    found = theirs(
        diffusers.optimization.get_scheduler, scheduler, num_warmup_steps=WARMUP, num_training_steps=STEPS,
        num_cycles=3, power=2.0,
    )  # fmt: skip
    assert rates(config_of(scheduler, lr_num_cycles=3, lr_power=2.0)) == pytest.approx(found, rel=1e-9, abs=1e-15)


def test_a_floor_under_cosine_is_that_of_transformers() -> None:
    found = theirs(
        transformers.get_scheduler, "cosine_with_min_lr", num_warmup_steps=WARMUP, num_training_steps=STEPS,
        scheduler_specific_kwargs={"min_lr_rate": 0.2},
    )  # fmt: skip
    assert rates(config_of("cosine", lr_min_ratio=0.2)) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("scheduler", ENDING_SCHEDULERS)
def test_past_its_end_a_schedule_stays_where_it_is(scheduler: str) -> None:
    """Theirs rise again under cosine."""
    config = config_of(scheduler, lr_num_cycles=2)
    assert learning_rate(STEPS + 7, config, STEPS) == learning_rate(STEPS, config, STEPS) < 1e-3 * PEAK


@pytest.mark.parametrize("scheduler", ENDING_SCHEDULERS)
def test_a_schedule_with_a_floor_falls_from_the_peak_to_it(scheduler: str) -> None:
    found = rates(config_of(scheduler, lr_min_ratio=0.25, lr_num_cycles=2))
    assert found[0] == 0 and found[WARMUP] == pytest.approx(PEAK)
    assert min(found[WARMUP:]) == pytest.approx(0.25 * PEAK) == found[-1]
