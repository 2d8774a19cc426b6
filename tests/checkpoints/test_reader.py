"""The reader sees the same named tensors whatever wrote them, and runs nothing that a checkpoint asks for."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from write_sample import STRATEGIES, sample_moments, sample_weights

from tests.jobs import vfun_here
from tests.run.small_run import write_run
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.pickles import TorchArchive
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.errors import CheckpointError
from vfun_cli.run import locate
from vfun_cli.run.rundir import RunDir


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_are_what_the_engine_held(samples: Path, strategy: str) -> None:
    reader = open_checkpoint(samples / strategy)
    assert reader.weights.keys() == sample_weights().keys()
    for name, expected in sample_weights().items():
        np.testing.assert_array_equal(reader.weights[name].read(), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_moments_are_what_the_engine_held(samples: Path, strategy: str) -> None:
    moments = open_checkpoint(samples / strategy).moments
    assert moments.keys() == sample_moments().keys()
    for name, expected in sample_moments().items():
        np.testing.assert_array_equal(moments[name].arrays["exp_avg"].read(), expected["exp_avg"])
        np.testing.assert_array_equal(moments[name].arrays["exp_avg_sq"].read(), expected["exp_avg_sq"])
        assert moments[name].step == 1


def test_reading_imports_neither_torch_nor_deepspeed(samples: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vfun_cli.checkpoints.reader import open_checkpoint\n"
        f"for s in {STRATEGIES!r}: open_checkpoint(Path({str(samples)!r}) / s).moments\n"
        "print(sorted({'torch', 'deepspeed', 'accelerate'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_columns_cut_over_two_files_are_put_together(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed._shard.sharded_tensor import ShardedTensor  # noqa: F401  (registers the saver)

    whole = torch.arange(4 * 6, dtype=torch.float32).reshape(4, 6)
    dcp.save({"model": {"w": whole, "v": whole.bfloat16()}}, checkpoint_id=tmp_path, no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    # the same tensor as two column blocks, as Shard(1) over two ranks leaves it
    parts = {0: whole[:, :4].contiguous(), 4: whole[:, 4:].contiguous()}
    entry = metadata.state_dict_metadata["model.w"]
    index = next(i for i in metadata.storage_data if i.fqn == "model.w")
    info = metadata.storage_data.pop(index)
    entry.chunks.clear()
    for column, part in parts.items():
        torch.save(part, tmp_path / f"{column}.distcp")
        entry.chunks.append(
            type(metadata.state_dict_metadata["model.v"].chunks[0])(torch.Size([0, column]), part.shape)
        )
        size = (tmp_path / f"{column}.distcp").stat().st_size
        metadata.storage_data[type(index)("model.w", torch.Size([0, column]))] = type(info)(f"{column}.distcp", 0, size)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    weights = open_checkpoint(tmp_path).weights
    np.testing.assert_array_equal(weights["w"].read(), whole.numpy())
    np.testing.assert_array_equal(weights["v"].read(), whole.numpy())


class _Payload:
    """Asks for a command to be run when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["zero2 optimizer", "zero2 model", "dcp metadata", "dcp part"])
def test_a_planted_command_is_refused_and_not_run(samples: Path, tmp_path: Path, place: str) -> None:
    sample = "fsdp" if "dcp" in place else "zero2"
    checkpoint = shutil.copytree(samples / sample, tmp_path / "checkpoint-1")
    payload = _Payload(f"touch {tmp_path}/ran")
    if place == "dcp metadata":
        (checkpoint / "model" / ".metadata").write_bytes(pickle.dumps(payload))
    elif place == "dcp part":
        for file in checkpoint.rglob("*.distcp"):
            torch.save(payload, file)
            file.write_bytes(file.read_bytes() * 40)
    else:
        pattern = "*optim_states.pt" if "optimizer" in place else "*model_states.pt"
        for file in checkpoint.rglob(pattern):
            torch.save({"optimizer_state_dict": payload, "param_shapes": payload}, file)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(checkpoint).weights["head.weight"].read()
    assert refused.value.exit_code == 5
    assert "refused" in refused.value.message or place == "dcp part"
    assert not (tmp_path / "ran").exists()


def test_a_planted_command_in_a_torch_file_names_the_function(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": _Payload(f"touch {tmp_path}/ran")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        TorchArchive(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "torch.load", "torch.hub.load", "nt.system"])
def test_names_outside_the_list_are_refused(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{attribute}\n(S'1+1'\ntR.".encode())
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [None, -1, 10**30, [], (), 0.5])
def test_a_description_of_odd_values_is_an_error_of_the_checkpoint(
    samples: Path, tmp_path: Path, value: object
) -> None:
    sharded = shutil.copytree(samples / "fsdp", tmp_path / "fsdp") / "model"
    plan = pickle.loads((sharded / ".metadata").read_bytes())
    plan.planner_data[next(iter(plan.planner_data))] = value
    (sharded / ".metadata").write_bytes(pickle.dumps(plan))
    stage = shutil.copytree(samples / "zero2", tmp_path / "zero2")
    (file,) = stage.rglob("*model_states.pt")
    content = torch.load(file, weights_only=False)
    content["param_shapes"][0]["head.bias"] = value
    torch.save(content, file)
    for file in stage.rglob("*optim_states.pt"):
        content = torch.load(file, weights_only=False)
        content["optimizer_state_dict"].pop(
            "param_alignment_paddings", None
        )  # of every parameter; older releases write none
        torch.save(content, file)
    for checkpoint in (sharded.parent, stage):
        with pytest.raises(CheckpointError):
            reader = open_checkpoint(checkpoint)
            for source in reader.weights.values():
                source.read()


@pytest.mark.parametrize("strategy", ["single", "fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_files_are_errors_of_the_checkpoint(
    samples: Path, tmp_path: Path, strategy: str, keep: float
) -> None:
    checkpoint = shutil.copytree(samples / strategy, tmp_path / "checkpoint-1")
    pattern = {"single": "model.safetensors", "fsdp": "*.distcp"}.get(strategy, "*optim_states.pt")
    files = list(checkpoint.rglob(pattern))
    assert files
    for file in files:
        os.truncate(file, int(file.stat().st_size * keep))
    with pytest.raises(CheckpointError) as error:
        reader = open_checkpoint(checkpoint)
        for parts in reader.moments.values():  # the last bytes of the files are moments in some layouts
            [each.read() for each in parts.arrays.values()]
        for source in reader.weights.values():
            source.read()
    assert error.value.exit_code == 5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_changed_byte_in_any_file_of_any_strategy_is_named(samples: Path, tmp_path: Path, strategy: str) -> None:
    checkpoint = shutil.copytree(samples / strategy, tmp_path / "checkpoint-1")
    manifest.write_manifest(checkpoint)
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != manifest.MANIFEST]
    assert files
    for path in files:
        whole = path.read_bytes()
        damaged = bytearray(whole or b"?")
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=re.escape(path.name)):
            manifest.verify(checkpoint)
        path.write_bytes(whole)
    manifest.verify(checkpoint)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_a_missing_rank_is_an_error(samples: Path, tmp_path: Path, strategy: str) -> None:
    checkpoint = shutil.copytree(samples / strategy, tmp_path / "checkpoint-1")
    pattern = "__1_0.distcp" if strategy == "fsdp" else "*rank_1_mp_rank_00_optim_states.pt"
    (file,) = checkpoint.rglob(pattern)
    file.unlink()
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint).weights["head.weight"].read()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_that_lacks_any_of_its_files_counts_for_nothing(
    samples: Path, tmp_path: Path, strategy: str
) -> None:
    run = RunDir(tmp_path)
    write_run(run, steps=(2, 4))
    newest = run.checkpoint(4)
    shutil.copytree(samples / strategy, newest, dirs_exist_ok=True)
    manifest.write_manifest(newest)
    files = manifest.files_of(newest)
    assert len(files) > 2 and locate.checkpoint(None, output_dir=run.root).checkpoint == newest
    for file in files:
        file.rename(tmp_path / "away")
        assert [path.name for path in manifest.checkpoints(run.root)] == ["checkpoint-2"]
        found = [locate.newest(run), locate.checkpoint(None, output_dir=run.root)]
        assert [each and each.step for each in [*found, locate.to_resume("latest", output_dir=run.root)]] == [2, 2, 2]
        if file == files[-1]:
            for words in (["checkpoints", "verify", newest], ["export-bf16", newest], ["resume", newest]):
                said = vfun_here(*words)
                assert said.code == CheckpointError.exit_code
                assert f"{file.name} is missing" in " ".join(said.err.split())
        (tmp_path / "away").rename(file)
    assert len(manifest.checkpoints(run.root)) == 2


def test_compressed_members_are_refused(samples: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive, zipfile.ZipFile(tmp_path / "y.pt", "w", 8) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        TorchArchive(tmp_path / "y.pt")


def test_an_empty_directory_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        open_checkpoint(tmp_path / "absent")
