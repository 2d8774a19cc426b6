"""Two processes: adapters trained under each strategy, saved, and restored under the next one.

    torchrun --nproc_per_node=2 lora_worker.py FOLDER

``FOLDER/<strategy>/trained`` is what was saved, ``continued`` the same after one more step, ``resumed`` after being
restored and one more step, ``restored`` what the next strategy saves after restoring it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lora_sample import load_model, options, prepared, train
from torch.distributed.tensor import DTensor

from vfun_cli.config.options import RunConfig
from vfun_cli.families.cogvideox_fun import SPEC, read_dims
from vfun_cli.modeling.weights import read_json
from vfun_cli.training.ending import end_with
from vfun_cli.training.lora import add_adapters, load_adapter, save_adapter
from vfun_cli.training.state.live import TrainedState, trained_parameters
from vfun_cli.training.strategy import make_accelerator

STRATEGIES = ("fsdp", "zero3", "zero2")
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "CogVideoXBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def accelerator(strategy: str, folder: Path, *, bf16: bool = True) -> Accelerator:
    """As a launch would make it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [*FSDP, "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"]:
        os.environ.pop(name, None)
    os.environ["ACCELERATE_USE_CPU"] = "false"
    if strategy == "fsdp":
        os.environ.update(FSDP)
    elif strategy.startswith("zero"):
        content = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # left out, accelerate makes it 1
            "bf16": {"enabled": bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": int(strategy[-1])},
        }
        file = folder / f"{strategy}-{os.environ['RANK']}.json"
        file.write_text(json.dumps(content))
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    return make_accelerator(RunConfig(strategy=strategy, device="cpu", mixed_precision="bf16" if bf16 else "no"))


def start(strategy: str, folder: Path) -> TrainedState:
    config = options(strategy=strategy, mixed_precision="bf16")
    base = folder / "model/transformer"
    transformer = load_model(base)
    add_adapters(transformer, config, SPEC, read_dims(read_json(base / "config.json")))
    state = prepared(transformer, config, accelerator(strategy, folder))
    sharded = [isinstance(p, DTensor) or hasattr(p, "ds_id") for p in trained_parameters(state).values()]
    assert all(sharded) or strategy == "zero2", "nothing is sharded: the test would show nothing"
    return state


def save(state: TrainedState, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(state, folder)
    state.accelerator.wait_for_everyone()


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    for strategy in STRATEGIES:
        state = start(strategy, folder)
        losses = train(state, 3, torch.bfloat16)
        save(state, folder / strategy / "trained")
        losses += train(state, 1, torch.bfloat16)
        save(state, folder / strategy / "continued")
        if state.accelerator.is_main_process:
            (folder / strategy / "losses.json").write_text(json.dumps(losses))
        state = start(strategy, folder)
        load_adapter(state, folder / strategy / "trained")
        train(state, 1, torch.bfloat16)
        save(state, folder / strategy / "resumed")
    for before, strategy in zip(STRATEGIES, [*STRATEGIES[1:], STRATEGIES[0]], strict=True):
        state = start(strategy, folder)
        load_adapter(state, folder / before / "trained")
        save(state, folder / before / "restored")
    return 0


if __name__ == "__main__":
    end_with(lambda: main(Path(sys.argv[1])))
