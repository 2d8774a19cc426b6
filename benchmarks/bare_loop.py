"""The trainer's step against a bare loop over the same modules: forward, loss, backward, AdamW and nothing else.

Run from the repository root: ``python benchmarks/bare_loop.py``. The aim: at most 1.03. One process, CPU, float32, no
encoders (as with a warm cache), the same shape every step. Every repeat is one bare step and one of the trainer's, in
turn, so that what else the machine does falls on both. What the trainer does beside: noise by the sample's key,
gradient clipping, the learning rate, agreement, the meter, metrics.jsonl and TensorBoard.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from accelerate import Accelerator
from record import parser, write_result
from torch import Tensor, nn

from vfun_cli.config.options import RunConfig
from vfun_cli.encoding.encode import Sample
from vfun_cli.families.cogvideox_fun import SPEC
from vfun_cli.families.cogvideox_fun.transformer import build_transformer
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.modeling.adapter import SampleRequest
from vfun_cli.modeling.encoders.frozen import Encoders, Output
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.plan.flops import Costs
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.data.loader import LoadedBatch, MicroBatch
from vfun_cli.training.meter import trained_share
from vfun_cli.training.metrics import Metrics
from vfun_cli.training.objectives import FlowMatching
from vfun_cli.training.optim import make_optimizer, trainable
from vfun_cli.training.state.live import TrainedState
from vfun_cli.training.trainer import Trainer
from vfun_cli.training.validation import Validation

REPEATS, WARM_UP = 24, 3
SHAPE: dict[str, Any] = {"frames": 9, "height": 128, "width": 128}
MODEL = {
    "num_attention_heads": 8, "attention_head_dim": 64, "in_channels": 16, "num_layers": 4, "text_embed_dim": 512,
    "sample_width": 16, "sample_height": 16, "use_rotary_positional_embeddings": True,
}  # fmt: skip
CPU = torch.device("cpu")


class Encoded:
    """An adapter of a transformer without encoders, and the one clip that it knows, as a warm cache has it."""

    def __init__(self) -> None:
        latent = SPEC.plan.latent_shape(SimpleNamespace(**SHAPE))
        torch.manual_seed(1)
        self.latents, self.text = torch.randn(1, 16, *latent), torch.randn(1, 226, MODEL["text_embed_dim"])
        self.encoders = Encoders({}, CPU)

    def batch(self, step: int) -> LoadedBatch:
        """The clip as the only sample of a step."""
        request = SampleRequest(
            key=SampleKey(seed=1, epoch=0, row=step), record={}, kind="video", stride=1, total_frames=40, fps=(16, 1),
            **SHAPE,
        )  # fmt: skip
        found = {"clip": {"value": self.latents[0]}, "text": {"value": self.text[0]}}
        return LoadedBatch(
            batch=MicroBatch(epoch=0, step=step, index=0, requests=(request,)),
            samples=[Sample(inputs={}, values={}, found=found)],
        )

    def assemble(self, outputs: Sequence[Mapping[str, Output]], keys: Sequence[SampleKey]) -> Any:
        clip, text = (torch.stack([output[name]["value"] for output in outputs]) for name in ("clip", "text"))
        return clip, {"text": text}

    def predict(self, model: Any, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        return model(noisy.transpose(1, 2), conditions["text"], timesteps).transpose(1, 2)


def make_model(settings: dict[str, Any] = MODEL) -> Any:
    torch.manual_seed(0)
    return build_transformer(settings).train()


def make_config() -> RunConfig:
    return RunConfig(mixed_precision="no", lr_scheduler="constant", checkpointing_steps=10**6)


def bare_step(encoded: Encoded, config: RunConfig, model: nn.Module) -> Any:
    """A closure that trains the model by one step."""
    optimizer = make_optimizer(trainable(model), config, CPU)
    noise, timesteps = torch.randn_like(encoded.latents), torch.tensor([500.0])

    def step() -> None:
        noisy = 0.5 * encoded.latents + 0.5 * noise
        prediction = encoded.predict(model, noisy, timesteps, {"text": encoded.text})
        (prediction - (noise - encoded.latents)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_trainer(
    folder: Path, adapter: Any, model: nn.Module, config: RunConfig, spec: FamilySpec, dims: ModelDims, total_steps: int
) -> Trainer:
    """The product's trainer in one process, with all that it does for a step but saving."""
    accelerator: Any = Accelerator(cpu=True)
    costs = Costs(spec=spec, dims=dims, share=trained_share(model))
    prepared, optimizer = accelerator.prepare(model, make_optimizer(trainable(model), config, CPU))
    idle: Any = SimpleNamespace(
        step=lambda batches: None, close=lambda: None, require_space=lambda state: None,
        raise_background_error=lambda: None, wait=lambda: None, save=lambda *given, **named: folder, reason=lambda: 0,
    )  # fmt: skip
    return Trainer(
        config=config, accelerator=accelerator, adapter=adapter, objective=FlowMatching(shift=5.0), checkpointer=idle,
        state=TrainedState(accelerator=accelerator, model=prepared, optimizer=optimizer), ledger=idle, cache=None,
        stop=idle, total_steps=total_steps, description={}, validation=Validation(iter(()), ()),
        metrics=Metrics(
            RunDir(folder), config, costs=costs, peak_flops=None, device=CPU, writes=True, first_step=0,
            total_steps=total_steps,
        ),
    )  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    given = parser("bare_loop", __doc__).parse_args()
    repeats, warm_up = (2, 1) if given.smoke else (REPEATS, WARM_UP)
    settings = MODEL | {"num_layers": 1} if given.smoke else MODEL
    torch.set_num_threads(1)
    config = make_config()
    encoded = Encoded()
    bare = bare_step(encoded, config, make_model(settings))
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    times: dict[str, dict[str, list[float]]] = {kind: {"bare": [], "trainer": []} for kind in clocks}

    def note(name: str, began: dict[str, float]) -> None:
        for kind, clock in clocks.items():
            times[kind][name].append(clock() - began[kind])

    def now() -> dict[str, float]:
        return {kind: clock() for kind, clock in clocks.items()}

    def batches() -> Iterator[LoadedBatch]:
        """Between two requests lies all that the trainer does for a step."""
        for number in range(repeats + warm_up):
            began = now()
            bare()
            note("bare", began)
            loaded, began = encoded.batch(number), now()
            yield loaded
            note("trainer", began)
        yield loaded

    with TemporaryDirectory() as folder:
        steps = repeats + warm_up + 1  # the last one tells that the one before is over
        trainer = make_trainer(
            Path(folder), encoded, make_model(settings), config, SPEC, SPEC.model.read_dims(settings), steps
        )
        source = batches()
        trainer.train(source, 0)
        next(source, None)
        trainer.metrics.close()
    found: dict[str, Any] = {"repeats": repeats, "model": settings, "shape": SHAPE, "threads": 1}
    for kind, columns in times.items():
        taken = {name: np.array(column[warm_up:]) for name, column in columns.items()}
        pairs = taken["trainer"] / taken["bare"]
        found[kind] = {
            "bare_median_seconds": round(float(np.median(taken["bare"])), 4),
            "trainer_median_seconds": round(float(np.median(taken["trainer"])), 4),
            "ratio_of_medians": round(float(np.median(taken["trainer"]) / np.median(taken["bare"])), 4),
            "ratio_of_minima": round(float(taken["trainer"].min() / taken["bare"].min()), 4),
            "median_of_ratios": round(float(np.median(pairs)), 4),
        }
        print(kind, found[kind])
    write_result(given, found)


if __name__ == "__main__":
    main()
