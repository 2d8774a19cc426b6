"""What each rank of a live run keeps of weights, gradients and moments is what is forecast, to the byte."""

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest

from tests.integration.matrix import COMMANDS, EXTRAS, Run, extra, first_step
from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.forecast.measuring.model import weights_of
from vfun_cli.forecast.measuring.state import kept
from vfun_cli.modeling.weights import read_json
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

Trained = Callable[[str], None]


def forecast(run: Run, ranks: int) -> dict[str, int]:
    """By the part of ``Kept``, without what is there in a step alone."""
    described = json.loads((RunDir(run.folder).run_json).read_text())
    config, spec = RunConfig.from_json(described["config"]), families.find(run.family)
    assert config.pretrained_model_name_or_path is not None
    stated = read_json(config.pretrained_model_name_or_path / spec.model.config_file)
    found = asdict(kept(config, weights_of(spec, config, stated, lora=run.command == "lora"), ranks))
    return {part: size for part, size in found.items() if part != "step"}


def held(run: Run) -> list[dict[str, int]]:
    """The same of each rank, as it was seen."""
    return [json.loads(file.read_text())["held"] for file in sorted(RunDir(run.folder).logs.glob("noted-rank-*.json"))]


def most(ranks: list[dict[str, int]]) -> dict[str, int]:
    return {part: max(rank[part] for rank in ranks) for part in ranks[0]}


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("strategy", EXTRAS)
def test_what_ranks_keep_is_forecast_to_the_byte(strategy: str, command: str, family: str, trained: Trained) -> None:
    """The first one no less than any other."""
    trained(strategy)
    run = first_step(family, strategy, command)
    ranks = held(run)
    assert len(ranks) == (1 if strategy == "single" else 2)
    assert ranks[0] == most(ranks) == forecast(run, len(ranks))
    assert all(ranks[0][part] > 0 for part in ("weights", "gradients", "moments"))


@pytest.mark.parametrize("name", ["fp32", "lora-fp32"])
@pytest.mark.parametrize("strategy", EXTRAS)
def test_so_it_is_in_float32(strategy: str, name: str, trained: Trained) -> None:
    """ZeRO-2 then keeps whole gradients of which a rank needs a part, and the last rank may keep the most."""
    trained(strategy)
    run = extra(name, strategy)
    ranks = held(run)
    assert most(ranks) == forecast(run, len(ranks))


@pytest.mark.parametrize("strategy", EXTRAS)
def test_so_it_is_where_a_part_of_the_model_is_trained_and_averaged(strategy: str, trained: Trained) -> None:
    trained(strategy)
    run = extra("subset", strategy)
    ranks = held(run)
    assert ranks[0] == most(ranks) == forecast(run, len(ranks)) and ranks[0]["average"] > 0
