"""Family x strategy: trains, falls on a memorised clip, resumes bit-equal, exports. Two processes on the CPU."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest

from tests.integration.matrix import STEPS, STRATEGIES, Run, losses, resumed, straight
from vfun_cli import families
from vfun_cli.checkpoints.export import export
from vfun_cli.rundir import RunDir

pytestmark = pytest.mark.slow

FAMILIES = tuple(families.FAMILIES)
CELLS = [(family, strategy) for strategy in STRATEGIES for family in FAMILIES]


def export_of(run: Run) -> str:
    """Content hash of the export of the run's last checkpoint."""
    spec = families.find(run.family)
    base = Path("vfun-demo") / run.family / "model" / Path(spec.config_file).parent
    output = RunDir(run.folder).root / "export"
    done = export(
        RunDir(run.folder).checkpoint(STEPS), output, base_dir=base, names=spec.export_names["same"], overwrite=True
    )
    assert done.verified
    return done.sha256


@pytest.mark.parametrize(("family", "strategy"), CELLS)
def test_loss_falls_on_a_memorised_clip(family: str, strategy: str, trained: Callable[[str], None]) -> None:
    trained(strategy)
    found = losses(straight(family, strategy))
    quarter = STEPS // 4
    assert len(found) == STEPS and all(math.isfinite(loss) for loss in found)
    assert mean(found[-quarter:]) <= 0.8 * mean(found[:quarter]), found


@pytest.mark.parametrize(("family", "strategy"), CELLS)
def test_a_resumed_run_is_bit_equal_to_the_straight_one(
    family: str, strategy: str, trained: Callable[[str], None]
) -> None:
    trained(strategy)
    assert losses(resumed(family, strategy)) == losses(straight(family, strategy))[STEPS // 2 :]
    assert export_of(resumed(family, strategy)) == export_of(straight(family, strategy))


@pytest.mark.parametrize("family", FAMILIES)
def test_strategies_agree(family: str, trained: Callable[[str], None]) -> None:
    """The same clips, noise and timesteps: the losses differ by bf16 rounding alone."""
    curves = []
    for strategy in STRATEGIES:
        trained(strategy)
        curves.append(losses(straight(family, strategy)))
    for values in zip(*curves, strict=True):
        assert max(values) <= 1.05 * min(values), values
