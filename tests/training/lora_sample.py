"""A tiny CogVideoX-Fun transformer with adapters, and a few steps of training it without data or encoders."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.families.cogvideox_fun import SPEC, read_dims
from vfun_cli.families.cogvideox_fun.transformer import CogVideoXFunTransformer, load_transformer
from vfun_cli.modeling.adapter import ModelAdapter
from vfun_cli.modeling.lazy_weights import NOT_LAZY, LazyWeights
from vfun_cli.modeling.weights import read_json
from vfun_cli.training.lora import add_adapters
from vfun_cli.training.model import prepare_state
from vfun_cli.training.precision import compute_dtype, use_in
from vfun_cli.training.state.live import TrainedState

GOLDEN = Path(__file__).parents[1] / "golden/cogvideox_fun"
CASE = GOLDEN / "2b_native"
TARGETS = ("to_q", "to_k", "to_v", "ff.net.0.proj", "ff.net.2")


class GoldenAdapter:
    """The part of a family's adapter that a run without encoders needs."""

    def __init__(self, transformer: CogVideoXFunTransformer) -> None:
        self.transformer = transformer


def model_directory(folder: Path) -> Path:
    """The golden transformer as a released directory; returns the folder with its weights."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    (transformer / "diffusion_pytorch_model.safetensors").symlink_to((CASE / "weights.safetensors").resolve())
    (transformer / "config.json").write_bytes((CASE / "config.json").read_bytes())
    return transformer


def load_model(folder: Path) -> CogVideoXFunTransformer:
    return load_transformer(folder, read_json(folder / "config.json"))


def options(**given: Any) -> RunConfig:
    small: dict[str, Any] = {
        "rank": 4, "network_alpha": 2.0, "target_name": TARGETS, "mixed_precision": "no", "strategy": "single",
        "learning_rate": 1e-2, "adam_weight_decay": 1e-2, "gradient_checkpointing": "none",
    }  # fmt: skip
    return RunConfig(**(small | given))


def with_adapters(folder: Path, config: RunConfig) -> CogVideoXFunTransformer:
    transformer = load_model(folder)
    add_adapters(transformer, config, SPEC, read_dims(read_json(folder / "config.json")))
    return transformer


def prepared(
    transformer: CogVideoXFunTransformer, config: RunConfig, accelerator: Accelerator, lazy: LazyWeights = NOT_LAZY
) -> TrainedState:
    """As a session prepares it."""
    if STRATEGIES[config.strategy].whole_weights:
        use_in(compute_dtype(config), transformer)
    adapter: Any = GoldenAdapter(transformer)
    typed: ModelAdapter = adapter
    return prepare_state(config, SPEC, typed, accelerator, lazy)


def predict(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    tensors = load_file(CASE / "io.safetensors")
    noisy = torch.cat([tensors["noisy"], tensors["inpaint_latents"]], dim=2).to(dtype)
    prediction: Tensor = model(noisy, tensors["text"].to(dtype), tensors["timestep"])
    return prediction


def train(state: TrainedState, steps: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """A few steps towards the golden target; the losses."""
    target = load_file(CASE / "io.safetensors")["target"]
    losses = []
    for _ in range(steps):
        with state.accelerator.accumulate(state.model):
            loss = (predict(state.model, dtype).float() - target).square().mean()
            state.accelerator.backward(loss)
            state.optimizer.step()
            state.optimizer.zero_grad()
        losses.append(loss.item())
    return losses
