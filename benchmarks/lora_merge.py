"""Peak memory and time of ``--merge`` on a synthetic base of one billion parameters.

    python benchmarks/lora_merge.py [--blocks 28] [--rank 64] [--scratch DIR]

The base is bf16 in shards of 1 GB; its blocks have the layers of Wan 1.3B's, and q, k, v and the feed-forward have
adapters. The merge runs in a process of its own: wall time and peak resident memory, the interpreter included, are
that process's. A sample of the merged rows is computed again from the files and compared.

Needs 4 bytes of free disk a parameter. Results: ``benchmarks/results/lora_merge.json``.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import record

from vfun_cli.checkpoints import safetensors
from vfun_cli.checkpoints.lora_export import merge_adapter
from vfun_cli.checkpoints.tensors import CHUNK, STORAGE, Array
from vfun_cli.checkpoints.writer import Entry, plan_shards, write_shards

DIM, FFN = 1536, 8960
SHARD = 1_000_000_000
ALLOWED = 500_000_000
"""Bytes beside one shard that the merge may use."""


def layers(blocks: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the linear layers; 37 million parameters a block."""
    found = {}
    for block in range(blocks):
        for name in "qkvo":
            found[f"blocks.{block}.self_attn.{name}"] = (DIM, DIM)
        found[f"blocks.{block}.ffn.0"] = (FFN, DIM)
        found[f"blocks.{block}.ffn.2"] = (DIM, FFN)
    return found


def noise(entry: Entry) -> Iterator[Array]:
    """Small random numbers of the entry's type, the same for the same name."""
    rng = np.random.default_rng(list(entry.name.encode()))
    left = int(np.prod(entry.shape))
    while left:
        values = (rng.standard_normal(min(left, CHUNK), dtype=np.float32) * 0.02).astype(np.float32)
        yield values if entry.dtype == "F32" else (values.view(np.uint32) >> 16).astype(STORAGE["BF16"])
        left -= len(values)


def write(folder: Path, stem: str, entries: list[Entry], shard: int) -> None:
    folder.mkdir(parents=True)
    write_shards(folder, stem, plan_shards(entries, stem, shard), noise, workers=2, done=lambda count: None)


def prepare(scratch: Path, blocks: int, rank: int) -> int:
    """Write base and LoRA checkpoint; the base's number of parameters."""
    shapes = layers(blocks)
    base = [Entry(name=f"{name}.weight", dtype="BF16", shape=shape) for name, shape in shapes.items()]
    write(scratch / "base", "diffusion_pytorch_model", base, SHARD)
    (scratch / "base/config.json").write_text("{}")
    adapter = []
    for name, (out, width) in shapes.items():
        if not name.endswith(".o"):
            prefix = f"base_model.model.{name}"
            adapter.append(Entry(name=f"{prefix}.lora_A.weight", dtype="F32", shape=(rank, width)))
            adapter.append(Entry(name=f"{prefix}.lora_B.weight", dtype="F32", shape=(out, rank)))
    write(scratch / "checkpoint-1/model", "adapter_model", adapter, 1 << 60)
    (scratch / "checkpoint-1/model/adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": rank / 2}))
    return sum(out * width for out, width in shapes.values())


def merge(scratch: Path) -> None:
    """The measured process."""
    started = time.perf_counter()
    merge_adapter(scratch / "checkpoint-1", scratch / "merged", base_dir=scratch / "base", max_shard_size="1GB")
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": round(seconds, 2), "peak_bytes": peak}))


def check(scratch: Path, rank: int) -> None:
    """A layer of the last block, computed again at once."""
    base = safetensors.read_files(sorted((scratch / "base").glob("*.safetensors")))
    merged = safetensors.read_files(sorted((scratch / "merged").glob("*.safetensors")))
    adapter = safetensors.read_file(scratch / "checkpoint-1/model/adapter_model.safetensors")
    name = [name for name in base if name.endswith(".ffn.0.weight")][-1]
    layer = "base_model.model." + name.removesuffix(".weight")
    up, down = (adapter[f"{layer}.lora_{side}.weight"].read().astype(np.float32) for side in "BA")
    expected = base[name].read().astype(np.float32) + 0.5 * up @ down
    found = merged[name].read().astype(np.float32)
    spacing = np.maximum(np.abs(expected) * 2.0**-8, 1e-9)  # bf16 keeps 8 bits
    assert (np.abs(found - expected) <= spacing).all(), "the merged layer is not base + strength B A"


def main() -> None:
    parser = record.parser("lora_merge", __doc__)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.smoke:
        given.blocks, given.rank = 1, 4
    if given.measure:
        merge(given.measure)
        return
    scratch = Path(tempfile.mkdtemp(dir=given.scratch))
    try:
        parameters = prepare(scratch, given.blocks, given.rank)
        command = [sys.executable, __file__, "--measure", str(scratch)]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        check(scratch, given.rank)
        limit = SHARD + ALLOWED
        result = {
            "parameters": parameters,
            "shard_bytes": SHARD,
            "limit_bytes": limit,
            **measured,
            "within_limit": measured["peak_bytes"] < limit,
        }
        print(json.dumps(result, indent=1))
        record.write_result(given, result)
        if not result["within_limit"]:
            sys.exit("the merge needs more than one shard and 500 MB")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
