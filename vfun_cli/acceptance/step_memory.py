"""``-m vfun_cli.acceptance.step_memory FAMILY DEVICE``: what a step takes of the device, and what was forecast of it.

The transformer has the released width and a few layers of each kind, on a CPU those of the demo; full and LoRA, under
each way of recomputation, one process. The clip is the largest of ``SHAPES`` whose step is forecast to fit. What the
values are does not matter, so nothing is read.

A GPU's memory is counted by torch's allocator. A CPU has none that counts: there it is the results of all operations,
which shows that the forecast knows the operations, and that this script runs.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vfun_cli import families
from vfun_cli.config.options import RunConfig, options
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.measuring.gpu import Device, made_up_cpu, made_up_gpu
from vfun_cli.forecast.measuring.layers import directions
from vfun_cli.forecast.measuring.model import blank_model, weights_of
from vfun_cli.forecast.measuring.passes import follow, run
from vfun_cli.forecast.measuring.state import kept
from vfun_cli.forecast.measuring.tracker import Tracker
from vfun_cli.forecast.request import Batch
from vfun_cli.modeling.weights import read_json
from vfun_cli.training.objectives import Corrupted
from vfun_cli.training.optim import make_optimizer, trainable
from vfun_cli.training.precision import compute_dtype

SHAPES = {"cuda": ((80, 640, 640), (48, 512, 512), (16, 384, 384), (8, 256, 256)), "cpu": ((8, 64, 64),)}
"""Frames, height, width; one frame more where the family counts so."""
BESIDE_OTHERS = 0.3
"""The share of the free memory that a row of the acceptance run takes: others run beside it."""


class Allocated(AbstractContextManager["Allocated"]):
    """Counts what torch's allocator gives away of a GPU, as ``Tracker`` counts what operations make."""

    def __enter__(self) -> "Allocated":
        self.before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *failure: object) -> None:
        pass

    @property
    def bytes(self) -> int:
        """Now."""
        return torch.cuda.memory_allocated() - self.before

    def mark(self) -> int:
        """The most since the last mark."""
        peak = torch.cuda.max_memory_allocated() - self.before
        torch.cuda.reset_peak_memory_stats()
        return peak


COUNTERS: dict[str, type[Any]] = {"cuda": Allocated, "cpu": Tracker}
MADE_UP: dict[str, Device] = {"cuda": made_up_gpu, "cpu": made_up_cpu}


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Bytes of a step's phases."""

    kept: int
    """From step to step: weights, moments, and the model's buffers."""
    forward: int
    """Beside that, the most in the forward pass."""
    backward: int
    """The most in the backward pass, gradients included."""
    step: int
    """The most while the optimizer steps."""

    @property
    def peak(self) -> int:
        """The most of all."""
        return self.kept + max(self.forward, self.backward, self.step)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step."""

    family: str
    command: str
    checkpointing: str
    batch: Batch
    forecast: Taken
    seen: Taken

    @property
    def off(self) -> float:
        """How much the forecast of the peak is off, relative to what was seen."""
        return self.forecast.peak / self.seen.peak - 1

    def __str__(self) -> str:
        seen, forecast = (f"{taken.peak / 2**30:.3g}" for taken in (self.seen, self.forecast))
        size = f"{self.batch.frames} frames of {self.batch.width}x{self.batch.height}"
        what = f"{self.family} {self.command} {self.checkpointing}, {size}"
        return f"{what}: {seen} GiB, forecast {forecast}, {100 * self.off:+.1f} %"

    def to_json(self) -> dict[str, Any]:
        """For a record."""
        numbers = {"peak_bytes": self.seen.peak, "forecast_bytes": self.forecast.peak, "off": round(self.off, 4)}
        return asdict(self) | numbers


def main(argv: list[str]) -> int:
    """Print every step and how far off the forecast of it is, and the most of that."""
    spec, device, found = families.find(argv[0]), argv[1], list[Case]()
    for case in cases(spec, device, BESIDE_OTHERS):
        print(case, flush=True)
        found += [case] if isinstance(case, Case) else []
    if found:
        print(f"at most {max(abs(case.off) for case in found):.3g} off")
    return 0


def cases(spec: FamilySpec, device: str, share: float) -> Iterator[Case | str]:
    """Each step, taken; or why it is not.

    Args:
        share: of the free memory that may be taken.
    """
    stated = (
        _few_layers(spec) if device == "cuda" else read_json(demo_default.make_model(spec) / spec.model.config_file)
    )
    for command in ("train", "lora"):
        for checkpointing in options()["gradient_checkpointing"][2].choices:
            config = _config(spec, command, checkpointing, device)
            free = share * torch.cuda.mem_get_info()[0] if device == "cuda" else float("inf")
            for frames, height, width in SHAPES[device]:
                batch = Batch(frames=frames + spec.plan.first_frame_alone, height=height, width=width)
                forecast = _forecast(spec, config, stated, batch, lora=command == "lora")
                if forecast.peak <= free:
                    break
            else:
                needs = f"it needs {forecast.peak / 2**30:.3g} GiB, {free / 2**30:.3g} may be taken"
                yield f"{spec.name} {command} {checkpointing} is left out: {needs}"
                continue
            seen = _seen(spec, config, stated, batch, lora=command == "lora")
            yield Case(
                family=spec.name, command=command, checkpointing=checkpointing, batch=batch, forecast=forecast,
                seen=seen,
            )  # fmt: skip


def _few_layers(spec: FamilySpec) -> dict[str, Any]:
    found = directions(spec, spec.model.released)
    assert found is not None, f"{spec.name} is released with few layers"
    return found.few


def _config(spec: FamilySpec, command: str, checkpointing: str, device: str) -> RunConfig:
    given = {
        "device": device,
        "strategy": "single",
        "mixed_precision": "bf16",
        "gradient_checkpointing": checkpointing,
        "pretrained_model_name_or_path": "none",
    }
    return resolve(command, spec, given, demo={}, environ={}).config


def _forecast(spec: FamilySpec, config: RunConfig, stated: dict[str, Any], batch: Batch, *, lora: bool) -> Taken:
    state = kept(config, weights_of(spec, config, stated, lora=lora), 1)
    adapter = blank_model(spec, config, stated, lora=lora)
    buffers = sum(buffer.nbytes for buffer in adapter.transformer.buffers())
    held = run(adapter, batch, compute_dtype(config), MADE_UP[config.device], gradients=True).held
    return Taken(
        kept=state.weights + state.moments + buffers,
        forward=held.forward,
        backward=held.backward,
        step=state.gradients,
    )


def _seen(spec: FamilySpec, config: RunConfig, stated: dict[str, Any], batch: Batch, *, lora: bool) -> Taken:
    """Of a second step: the first one makes the optimizer's state, and what libraries keep."""
    device, dtype, counter = torch.device(config.device), compute_dtype(config), COUNTERS[config.device]
    adapter = blank_model(spec, config, stated, lora=lora)
    latents = torch.zeros(batch.clips, *adapter.latent_shape(batch), device=device)
    corrupted = Corrupted(
        noisy=latents, timesteps=torch.ones(batch.clips, device=device), target=torch.zeros_like(latents)
    )
    conditions = {
        name: torch.ones_like(value) if isinstance(value, Tensor) else value
        for name, value in adapter.blank_conditions(latents).items()
    }
    with counter() as taken:
        transformer = adapter.transformer.to_empty(device=device)
        with torch.no_grad():
            for values in (*transformer.parameters(), *transformer.buffers()):
                values.zero_()
        optimizer = make_optimizer(trainable(transformer), config, device)
        for _ in range(2):
            held = follow(adapter, corrupted, conditions, dtype, counter, gradients=True).held
            taken.mark()
            nn.utils.clip_grad_norm_(transformer.parameters(), config.max_grad_norm)
            optimizer.step()
            stepping = taken.mark()
            optimizer.zero_grad()
        return Taken(kept=taken.bytes, forward=held.forward, backward=held.backward, step=stepping - taken.bytes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
