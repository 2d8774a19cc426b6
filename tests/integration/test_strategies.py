"""What every strategy must do alike: averaging, precision, clipping, frozen weights, whole checkpoints."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.matrix import CLIP_NORM, STEPS, STRATEGIES, Run, extra, launch, losses, straight
from vfun_cli.checkpoints import safetensors
from vfun_cli.checkpoints.export import export
from vfun_cli.checkpoints.reader import CheckpointReader, open_checkpoint
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

MODEL = Path("vfun-demo/wan-s2v/model")
Trained = Callable[[str], None]


def checkpoint(run: Run, step: int) -> CheckpointReader:
    return open_checkpoint(RunDir(run.folder).checkpoint(step))


def rounded(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16().float().numpy()


def exported(run: Run, step: int) -> dict[str, np.ndarray]:
    folder = RunDir(run.folder).root / "export"
    export(RunDir(run.folder).checkpoint(step), folder, base_dir=MODEL, overwrite=True)
    found = safetensors.read_files(sorted(folder.glob("*.safetensors")))
    return {name: tensor.read() for name, tensor in found.items()}


def released() -> dict[str, np.ndarray]:
    found = safetensors.read_files(sorted(MODEL.glob("*.safetensors")))
    return {name: tensor.read() for name, tensor in found.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one_that_accumulates_two_micro_batches(strategy: str, trained: Trained) -> None:
    trained("single")
    trained(strategy)
    one, two = losses(extra("fp32", "single")), losses(extra("fp32", strategy))
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-4)


def test_gathering_blocks_early_changes_nothing_and_summing_in_bf16_only_rounds(trained: Trained) -> None:
    trained("fsdp")
    plain, early, rounded_off = (
        losses(extra(name, "fsdp")) for name in ("fp32", "prefetched", "reduced-in-bf16")
    )  # fmt: skip
    assert early == plain
    assert rounded_off != plain
    assert rounded_off == pytest.approx(plain, rel=0.01)


def test_blocks_gathered_early_are_under_way_when_the_block_before_starts(trained: Trained) -> None:
    trained("fsdp")
    plain, early = (
        json.loads((RunDir(extra(name, "fsdp").folder).logs / "noted-rank-0.json").read_text())["gathers"]
        for name in ("fp32", "prefetched")
    )
    assert len(plain) == len(early) > 2
    *before, last = zip(plain[1:], early[1:], strict=True)  # without the first, which is the model around the blocks
    assert all(ahead > begun for begun, ahead in before), (plain, early)
    assert last[0] == last[1], "none is gathered twice"


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_blocks_train_like_others(strategy: str, workplace: Path) -> None:
    plain = Run(
        name="plain", family="wan-s2v", strategy=strategy, options={"mixed_precision": "no", "max_train_steps": 6}
    )
    compiled = replace(plain, name="compiled", options={**plain.options, "compile": True})
    launch([plain, compiled])
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    lines = [json.loads(line) for line in RunDir(compiled.folder).metrics.read_text().splitlines()]
    graphs = [line["compiled_graphs"] for line in lines if "loss" in line]
    # Two lengths of the sequence: with the history of the clip and, at the fourth step, without.
    assert 0 < graphs[0] == graphs[2] < graphs[3] == graphs[5], graphs


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_adapters_are_the_same_whatever_trained_them(strategy: str, trained: Trained) -> None:
    trained("single")
    trained(strategy)
    runs = extra("lora-fp32", "single"), extra("lora-fp32", strategy)
    one, two = (losses(run) for run in runs)
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-4)
    expected, found = (checkpoint(run, 6).weights for run in runs)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, source in expected.items():
        values = source.read()
        np.testing.assert_allclose(found[name].read(), values, rtol=0, atol=1e-3 * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_the_named_modules_change_and_all_of_them_learn(strategy: str, trained: Trained) -> None:
    trained(strategy)
    run = extra("subset", strategy)
    reader = checkpoint(run, 3)
    before, after = released(), exported(run, 3)
    named = {name for name in before if "self_attn" in name}
    assert set(reader.weights) == named and len(named) > 20
    for name, moments in reader.moments.items():
        assert np.abs(moments.exp_avg.read()).max() > 0, f"{name} got no gradient"
    assert set(reader.moments) == named
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == named


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_are_read_once_in_the_type_that_is_kept_and_zero3_lets_each_go_before_the_next(
    strategy: str, trained: Trained
) -> None:
    trained(strategy)
    noted = json.loads((RunDir(extra("subset", strategy).folder).logs / "noted-rank-0.json").read_text())
    read = noted["read"]
    assert read["whole"] == noted["kept"] > 2 * read["largest"] > 0
    if strategy == "zero3":
        assert read["most_at_once"] == read["largest"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_clipped_to_the_norm(strategy: str, trained: Trained) -> None:
    """After one step AdamW's first moment is a tenth of the clipped gradient."""
    trained(strategy)
    reader = checkpoint(extra("clipped", strategy), 1)
    squares = sum(
        float(np.square(moments.exp_avg.read(), dtype=np.float64).sum()) for moments in reader.moments.values()
    )
    assert np.sqrt(squares) == pytest.approx(0.1 * CLIP_NORM, rel=0.02)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trained_weights_keep_a_float32_master(strategy: str, trained: Trained) -> None:
    trained(strategy)
    weights = checkpoint(straight("wan-s2v", strategy), STEPS["train"]).weights
    finer = [name for name, tensor in weights.items() if not np.array_equal(tensor.read(), rounded(tensor.read()))]
    assert len(finer) > 0.9 * len(weights)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_untrained_checkpoint_exports_the_released_weights(strategy: str, trained: Trained) -> None:
    trained(strategy)
    before, after = released(), exported(extra("untrained", strategy), 0)
    assert sorted(before) == sorted(after)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], rounded(values), err_msg=name)


def test_the_moving_average_is_saved_and_lies_between_start_and_end(trained: Trained) -> None:
    trained("single")
    reader = checkpoint(extra("average", "single"), 3)
    assert set(reader.ema) == set(reader.weights)
    name = "blocks.0.self_attn.q.weight"
    start, now, mean = released()[name], reader.weights[name].read(), reader.ema[name].read()
    assert 0 < np.abs(mean - start).mean() < np.abs(now - start).mean()
