"""The trainer's step against a bare loop over the same modules: forward, loss, backward, AdamW and nothing else.

Run from the repository root: ``python benchmarks/bare_loop.py``. The aim: at most 1.03. One process, CPU, float32, no
encoders (as with a warm cache), the same shape every step. Every repeat is one bare step and one of the trainer's, in
turn, so that what else the machine does falls on both. What the trainer does beside: noise by the sample's key,
gradient clipping, the learning rate, agreement, the meter, metrics.jsonl and TensorBoard.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from accelerate import Accelerator
from plan_sets import write_result
from torch import Tensor

from vfun_cli.config import RunConfig
from vfun_cli.families.cogvideox_fun import SPEC
from vfun_cli.families.cogvideox_fun.transformer import build_transformer
from vfun_cli.rundir import RunDir
from vfun_cli.training.adapter import SampleRequest
from vfun_cli.training.data import LoadedBatch, MicroBatch
from vfun_cli.training.meter import Costs, trained_share
from vfun_cli.training.metrics import Metrics
from vfun_cli.training.objectives import FlowMatching
from vfun_cli.training.optim import make_optimizer
from vfun_cli.training.randomness import SampleKey
from vfun_cli.training.state import TrainedState
from vfun_cli.training.trainer import Trainer

REPEATS, WARM_UP = 24, 3
SHAPE = {"frames": 9, "height": 128, "width": 128}
MODEL = {
    "num_attention_heads": 8, "attention_head_dim": 64, "in_channels": 16, "num_layers": 4, "text_embed_dim": 512,
    "sample_width": 16, "sample_height": 16, "use_rotary_positional_embeddings": True,
}  # fmt: skip
CPU = torch.device("cpu")


class Encoded:
    """Latents and a caption, as a warm cache has them."""

    def __init__(self) -> None:
        latent = SPEC.latent_shape(SimpleNamespace(**SHAPE))  # type: ignore[arg-type]
        torch.manual_seed(1)
        self.latents, self.text = torch.randn(1, 16, *latent), torch.randn(1, 226, MODEL["text_embed_dim"])

    def encode(self, samples: Any, keys: Any) -> Any:
        return self.latents, {"text": self.text}

    def predict(self, model: Any, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        return model(noisy.transpose(1, 2), conditions["text"], timesteps).transpose(1, 2)


def make_model() -> Any:
    torch.manual_seed(0)
    return build_transformer(MODEL).train()


def bare_step(encoded: Encoded, config: RunConfig) -> Any:
    """A closure that trains a model of its own by one step."""
    model = make_model()
    optimizer = make_optimizer(model, config, CPU)
    noise, timesteps = torch.randn_like(encoded.latents), torch.tensor([500.0])

    def step() -> None:
        noisy = 0.5 * encoded.latents + 0.5 * noise
        prediction = encoded.predict(model, noisy, timesteps, {"text": encoded.text})
        (prediction - (noise - encoded.latents)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batch(step: int) -> LoadedBatch:
    request = SampleRequest(
        key=SampleKey(seed=1, epoch=0, row=step), record={}, kind="video", stride=1, total_frames=40, fps=(16, 1),
        **SHAPE,
    )  # fmt: skip
    return LoadedBatch(batch=MicroBatch(epoch=0, step=step, index=0, requests=(request,)), samples=[{}])


def make_trainer(folder: Path, encoded: Encoded, config: RunConfig) -> Trainer:
    model = make_model()
    accelerator: Any = Accelerator(cpu=True)
    dims = SPEC.read_dims(MODEL)
    costs = Costs(spec=SPEC, dims=dims, share=trained_share(model))
    model, optimizer = accelerator.prepare(model, make_optimizer(model, config, CPU))
    idle: Any = SimpleNamespace(
        step=lambda batches: None, close=lambda: None, require_space=lambda state: None, check=lambda: None,
        wait=lambda: None, save=lambda *given, **named: folder, reason=lambda: 0,
    )  # fmt: skip
    adapter: Any = encoded
    return Trainer(
        config=config, accelerator=accelerator, adapter=adapter, objective=FlowMatching(shift=5.0), checkpointer=idle,
        state=TrainedState(accelerator=accelerator, model=model, optimizer=optimizer), ledger=idle, stop=idle,
        total_steps=REPEATS + WARM_UP, description={},
        metrics=Metrics(
            RunDir(folder), config, costs=costs, peak_flops=None, device=CPU, writes=True, first_step=0,
            total_steps=REPEATS + WARM_UP,
        ),
    )  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    config = RunConfig(mixed_precision="no", lr_scheduler="constant", checkpointing_steps=10**6)
    encoded = Encoded()
    bare = bare_step(encoded, config)
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    times: dict[str, dict[str, list[float]]] = {kind: {"bare": [], "trainer": []} for kind in clocks}

    def note(name: str, began: dict[str, float]) -> None:
        for kind, clock in clocks.items():
            times[kind][name].append(clock() - began[kind])

    def now() -> dict[str, float]:
        return {kind: clock() for kind, clock in clocks.items()}

    def batches() -> Iterator[LoadedBatch]:
        """Between two requests lies all that the trainer does for a step."""
        for number in range(REPEATS + WARM_UP):
            began = now()
            bare()
            note("bare", began)
            loaded, began = batch(number), now()
            yield loaded
            note("trainer", began)
        yield loaded

    with TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), encoded, config)
        trainer.total_steps += 1  # the last one tells that the one before is over
        source = batches()
        trainer.train(source, 0)
        next(source, None)
    found: dict[str, Any] = {"repeats": REPEATS, "model": MODEL, "shape": SHAPE, "threads": 1}
    for kind, columns in times.items():
        steps = {name: np.array(column[WARM_UP:]) for name, column in columns.items()}
        pairs = steps["trainer"] / steps["bare"]
        found[kind] = {
            "bare_median_seconds": round(float(np.median(steps["bare"])), 4),
            "trainer_median_seconds": round(float(np.median(steps["trainer"])), 4),
            "ratio_of_medians": round(float(np.median(steps["trainer"]) / np.median(steps["bare"])), 4),
            "ratio_of_minima": round(float(steps["trainer"].min() / steps["bare"].min()), 4),
            "median_of_ratios": round(float(np.median(pairs)), 4),
        }
        print(kind, found[kind])
    write_result("bare_loop", found)


if __name__ == "__main__":
    main()
