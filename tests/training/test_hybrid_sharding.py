"""Four processes as two groups of two: what each keeps, and what another cut of the same takes over."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hybrid_worker import OPTIMIZERS

from tests.two_ranks import run_on_ranks
from vfun_cli.checkpoints.reader import open_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    run_on_ranks(4, Path(__file__).with_name("hybrid_worker.py"), folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Mapping[str, Any]]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_groups_keep_the_same_and_go_on_bit_equal(optimizer: str, ranks: list[Mapping[str, Any]]) -> None:
    digests = [found[optimizer]["digest"] for found in ranks]
    assert digests[:2] == digests[2:] and digests[0] != digests[1]
    for found in ranks:
        assert found[optimizer]["losses"][-1] < 0.9 * found[optimizer]["losses"][0]
        assert found[optimizer]["resumed"] == found[optimizer]["losses"][2:]
        assert found[optimizer]["digest again"] == found[optimizer]["digest"]


def test_another_cut_goes_on_from_what_groups_kept(ranks: list[Mapping[str, Any]]) -> None:
    for found in ranks:
        adamw = found["adamw"]
        assert adamw["cut anew"] == [0, ""] and adamw["as saved"]
        assert adamw["losses cut anew"] == pytest.approx(adamw["losses"][2:], rel=1e-4)


@pytest.mark.skipif("adamw8bit" not in OPTIMIZERS, reason="torchao is missing")
def test_blocks_of_8_bits_are_kept_once_for_each_shard_and_not_cut_anew(
    ranks: list[Mapping[str, Any]], folder: Path
) -> None:
    moments = open_checkpoint(folder / "adamw8bit/checkpoint-2").moments["blocks.0.inner.weight"]
    assert {name.split(".")[1] for name in moments.arrays} == {"rank0", "rank1"}
    for found in ranks:
        code, said = found["adamw8bit"]["cut anew"]
        assert code == 2 and "as fsdp cut it over 2 processes, which cannot be cut anew over 4 under fsdp" in said


def test_groups_that_are_not_those_asked_for_are_refused(ranks: list[Mapping[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        code, said = found["None for 2"]
        first = rank // 2 * 2
        assert code != 0 and f"over the ranks 0, 1, 2, 3, and the run asks for the 2 from {first} on" in said
        code, said = found["2 for None"]
        assert code != 0 and f"over the ranks {first}, {first + 1}, and the run asks for the 4 from 0 on" in said
