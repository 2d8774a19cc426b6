"""Host memory that the ranks of an FSDP run take to load the model, as multiples of one float32 copy of it.

    python benchmarks/fsdp_loading.py [--size 5:1,2,4:both] [--size 28:1,2,4:in-files] [--scratch DIR]

Writes a synthetic Wan2.2-S2V directory (bfloat16, as released, in shards of about a gigabyte; all values zero, so the
files are sparse) of 67 million parameters a block, and lets processes of a gloo group load and shard its transformer
as a run does. ``in-files`` is how vfun loads. ``loaded-first`` is the usual way, for comparison: every rank loads the
whole transformer in float32 and keeps its shard.

Counted is anonymous memory (RssAnon), which no two processes share, above what the process has before it loads. The
peak of each rank is found by looking every two milliseconds; the peaks are summed, though they need not fall into one
moment. The state at the end, float32 shards on the CPU, is one copy in itself; on GPUs it would be none.

Results: ``benchmarks/results/fsdp_loading.json``.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import record

DIM, FFN = 2048, 8192
SHARD = 1 << 30
WAYS = ("loaded-first", "in-files")


def write_model(folder: Path, blocks: int) -> int:
    """A released directory's transformer; returns its number of parameters."""
    import torch

    from vfun_cli.families.wan_s2v.transformer import WanS2VTransformer3DModel
    from vfun_cli.modeling.weights import empty_model

    config = {"dim": DIM, "ffn_dim": FFN, "num_heads": 16, "num_layers": blocks, "audio_inject_layers": [0]}
    model = empty_model(lambda: WanS2VTransformer3DModel(**config))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map, header, size, number = {}, {}, 0, 0
    tensors = list(model.state_dict().items())
    for name, tensor in tensors:
        assert isinstance(tensor, torch.Tensor)
        end = size + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [size, end]}
        weight_map[name], size = f"part-{number}.safetensors", end
        if size > SHARD or name == tensors[-1][0]:
            text = json.dumps(header).encode()
            with (folder / weight_map[name]).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + size)
            header, size, number = {}, 0, number + 1
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return sum(parameter.numel() for parameter in model.parameters())


class Peak(threading.Thread):
    """The most anonymous memory of this process since it was started, above what it began with."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = anonymous()

    def run(self) -> None:
        while True:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)


def anonymous() -> int:
    """RssAnon of this process in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def rank(folder: Path, way: str) -> None:
    """One process of a group: load, shard, tell."""
    from types import SimpleNamespace

    import torch

    from vfun_cli.config.options import RunConfig
    from vfun_cli.families.wan_s2v import SPEC
    from vfun_cli.families.wan_s2v.transformer import load_transformer
    from vfun_cli.modeling.lazy_weights import LazyWeights
    from vfun_cli.training.model import prepare_state
    from vfun_cli.training.strategy import make_accelerator

    torch.set_num_threads(1)
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(SPEC.model.block_classes)
    config = RunConfig(strategy="fsdp", device="cpu", mixed_precision="no")
    accelerator = make_accelerator(config)
    lazy = LazyWeights()
    accelerator.wait_for_everyone()
    peak, began = Peak(), time.monotonic()
    peak.start()
    if way == "in-files":
        with lazy.transformer():
            transformer = load_transformer(folder)
    else:
        transformer = load_transformer(folder)
    adapter: Any = SimpleNamespace(transformer=transformer)
    state = prepare_state(config, SPEC, adapter, accelerator, lazy)
    accelerator.wait_for_everyone()
    print(json.dumps({"peak": peak.most - peak.first, "end": anonymous() - peak.first,
                      "seconds": time.monotonic() - began}), flush=True)  # fmt: skip
    accelerator.wait_for_everyone()
    assert state.model is not None
    torch.distributed.destroy_process_group()


def measure(folder: Path, way: str, ranks: int, parameters: int) -> dict[str, Any]:
    """All ranks of one group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true", "ACCELERATE_USE_CPU": "false", "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
    }  # fmt: skip
    argv = [sys.executable, __file__, "--rank-of", str(folder), way]
    group = [
        subprocess.Popen(
            argv, stdout=subprocess.PIPE, env=os.environ | shared | {"RANK": str(number), "LOCAL_RANK": str(number)}
        )
        for number in range(ranks)
    ]
    said = [process.communicate()[0].splitlines() for process in group]
    if any(process.returncode for process in group):
        raise SystemExit("a rank failed")
    found = [json.loads(lines[-1]) for lines in said]
    copy = 4 * parameters
    row = {
        "parameters": parameters,
        "way": way,
        "ranks": ranks,
        "copies_at_peak": round(sum(each["peak"] for each in found) / copy, 3),
        "copies_at_end": round(sum(each["end"] for each in found) / copy, 3),
        "peak_of_each_rank_gb": [round(each["peak"] / 1e9, 3) for each in found],
        "seconds": round(max(each["seconds"] for each in found), 1),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = record.parser("fsdp_loading", __doc__)
    parser.add_argument("--size", action="append", help="BLOCKS:RANKS,RANKS,...:in-files|loaded-first|both")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank(Path(arguments.rank_of[0]), arguments.rank_of[1])
        return
    rows = []
    for size in arguments.size or (["1:1:in-files"] if arguments.smoke else ["5:1,2,4:both", "28:1,2,4:in-files"]):
        blocks, ranks, ways = size.split(":")
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            parameters = write_model(Path(scratch) / "model", int(blocks))
            for way in WAYS if ways == "both" else [ways]:
                rows += [measure(Path(scratch) / "model", way, int(number), parameters) for number in ranks.split(",")]
    record.write_result(arguments, {"rows": rows})


if __name__ == "__main__":
    main()
