"""Host memory that the ranks of a run take to load the model, under each strategy, as multiples of the model's files.

    python benchmarks/loading_memory.py [--blocks 28] [--blocks-at-once 5] [--shard BYTES] [--only NAME] [--scratch DIR]

Writes a synthetic Wan2.2-S2V directory (bfloat16, as released, in files of about a gigabyte; all values zero, so the
files are sparse) of 67 million parameters a block, and lets processes of a gloo group load its transformer, put in
adapters or choose what trains, and prepare it as a run does. A ``copy`` is the size of the files. ``in-files`` is how
vfun loads. ``at-once`` is the usual way, for comparison and on fewer blocks: every rank has the whole transformer in
float32 before it is cast, quantised, sharded or partitioned.

Counted is anonymous memory (RssAnon), which no two processes share, above what the process has before it loads. The
mapped files are in the page cache once beside it, and may leave it at any time; but what a process has read of them
counts as its own (RssFile) until it gives the pages back, and is counted here by itself. On this benchmark's device,
the CPU, what lives on the device is anonymous memory too, so each sample (every two milliseconds) is taken together
with the bytes of the weights in their places: parameters, ranks' shards and parts. What is beyond them is host memory
on any device. The ranks' largest differences are summed, though they need not fall into one moment.

    host copies while read   the largest difference until all weights are in their places
    mapped copies            the most of the files that counted as memory of the ranks
    host bytes               of one rank until all weights are in their places: both together, weights left out
    kept copies              weights in their places at the end, of all ranks: on the device, offloaded ones on the host
    copies at the peak       all anonymous memory of all ranks, DeepSpeed's and the optimizer's own included

``stream`` lets all blocks but one wait on the host (``--stream-blocks``), where they count as being in their places.

DeepSpeed copies the weights that train once more when it flattens them; they are in the last number.

Results: ``benchmarks/results/loading_memory.json``.
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
from contextlib import nullcontext
from pathlib import Path
from string import Template
from typing import Any

import record

DIM, FFN = 2048, 8192
LORA = {"target_name": ("q", "k", "v", "o"), "rank": 64, "network_alpha": 64.0}
PART = {"trainable_modules": ("blocks.0",)}
"""A full fine-tune keeps 16 bytes a weight and more, which do not fit this machine; what is frozen loads as it does."""
CASES: dict[str, dict[str, Any]] = {
    "single lora": {"strategy": "single", **LORA},
    "single lora fp8": {"strategy": "single", **LORA, "base_precision": "fp8"},
    "single lora nf4": {"strategy": "single", **LORA, "base_precision": "nf4"},
    "single lora stream": {"strategy": "single", **LORA, "stream_blocks": 1},
    "single lora nf4 stream": {"strategy": "single", **LORA, "base_precision": "nf4", "stream_blocks": 1},
    "ddp lora": {"strategy": "ddp", **LORA},
    "ddp lora nf4": {"strategy": "ddp", **LORA, "base_precision": "nf4"},
    "fsdp lora": {"strategy": "fsdp", **LORA},
    "fsdp part": {"strategy": "fsdp", **PART},
    "zero2 part": {"strategy": "zero2", **PART},
    "zero3 lora": {"strategy": "zero3", **LORA},
    "zero3 part": {"strategy": "zero3", **PART},
    "zero3-offload lora": {"strategy": "zero3-offload", **LORA},
    "zero3-offload part": {"strategy": "zero3-offload", **PART},
}
"""By name, the options of a run."""
AT_ONCE = ("single lora nf4", "ddp lora", "fsdp part", "zero2 part", "zero3 lora")
SMOKE = ("single lora nf4", "zero3 lora")


def write_model(folder: Path, blocks: int, shard: int) -> int:
    """A released directory's transformer in files of about so many bytes; returns its number of parameters."""
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
        if size > shard or name == tensors[-1][0]:
            text = json.dumps(header).encode()
            with (folder / weight_map[name]).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + size)
            header, size, number = {}, 0, number + 1
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return sum(parameter.numel() for parameter in model.parameters())


class Peaks(threading.Thread):
    """The most memory of this process since it was started: anonymous, mapped, and both beside the weights' places."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = resident()
        self.most = self.mapped = self.beyond_weights = self.host = 0
        self.model: Any = None
        self.streams: list[Any] = []
        self.reading = True

    def run(self) -> None:
        while True:
            anonymous, mapped = (now - first for now, first in zip(resident(), self.first, strict=True))
            self.most, self.mapped = max(self.most, anonymous), max(self.mapped, mapped)
            if self.reading:
                beyond = anonymous - self.placed()
                self.beyond_weights, self.host = max(self.beyond_weights, beyond), max(self.host, beyond + mapped)
            time.sleep(0.002)

    def placed(self) -> int:
        """Bytes of the model's weights in memory, those that several parameters share once."""
        try:
            parameters = [] if self.model is None else list(self.model.parameters())
        except RuntimeError:  # it was just being changed
            return self.placed()
        storages = {}
        for parameter in parameters:
            part = getattr(parameter, "ds_tensor", None)  # ZeRO-3's
            for tensor in (parameter, part):
                if tensor is not None and not tensor.is_meta:
                    storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values()) + sum(stream.host_bytes + stream.ring_bytes for stream in self.streams)


def resident() -> tuple[int, int]:
    """RssAnon and RssFile of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    kilobytes = dict(re.findall(r"(\w+):\s+(\d+) kB", status))
    return 1024 * int(kilobytes["RssAnon"]), 1024 * int(kilobytes["RssFile"])


def rank(folder: Path, name: str, way: str) -> None:
    """One process of a group: load, prepare, tell."""
    from types import SimpleNamespace

    import torch

    from vfun_cli.config.options import RunConfig
    from vfun_cli.families.wan_s2v import SPEC
    from vfun_cli.families.wan_s2v.transformer import load_transformer
    from vfun_cli.modeling.lazy_weights import LazyWeights
    from vfun_cli.modeling.weights import read_json
    from vfun_cli.shipped import shipped
    from vfun_cli.training import model, streaming
    from vfun_cli.training.lora import add_adapters
    from vfun_cli.training.optim import choose_trainable
    from vfun_cli.training.strategy import make_accelerator

    torch.set_num_threads(1)
    options = CASES[name]
    config = RunConfig(
        device="cpu", mixed_precision="bf16", num_processes=int(os.environ.get("WORLD_SIZE", "1")), **options
    )
    if config.strategy.startswith("zero"):
        values = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "bf16": "true"}
        template = Template((shipped("templates") / f"deepspeed/{config.strategy}.json").read_text())
        file = folder / f"deepspeed-{os.environ['RANK']}.json"
        file.write_text(template.substitute(values, pin_memory="false"))
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    elif config.strategy == "fsdp":
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_TRANSFORMER_CLS_TO_WRAP": ",".join(SPEC.model.gathered_classes),
        }  # fmt: skip
    accelerator = make_accelerator(config)
    accelerator.wait_for_everyone()
    peaks, lazy, began = Peaks(), LazyWeights(), time.monotonic()
    peaks.start()
    with lazy.transformer() if way == "in-files" else nullcontext():
        transformer = load_transformer(folder)
    if "rank" in options:
        add_adapters(transformer, config, SPEC, SPEC.model.read_dims(read_json(folder / "config.json")), lazy)
    else:
        choose_trainable(transformer, config.trainable_modules)
    if way == "in-files":  # at once, no weight is in its place before all are
        peaks.model = transformer
    # The trainer's own functions tell when they are called: what is measured must be what vfun runs.
    make_optimizer = model.make_optimizer  # type: ignore[attr-defined]

    def all_read(*given: Any, **named: Any) -> Any:
        peaks.reading = False
        return make_optimizer(*given, **named)

    model.make_optimizer = all_read  # type: ignore[attr-defined]
    take = streaming.BlockStream.take

    def noted(stream: Any, *given: Any) -> None:
        peaks.streams = [stream]
        take(stream, *given)

    streaming.BlockStream.take = noted  # type: ignore[assignment,method-assign]
    adapter: Any = SimpleNamespace(transformer=transformer)
    state = model.prepare_state(config, SPEC, adapter, accelerator, lazy)
    accelerator.wait_for_everyone()
    peaks.model = state.transformer
    print(json.dumps({"peak": peaks.most, "mapped": peaks.mapped, "beyond": peaks.beyond_weights, "host": peaks.host,
                      "kept": peaks.placed(), "seconds": time.monotonic() - began}), flush=True)  # fmt: skip
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def measure(folder: Path, name: str, way: str, parameters: int) -> dict[str, Any]:
    """All ranks of one group: one, or two where the strategy spreads over several."""
    ranks = 1 if name.startswith("single") else 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = os.environ | {"ACCELERATE_USE_CPU": "false", "OMP_NUM_THREADS": "1"}
    variables["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system, as far as it is a tensor
    environments = [variables]
    if ranks > 1:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        variables |= {"LOCAL_WORLD_SIZE": str(ranks)}
        environments = [variables | {"RANK": str(each), "LOCAL_RANK": str(each)} for each in range(ranks)]
    argv = [sys.executable, __file__, "--rank-of", str(folder), name, way]
    group = [subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment) for environment in environments]
    said = [process.communicate()[0].splitlines() for process in group]
    if any(process.returncode for process in group):
        raise SystemExit("a rank failed")
    found = [json.loads(lines[-1]) for lines in said]
    counted = ("beyond", "mapped", "kept", "peak")
    copies = {key: round(sum(each[key] for each in found) / (2 * parameters), 3) for key in counted}
    row = {
        "run": name,
        "way": way,
        "parameters": parameters,
        "ranks": ranks,
        "host_copies_while_read": copies["beyond"],
        "mapped_copies": copies["mapped"],
        "host_bytes_of_a_rank": max(each["host"] for each in found),
        "kept_copies": copies["kept"],
        "copies_at_the_peak": copies["peak"],
        "seconds": round(max(each["seconds"] for each in found), 1),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = record.parser("loading_memory", __doc__)
    parser.add_argument("--blocks", type=int, default=28, help="of the model that is loaded in files")
    parser.add_argument("--blocks-at-once", type=int, default=5, help="of the one that is loaded both ways; 0: none is")
    parser.add_argument("--shard", type=int, default=1 << 30, help="bytes of a file")
    parser.add_argument("--only", choices=CASES, action="append", help="this run; several times for several")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rank-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        folder, name, way = arguments.rank_of
        rank(Path(folder), name, way)
        return
    names = arguments.only or (SMOKE if arguments.smoke else list(CASES))
    both = [(name, way) for name in names if name in AT_ONCE for way in ("at-once", "in-files")]
    groups = [(arguments.blocks, [(name, "in-files") for name in names])]
    if arguments.blocks_at_once:
        groups.insert(0, (arguments.blocks_at_once, both))
    if arguments.smoke:
        groups = [(1, [(name, "in-files") for name in names])]
    rows: list[dict[str, Any]] = []
    for blocks, runs in groups:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            parameters = write_model(Path(scratch) / "model", blocks, arguments.shard)
            for name, way in runs:
                rows.append(measure(Path(scratch) / "model", name, way, parameters))
                record.write_result(arguments, {"rows": rows})


if __name__ == "__main__":
    main()
