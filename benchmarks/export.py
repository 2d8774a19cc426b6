"""Export of a trained checkpoint: vfun against DeepSpeed's zero_to_fp32 and ``accelerate merge-weights``, side by side.

    python benchmarks/export.py [--blocks 7 28] [--repeats 3] [--scratch DIR]

For every size and strategy (ZeRO-2, ZeRO-3 and FSDP's DCP, two ranks each) a checkpoint is written with optimizer
moments and all, then each tool turns it into safetensors. Before every run the checkpoint's pages are dropped from
the page cache, so each tool reads from the disk. Wall time and peak resident memory are those of the tool's process,
start-up included. The floor reads and writes as many bytes as the export must (4 and 2 a parameter, with an fsync at
the end) and does nothing else. The other tools write float32 and do not fsync. All results are compared with ours.

A run needs about 20 bytes of free disk a parameter of the larger size. Results: ``benchmarks/results/export.json``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import record

from vfun_cli.checkpoints import safetensors
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.checkpoints.tensors import CHUNK, convert

DIM, FFN = 1536, 8960  # a block of Wan 1.3B without its cross-attention
STRATEGIES = ("zero2", "zero3", "fsdp")
RANKS = 2


def shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes; 37 million parameters a block, 7 blocks and the embedding are 264 million."""
    named: dict[str, tuple[int, ...]] = {"text_embedding.weight": (DIM, 4096)}
    for block in range(blocks):
        for name in "qkvo":
            named[f"blocks.{block}.self_attn.{name}.weight"] = (DIM, DIM)
            named[f"blocks.{block}.self_attn.{name}.bias"] = (DIM,)
        named[f"blocks.{block}.ffn.0.weight"] = (FFN, DIM)
        named[f"blocks.{block}.ffn.0.bias"] = (FFN,)
        named[f"blocks.{block}.ffn.2.weight"] = (DIM, FFN)
        named[f"blocks.{block}.ffn.2.bias"] = (DIM,)
    return named


def count(blocks: int) -> int:
    """Parameters of the synthetic model."""
    return sum(int(np.prod(shape)) for shape in shapes(blocks).values())


# writing the checkpoints (in processes of their own) ---------------------------------------------------------------


def write_base(directory: Path, blocks: int) -> None:
    """The released directory that the export takes names, order and configuration from; its data is never read."""
    header, position = {}, 0
    for name, shape in shapes(blocks).items():
        end = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    directory.mkdir()
    with (directory / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    (directory / "config.json").write_text("{}")


def write_zero(directory: Path, blocks: int, stage: int) -> None:
    """What DeepSpeed 0.19.8 writes, file by file and key by key, without the memory of a training process."""
    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    named = shapes(blocks)
    sizes = {name: int(np.prod(shape)) for name, shape in named.items()}
    total = sum(sizes.values())
    folder = directory / "pytorch_model"
    folder.mkdir(parents=True)
    (directory / "latest").write_text("pytorch_model")
    (directory / "model").mkdir()
    common = {"ds_config": {}, "ds_version": version("deepspeed")}
    for rank in range(RANKS):
        rng = np.random.default_rng(rank)
        part = total // RANKS
        flat = torch.from_numpy(rng.standard_normal(part, dtype=np.float32))
        moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(part), "exp_avg_sq": torch.zeros(part)}
        group = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": [0]}
        base = {"state": {0: moments}, "param_groups": [group]}
        if stage == 2:
            slices, position = {}, 0
            for name, size in sizes.items():
                start, end = max(position, rank * part), min(position + size, (rank + 1) * part)
                if start < end:
                    slices[name] = fragment_address(numel=end - start, start=start - rank * part)
                position += size
            optimizer = {
                "base_optimizer_state": base,
                "single_partition_of_fp32_groups": [flat],
                "zero_stage": ZeroStageEnum(2),
                "group_paddings": [0],
                "partition_count": [RANKS],
                "param_slice_mappings": [slices],
                **common,
            }
        else:
            optimizer = {
                "zero_stage": ZeroStageEnum(3),
                "partition_count": RANKS,
                "optimizer_state_dict": base,
                "fp32_flat_groups": [flat],
            }
        torch.save(
            {"optimizer_state_dict": optimizer, **common},
            folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        del flat, moments, base, optimizer
    for rank in range(RANKS if stage == 3 else 1):
        held = {n: torch.zeros(s if stage == 2 else 0, dtype=torch.bfloat16) for n, s in named.items()}
        name = "mp_rank_00_model_states.pt" if stage == 2 else f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        states = {
            "module": held,
            "buffer_names": [],
            "param_shapes": [{n: torch.Size(s) for n, s in named.items()}],
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "shared_params": {},
            "dp_world_size": RANKS,
            "mp_world_size": 1,
            **common,
        }
        torch.save(states, folder / name)


def write_fsdp(directory: Path, blocks: int) -> None:
    """One rank of what accelerate's save_state writes with SHARDED_STATE_DICT; run under torchrun."""
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,))
    rng = np.random.default_rng(dist.get_rank())

    def shard(shape: tuple[int, ...], *, zeros: bool) -> DTensor:
        local = (shape[0] // RANKS, *shape[1:])
        values = torch.zeros(local) if zeros else torch.from_numpy(rng.standard_normal(local, dtype=np.float32))
        return DTensor.from_local(values, mesh, [Shard(0)])

    model = {name: shard(shape, zeros=False) for name, shape in shapes(blocks).items()}
    save({"model": model}, checkpoint_id=directory / "pytorch_model_fsdp_0")
    del model
    state = {
        name: {"exp_avg": shard(shape, zeros=True), "exp_avg_sq": shard(shape, zeros=True), "step": torch.tensor(1.0)}
        for name, shape in shapes(blocks).items()
    }
    save({"optimizer": {"state": state}}, checkpoint_id=directory / "optimizer_0")
    dist.destroy_process_group()


# running the tools -------------------------------------------------------------------------------------------------

_OURS = """
import sys
from pathlib import Path
from vfun_cli.checkpoints.export import export
export(Path(sys.argv[1]), Path(sys.argv[2]), base_dir=Path(sys.argv[3]))
"""

_FLOOR = """
import os, sys
files, output, parameters = sys.argv[3:], os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), int(sys.argv[2])
buffer, left, written = bytearray(1 << 22), 4 * parameters, 0
for name in files:
    source = os.open(name, os.O_RDONLY)
    while left and (count := os.readv(source, [memoryview(buffer)[: min(left, len(buffer))]])):
        os.write(output, memoryview(buffer)[: count // 2])
        left -= count
os.fsync(output)
"""


def commands(strategy: str, checkpoint: Path, base: Path, out: Path, parameters: int) -> dict[str, list[str]]:
    """The argument vector of each tool."""
    files = sorted(checkpoint.rglob("*.distcp" if strategy == "fsdp" else "*optim_states.pt"))
    read = [str(file) for file in files if "optimizer_0" not in file.parts]
    tools = {
        "floor": [sys.executable, "-S", "-c", _FLOOR, str(out), str(parameters), *read],
        "vfun": [sys.executable, "-c", _OURS, str(checkpoint), str(out), str(base)],
    }
    if strategy == "fsdp":
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        tools["accelerate merge-weights"] = [
            accelerate, "merge-weights", str(checkpoint / "pytorch_model_fsdp_0"), str(out),
        ]  # fmt: skip
    else:
        module = [sys.executable, "-m", "deepspeed.utils.zero_to_fp32"]
        tools["deepspeed zero_to_fp32"] = [
            *module, str(checkpoint), str(out), "--safe_serialization", "--max_shard_size", "10GB",
        ]  # fmt: skip
    return tools


def evict(directory: Path) -> None:
    """Write back, then drop the files' pages from the page cache."""
    for file in (path for path in directory.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


_LAUNCHER = """
import os, sys, time
start = time.perf_counter()
process = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
cpu = usage.ru_utime + usage.ru_stime
print("MEASURED", time.perf_counter() - start, cpu, usage.ru_maxrss, status, file=sys.stderr)
"""


def measure(command: list[str]) -> dict[str, float]:
    """Seconds, processor seconds and peak resident memory of one process.

    It is started from a bare interpreter: a process inherits the peak of the one that started it, 10 MB there.
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "2"}
    launcher = [sys.executable, "-S", "-E", "-c", _LAUNCHER, *command]
    ran = subprocess.run(launcher, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, check=True)
    errors, _, measured = ran.stderr.decode().rpartition("MEASURED ")
    wall, cpu, peak, status = map(float, measured.split())
    if status:
        raise SystemExit(f"{command[:4]} failed:\n{errors[-2000:]}")
    return {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3), "peak_mb": round(peak / 1024, 1)}


def bf16_of(path: Path, name: str) -> Iterator[bytes]:
    """A tensor of an exported directory, rounded to bf16 if it is not yet."""
    tensor = safetensors.read_files(sorted(path.glob("*.safetensors")))[name]
    out = np.empty(CHUNK, np.float32)
    for chunk in tensor.chunks():
        yield convert(chunk, tensor.dtype, "BF16", out).tobytes()


def compare(ours: Path, theirs: Path, blocks: int) -> None:
    """Stop when another tool's weights, rounded, are not ours."""
    for name in shapes(blocks):
        if list(bf16_of(ours, name)) != list(bf16_of(theirs, name)):
            raise SystemExit(f"{theirs}: {name} differs from our export")


def run_case(strategy: str, blocks: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """Write one checkpoint, run every tool over it, and clean up."""
    checkpoint, base = scratch / "checkpoint-1", scratch / "base"
    write_base(base, blocks)
    write = [sys.executable, __file__, "--write", strategy, "--blocks", str(blocks), "--scratch", str(checkpoint)]
    if strategy == "fsdp":
        write[1:2] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", __file__]
    measure(write)
    parameters = count(blocks)
    read = open_checkpoint(checkpoint)
    assert sum(source.numel for source in read.weights.values()) == parameters
    best: dict[str, dict[str, float]] = {}
    for repeat in range(repeats):
        for tool, command in commands(strategy, checkpoint, base, scratch / "out", parameters).items():
            evict(checkpoint)
            found = measure(command)
            best[tool] = min(best.get(tool, found), found, key=lambda one: one["wall_s"])
            print(f"{strategy} {parameters / 1e6:.0f}M {tool}: {found}", file=sys.stderr, flush=True)
            if repeat == 0 and tool == "vfun":
                (scratch / "out").rename(scratch / "ours")
            elif repeat == 0 and tool != "floor":
                compare(scratch / "ours", scratch / "out", blocks)
            evict(scratch / "out") if (scratch / "out").is_dir() else None
            shutil.rmtree(scratch / "out", ignore_errors=True)
            (scratch / "out").unlink(missing_ok=True)
    for directory in (checkpoint, base, scratch / "ours"):
        shutil.rmtree(directory)
    return {"strategy": strategy, "parameters": parameters, "tools": best}


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that matter: time and memory against the other tool, and memory at both sizes."""
    rows: dict[str, Any] = {}
    for strategy in STRATEGIES:
        found = sorted((c for c in cases if c["strategy"] == strategy), key=lambda case: case["parameters"])
        for case in found:
            ours = case["tools"]["vfun"]
            (other,) = [v for k, v in case["tools"].items() if k not in ("vfun", "floor")]
            rows[f"{strategy} {case['parameters'] / 1e6:.0f}M"] = {
                "wall_vs_other": round(ours["wall_s"] / other["wall_s"], 3),
                "cpu_vs_other": round(ours["cpu_s"] / other["cpu_s"], 3),
                "peak_vs_other": round(ours["peak_mb"] / other["peak_mb"], 3),
                "wall_vs_floor": round(ours["wall_s"] / case["tools"]["floor"]["wall_s"], 2),
            }
        peaks = [case["tools"]["vfun"]["peak_mb"] for case in found]
        if len(peaks) > 1:
            rows[f"{strategy} peak, largest over smallest size"] = round(max(peaks) / min(peaks), 3)
    return rows


def main() -> None:
    """Run the benchmark, or (internally) write one checkpoint."""
    parser = record.parser("export", __doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[7, 28], help="sizes: 7 is 264M, 28 is 1039M")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each tool; the fastest counts")
    parser.add_argument("--scratch", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument("--write", choices=STRATEGIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke and not options.write:
        options.blocks, options.repeats = [1], 1
    if options.write == "fsdp":
        write_fsdp(options.scratch, options.blocks[0])
    elif options.write:
        write_zero(options.scratch, options.blocks[0], int(options.write[-1]))
    else:
        cases: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            for blocks in options.blocks:
                for strategy in STRATEGIES:
                    cases.append(run_case(strategy, blocks, options.repeats, Path(scratch)))
                    write_report(options, cases)  # a run that is stopped keeps what it has
        print(json.dumps(summary(cases), indent=1))


def write_report(given: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
    """The results so far, with what they were measured on."""
    report = {
        "schema": 1,
        "repeats": given.repeats,
        "summary": summary(cases),
        "cases": cases,
    }
    record.write_result(given, report)


if __name__ == "__main__":
    main()
