"""Two processes: adapters and whole models trained under each strategy, saved, and restored under the next one.

    torchrun --nproc_per_node=2 sharded_worker.py FOLDER

``FOLDER/<strategy>/trained`` is what was saved of adapters, ``continued`` the same after one more step, ``resumed``
after being restored and one more step, ``restored`` what the next strategy saves after restoring it. Of whole models
the same is below ``FOLDER/whole``, as checkpoints, e.g. ``FOLDER/whole/<strategy>/trained/checkpoint-3``. That of one
process is there already, and the first strategy restores it.
"""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lora_sample import load_model, options, predict, prepared, train
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES as STRATEGY
from vfun_cli.families.cogvideox_fun import SPEC, read_dims
from vfun_cli.modeling.weights import read_json
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.ending import end_with
from vfun_cli.training.looking import Stopped, evaluating, weights_of
from vfun_cli.training.lora import add_adapters, load_adapter, save_adapter
from vfun_cli.training.signals import PREEMPTED
from vfun_cli.training.state.averaged import load_average
from vfun_cli.training.state.checkpointer import Checkpointer
from vfun_cli.training.state.gather import collect
from vfun_cli.training.state.live import TrainedState, is_partitioned, master_weights, trained_parameters
from vfun_cli.training.strategy import make_accelerator

STRATEGIES = ("fsdp", "zero3", "zero2")
WHOLE = ("fsdp", "zero2", "zero3", "zero3-offload")
"""Those that train whole models. From its first ZeRO-3 on, DeepSpeed has linear layers of its own for a process."""
ROUNDS_ALIKE = ("fsdp", "zero2")
"""Those that come before, and compute the bits of one process."""
STEPS = 3
"""Before a checkpoint is restored."""
AVERAGED: dict[str, Any] = {"use_ema": True, "ema_decay": 0.5}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "CogVideoXBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def accelerator(strategy: str, folder: Path, *, bf16: bool = True, **options: Any) -> Accelerator:
    """As a launch would make it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [*FSDP, "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"]:
        os.environ.pop(name, None)
    os.environ["ACCELERATE_USE_CPU"] = "false"
    if strategy == "fsdp":
        os.environ.update(FSDP)
    elif strategy.startswith("zero"):
        content: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # left out, accelerate makes it 1
            "bf16": {"enabled": bf16},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": STRATEGY[strategy].zero_stage},
        }
        if strategy == "zero3-offload":
            content["zero_optimization"] |= {f"offload_{what}": {"device": "cpu"} for what in ("optimizer", "param")}
        file = folder / f"{strategy}-{os.environ['RANK']}.json"
        file.write_text(json.dumps(content))
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    precision = "bf16" if bf16 else "no"
    return make_accelerator(RunConfig(strategy=strategy, device="cpu", mixed_precision=precision, **options))


def start(strategy: str, folder: Path) -> TrainedState:
    config = options(strategy=strategy, mixed_precision="bf16", **AVERAGED)
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


def load(state: TrainedState, folder: Path) -> None:
    load_adapter(state, folder)
    load_average(state, open_checkpoint(folder))


def learn(state: TrainedState, first: int, last: int, noted: dict[str, torch.Tensor] | None = None) -> list[float]:
    """Steps from ``first`` to before ``last``, as the trainer takes them; their losses.

    Args:
        noted: takes on rank 0, by name, the average that is computed here of gathered weights.
    """
    losses = []
    for step in range(first, last):
        losses += train(state, 1, torch.bfloat16)
        assert state.average is not None
        state.average.update(master_weights(state), step)
        decay = min(AVERAGED["ema_decay"], (1 + step) / (10 + step)) if step else 0
        for name, weight in collect(state)[0].items() if noted is not None else ():
            noted[name] = weight if name not in noted else decay * noted[name] + (1 - decay) * weight
    return losses


def adapters(folder: Path) -> None:
    for strategy in STRATEGIES:
        state = start(strategy, folder)
        losses = learn(state, 0, STEPS)
        save(state, folder / strategy / "trained")
        losses += learn(state, STEPS, STEPS + 1)
        save(state, folder / strategy / "continued")
        if state.accelerator.is_main_process:
            (folder / strategy / "losses.json").write_text(json.dumps(losses))
        state = start(strategy, folder)
        load(state, folder / strategy / "trained")
        learn(state, STEPS, STEPS + 1)
        save(state, folder / strategy / "resumed")
    for before, strategy in zip(STRATEGIES, [*STRATEGIES[1:], STRATEGIES[0]], strict=True):
        state = start(strategy, folder)
        load(state, folder / before / "trained")
        save(state, folder / before / "restored")


# Whole models --------------------------------------------------------------------------------------------------------


def start_whole(strategy: str, folder: Path) -> TrainedState:
    """On one process where the strategy is ``single``."""
    config = options(strategy=strategy, mixed_precision="bf16", **AVERAGED)
    made = Accelerator(cpu=True) if strategy == "single" else accelerator(strategy, folder)
    return prepared(load_model(folder / "model/transformer"), config, made)


def checkpointer(strategy: str, folder: Path, name: str) -> Checkpointer:
    run = RunDir(folder / "whole" / strategy / name)
    run.root.mkdir(parents=True, exist_ok=True)
    return Checkpointer(run, strategy, keep=None, config_files={})


def save_whole(state: TrainedState, strategy: str, folder: Path, name: str, step: int = STEPS) -> None:
    ranks = state.accelerator.num_processes
    config = {"num_processes": ranks, "gradient_accumulation_steps": 1, "pretrained_model_name_or_path": "model"}
    run_state = {"strategy": strategy, "world_size": ranks, "family": "none", "kind": "train", "run_config": config}
    checkpointer(strategy, folder, name).save(state, {"step": step, **run_state})


def load_whole(state: TrainedState, strategy: str, path: Path) -> None:
    Checkpointer(RunDir(path.parent), strategy, keep=None, config_files={}).load(state, path)


def held(state: TrainedState, masters: list[torch.Tensor]) -> dict[str, list[bytes]]:
    """What lies on this rank of masters, of their average, and of DeepSpeed's copies that it computes with.

    Args:
        masters: asked for when nothing was gathered; the end of a failed pass leaves FSDP's in their place.
    """
    assert state.average is not None
    computed = trained_parameters(state).values() if is_partitioned(state) else []
    every = {
        "masters": masters,
        "average": state.average.shadow,
        "computed": [getattr(each, "ds_tensor", each) for each in computed],
    }
    return {
        what: [each.detach().contiguous().view(torch.uint8).numpy().tobytes() for each in found]
        for what, found in every.items()
    }


def left_by(state: TrainedState, error: BaseException) -> list[str]:
    """What has changed by a look at the average that ends with an error."""

    def fail(*_: Any) -> None:
        raise error

    masters = master_weights(state)
    before = held(state, masters)
    try:
        with evaluating(state, "ema") as transformer:
            predict(transformer, torch.bfloat16)
            if isinstance(error, Stopped):  # which comes between two passes
                fail()
            hook = transformer.transformer_blocks[-1].ff.register_forward_pre_hook(fail)
            predict(transformer, torch.bfloat16)
    except type(error) as caught:
        assert caught is error
    if not isinstance(error, Stopped):
        hook.remove()
    return [what for what, found in held(state, masters).items() if found != before[what]]


def looked_at(state: TrainedState, file: Path) -> bool:
    """Write the predictions by the weights and by their average; whether all is as it was afterwards."""
    masters, predictions = master_weights(state), dict[str, torch.Tensor]()
    before = held(state, masters)
    for weights in weights_of(state):
        with evaluating(state, weights) as transformer:
            predictions[weights] = predict(transformer, torch.bfloat16).float()
    if state.accelerator.is_main_process:
        save_file(predictions, file)
    return held(state, master_weights(state)) == before


def whole_models(folder: Path) -> None:
    for before, strategy in pairwise(["single", *WHOLE, WHOLE[0]]):
        state = start_whole(strategy, folder)
        load_whole(state, strategy, folder / "whole" / before / f"trained/checkpoint-{STEPS}")
        save_whole(state, strategy, folder, f"restored-{before}")
        if before == WHOLE[-1]:
            break
        state = start_whole(strategy, folder)
        noted = dict[str, torch.Tensor]()
        learn(state, 0, STEPS, noted)
        if state.accelerator.is_main_process:
            save_file(noted, folder / "whole" / strategy / "noted.safetensors")
        save_whole(state, strategy, folder, "trained")
        told: dict[str, Any] = {"unchanged": looked_at(state, folder / "whole" / strategy / "looks.safetensors")}
        told["stopped"] = left_by(state, Stopped(PREEMPTED))
        learn(state, STEPS, STEPS + 1)
        save_whole(state, strategy, folder, "continued", STEPS + 1)
        assert state.average is not None
        for what, tensors in (("masters", master_weights(state)), ("average", state.average.shadow)):
            told[what] = [each.untyped_storage().nbytes() for each in tensors]
        told["failed"] = left_by(state, ValueError())
        state = start_whole(strategy, folder)
        load_whole(state, strategy, folder / "whole" / strategy / f"trained/checkpoint-{STEPS}")
        learn(state, STEPS, STEPS + 1)
        save_whole(state, strategy, folder, "resumed", STEPS + 1)
        (folder / "whole" / strategy / f"told-{os.environ['RANK']}.json").write_text(json.dumps(told))


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    whole_models(folder)
    adapters(folder)
    return 0


if __name__ == "__main__":
    end_with(lambda: main(Path(sys.argv[1])))
