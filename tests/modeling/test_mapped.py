"""Pages of mapped files: given back once they were read, and nothing else is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vfun_cli.modeling.lazy_weights import LazyWeights
from vfun_cli.modeling.mapped import give_back
from vfun_cli.modeling.weights import empty_model, load_pth, load_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what counts as memory is read from /proc")

MEGABYTE = 1 << 20


def mapped_bytes() -> int:
    """What mapped files count as this process's memory."""
    found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_pages_of_a_tensor_that_was_read_leave_the_process_and_can_be_read_again(kind: str, tmp_path: Path) -> None:
    values = {f"{name}": torch.randn(4, MEGABYTE) for name in range(4)}
    path = tmp_path / f"model.{kind}"
    if kind == "pth":
        torch.save(values, path)
        stored = load_pth(path)
    else:
        save_file(values, path)
        with safe_open(str(path), framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in values}
    before = mapped_bytes()
    sums = {name: tensor.sum() for name, tensor in stored.items()}
    assert mapped_bytes() - before > 60 * MEGABYTE
    give_back(stored["0"][1:3])
    assert 50 * MEGABYTE < mapped_bytes() - before < 58 * MEGABYTE
    for tensor in stored.values():
        give_back(tensor.T)
    assert mapped_bytes() - before < 8 * MEGABYTE  # torch's own code among them
    assert {name: tensor.sum() for name, tensor in stored.items()} == sums
    assert all(torch.equal(stored[name], tensor) for name, tensor in values.items())


def test_what_lies_in_no_file_is_left_alone() -> None:
    held, mapped = torch.full((MEGABYTE,), 7.0), torch.full((32 * MEGABYTE,), 7.0)  # the second in pages of its own
    for tensor in (held, mapped, mapped[MEGABYTE:]):
        give_back(tensor)
    assert (held == 7).all() and (mapped == 7).all()


@pytest.mark.slow
def test_a_model_that_is_read_late_counts_one_tensor_at_a_time(tmp_path: Path) -> None:
    def build() -> torch.nn.Module:
        return torch.nn.Sequential(*(torch.nn.Linear(1024, 4096) for _ in range(6)))

    path = tmp_path / "model.safetensors"
    save_file(build().state_dict(), path)
    lazy, model = LazyWeights(), empty_model(build)
    with lazy.transformer():
        load_weights(model, [path], where=str(path), transformer=True)
    lazy.to_meta(model)
    before = mapped_bytes()
    most = max(mapped_bytes() - before for _ in lazy.placed(model, torch.device("cpu")))
    assert most < 2 * MEGABYTE < 6 * 16 * MEGABYTE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "layers"),
    [
        ("single lora", 1),
        pytest.param("single lora nf4", 5, marks=pytest.mark.long),
        pytest.param("ddp lora nf4", 5, marks=pytest.mark.long),
    ],
)
def test_lora_over_a_base_in_shards_takes_a_shard_of_host_memory_and_a_layer(
    run: str, layers: int, tmp_path: Path
) -> None:
    """Private and mapped memory of a process that loads 0.6 GB, the weights that are in their places left out: on a
    GPU those are on the device. What is made of a layer while it is quantised is there, too, and is counted here.
    """
    script, output = Path(__file__).parents[2] / "benchmarks/loading_memory.py", tmp_path / "result.json"
    shard, layer = 100_000_000, 4 * 2048 * 8192
    given = ["--blocks", "3", "--blocks-at-once", "0", "--shard", str(shard), "--only", run, "--scratch", str(tmp_path)]
    command = [sys.executable, str(script), *given, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [row] = json.loads(output.read_text())["rows"]
    files = 2 * row["parameters"]
    assert files > 5 * shard
    assert row["mapped_copies"] * files < row["ranks"] * shard, row
    assert row["host_bytes_of_a_rank"] < shard + layers * layer < files, row
