"""The tiny live transformer of every family with what its encoders say about a clip."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.encoding.encode import Sample, encode, outputs_of, prepared
from vfun_cli.families import adapter_of
from vfun_cli.families.detect import read_dims
from vfun_cli.families.spec import ClipShape, FamilySpec, ModelDims
from vfun_cli.modeling.adapter import ModelAdapter, SampleRequest
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.training.model import adapter_options
from vfun_cli.training.objectives import make_objective
from vfun_cli.training.optim import choose_trainable

FAMILIES = tuple(families.FAMILIES)
SMALL, TALL, WIDE = (8, 64, 64), (16, 96, 64), (12, 64, 128)
"""Frames, height, width; one frame more where the family counts so."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the trainer hands to ``predict`` and to the loss for one clip."""

    shape: ClipShape
    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    mask: Tensor | None
    conditions: dict[str, Any]

    def to(self, where: Any) -> "Inputs":
        """Floating tensors in a dtype, or all tensors on a device."""

        def moved(value: Any) -> Any:
            cast = isinstance(value, Tensor) and (not isinstance(where, torch.dtype) or value.is_floating_point())
            return value.to(where) if cast else value

        conditions = {name: moved(value) for name, value in self.conditions.items()}
        return Inputs(
            shape=self.shape, noisy=moved(self.noisy), timesteps=moved(self.timesteps), target=self.target,
            mask=self.mask, conditions=conditions,
        )  # fmt: skip

    def repeated(self, clips: int) -> "Inputs":
        """A micro-batch of this many times the clip."""

        def many(value: Any) -> Any:
            return torch.cat([value] * clips) if isinstance(value, Tensor) else value * clips

        return Inputs(
            shape=self.shape, noisy=many(self.noisy), timesteps=many(self.timesteps), target=many(self.target),
            mask=None if self.mask is None else many(self.mask),
            conditions={name: many(value) for name, value in self.conditions.items()},
        )  # fmt: skip

    def enlarged(self, high: int, wide: int) -> "Inputs":
        """The same without values for a picture this many times as high and as wide."""
        *_, height, width = self.noisy.shape

        def larger(value: Any) -> Any:
            if isinstance(value, Tensor) and value.shape[-2:] == (height, width):
                return torch.empty(*value.shape[:-2], height * high, width * wide, device="meta")
            return value

        meta = self.to("meta")
        shape = replace(self.shape, height=self.shape.height * high, width=self.shape.width * wide)
        conditions = {name: larger(value) for name, value in meta.conditions.items()}
        return replace(meta, shape=shape, noisy=larger(meta.noisy), conditions=conditions)


class LiveModel:
    """A family's demo: its adapter and its inputs at any shape."""

    def __init__(self, family: str, folder: Path) -> None:
        self.spec: FamilySpec = families.find(family)
        demo = {
            name: folder / value if isinstance(value, Path) else value
            for name, value in demo_default.make(self.spec).items()
        }
        self.config: RunConfig = resolve("train", self.spec, {"mixed_precision": "no"}, demo=demo, environ={}).config
        assert self.config.pretrained_model_name_or_path is not None
        self.folder = self.config.pretrained_model_name_or_path
        self.adapter: ModelAdapter = adapter_of(self.spec).from_pretrained(
            adapter_options(self.config, self.spec, torch.device("cpu"))
        )
        self.dims: ModelDims = read_dims(self.spec, self.folder)
        self.objective = make_objective(self.spec.model.objective, self.spec.model.objective_options, self.folder)

    def transformer(self) -> nn.Module:
        """A fresh one with the demo's weights, all that can be trained chosen."""
        fresh = (
            adapter_of(self.spec)
            .from_pretrained(adapter_options(self.config, self.spec, torch.device("cpu")))
            .transformer
        )
        choose_trainable(fresh, (".",), self.spec.model.modules_without_gradient(self.dims))
        return fresh.train()

    @cache  # noqa: B019 (a handful of shapes of seven models)
    def inputs(self, frames: int, height: int, width: int) -> Inputs:
        """The encoded and noised clip; of the first key that does not drop what would shorten the sequence."""
        request, sample = self.cached(frames, height, width)
        latents, conditions = encode(self.adapter, [sample], [request.key])
        corrupted = self.objective.corrupt(latents, [request.key])
        return Inputs(
            shape=ClipShape(frames=request.frames, height=height, width=width), noisy=corrupted.noisy,
            timesteps=corrupted.timesteps, target=corrupted.target, mask=conditions.pop("loss_mask", None),
            conditions=conditions,
        )  # fmt: skip

    def cached(self, frames: int, height: int, width: int, *, dropped: bool = False) -> tuple[SampleRequest, Sample]:
        """A clip as a full cache has it. A dropped history shortens the sequence of Wan-S2V."""
        options = adapter_options(self.config, self.spec, torch.device("cpu"))
        requests = (self.request(row, frames, height, width) for row in range(100))
        clips = ((request, adapter_of(self.spec).inputs(request, options)) for request in requests)
        request, inputs = next(clip for clip in clips if ("history" in clip[1]) == dropped)
        (found,) = outputs_of(self.adapter.encoders, [prepared(inputs)])
        return request, Sample(inputs=inputs, values={}, found=found)

    def loss(self, transformer: nn.Module, inputs: Inputs) -> Tensor:
        """As the trainer computes it."""
        conditions = dict(inputs.conditions)
        prediction = self.adapter.predict(transformer, inputs.noisy, inputs.timesteps, conditions)
        return self.objective.loss(prediction, inputs.target, inputs.mask)

    def request(self, row: int, frames: int, height: int, width: int) -> SampleRequest:
        """A clip of the demo, as a row of its own."""
        rule = self.spec.plan.frame_rule
        frames = max(frames, rule.frames_per_latent) + rule.first_alone
        if self.spec.plan.adjust_frames is not None:
            frames = self.spec.plan.adjust_frames(frames, self.dims)
        root = Path(self.config.train_data_dir or "")
        record = {
            "file_path": str(root / "train/00000001.mp4"),
            "control_file_path": str(root / "control/00000001.mp4"),
            "audio_path": str(root / "wav/00000001.wav"),
            "text": "a red circle moves",
            "type": "video",
        }
        fields = {field.name for field in self.spec.fields} | {"text", "type"}
        return SampleRequest(
            key=SampleKey(seed=1, epoch=0, row=row),
            record={name: value for name, value in record.items() if name in fields},
            kind="video", frames=frames, height=height, width=width, stride=1, total_frames=40, fps=(16, 1),
        )  # fmt: skip
