"""Text encoders that the two ranks of a machine share give what whole ones give, whatever each has to encode."""

from pathlib import Path

import pytest
import torch

from tests.two_ranks import run_on_two_machines
from vfun_cli import families
from vfun_cli.demo import default as demo_default
from vfun_cli.training.signals import CONTINUE, INTERRUPTED

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("sharding_worker.py")
FAMILIES = tuple(families.FAMILIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spread")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for spec in families.FAMILIES.values():
            demo_default.make(spec)
    run_on_two_machines(WORKER, folder)
    return folder


@pytest.mark.parametrize("machine", [(0, 1), (2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_text_encoder_says_what_the_whole_one_says(
    family: str, machine: tuple[int, int], folder: Path
) -> None:
    ranks = [torch.load(folder / f"{family}-{rank}.pt") for rank in machine]
    assert ranks[0].keys() == ranks[1].keys() and len(ranks[0]) >= 1
    for name in ranks[0]:
        for found, calls in zip(ranks, ([1, 2, 1], [1, 1, 0]), strict=True):
            assert [len(call) for call in found[name]["shared"]] == calls
            for alone, shared in zip(found[name]["alone"], found[name]["shared"], strict=True):
                for one, other in zip(alone, shared, strict=True):
                    assert one.keys() == other.keys()
                    for key in one:
                        torch.testing.assert_close(other[key], one[key], rtol=0, atol=0)
        parts = [found[name]["here"] for found in ranks]
        assert [found[name]["ranks"] for found in ranks] == [{machine}] * 2, "nothing is sent to the other machine"
        assert max(parts) < 0.6 * ranks[0][name]["everything"]
        assert ranks[0][name]["everything"] <= sum(parts)


def test_ranks_begin_a_step_together_or_stop_together_however_late_the_clips_of_one_are(folder: Path) -> None:
    ranks = [torch.load(folder / f"begun-{rank}.pt") for rank in range(4)]
    assert ranks == [ranks[0]] * 4
    assert ranks[0]["reasons"] == [CONTINUE, CONTINUE]
    assert [[next(iter(calls.values())) for calls in step] for step in ranks[0]["calls"]] == [[1, 0], [2]]
    assert ranks[0]["stopped"] == (INTERRUPTED, [])
