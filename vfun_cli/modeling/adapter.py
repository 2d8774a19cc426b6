"""The interface of a model family: what its encoders read, what the transformer is given, what it predicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vfun_cli.modeling.encoders.frozen import Encoders, Output
from vfun_cli.modeling.inputs import ClipInput, LazyInput
from vfun_cli.modeling.randomness import SampleKey


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """The part of the configuration that a family may depend on."""

    model_dir: Path
    compute_dtype: torch.dtype
    """dtype of the frozen encoders and of their outputs."""
    device: torch.device
    vae_mini_batch: int = 1
    low_vram: bool = False
    train_mode: str | None = None
    """None: the family's first mode."""
    control_ref_image: str = "first_frame"
    model_settings: Mapping[str, Any] = field(default_factory=dict)
    """Values of the transformer's ``config.json`` under the keys that the family's SPEC names (``input_settings``)."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One clip of the plan, as the loader workers get it."""

    key: SampleKey
    record: Mapping[str, Any]
    """The metadata record, media paths made absolute."""
    kind: str
    """``video`` or ``image``."""
    frames: int
    height: int
    width: int
    stride: int
    """Source frames per clip frame."""
    total_frames: int
    fps: tuple[int, int]
    """Source frame rate as (numerator, denominator)."""

    @property
    def caption(self) -> str:
        """The row's text; a row without one has an empty caption."""
        return str(self.record.get("text", ""))


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """A video to be made: what to show, how long, from which noise. Pixels are of its size already."""

    key: SampleKey
    """Whose noise it starts from."""
    prompt: str
    negative_prompt: str
    """What the unconditional branch of guidance reads."""
    frames: int
    """Of a family that makes a video segment by segment: of one segment."""
    height: int
    width: int
    fps: Fraction
    image: ClipInput | None = None
    """One frame [1, 3, H, W]: the first of the video, or whom it shows."""
    end_image: ClipInput | None = None
    """The last frame, of a family that can be given it."""
    reference: ClipInput | None = None
    """Whom the video shows, where a family has such a picture beside ``image``."""
    control: ClipInput | None = None
    """The clip [F, 3, H, W] that it follows."""
    audio: LazyInput | None = None
    """Mono samples at 16 kHz, the whole sound."""
    seconds: Fraction = Fraction(0)
    """Of ``audio``."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of a sample and the encoder that reads it."""

    encoder: str | None
    """Which of the adapter's encoders reads it; None: it goes as it is into ``assemble``, as ``value``."""
    lazy: LazyInput


Inputs = dict[str, Input]
"""Everything that one sample needs, by the family's names."""

Conditions = dict[str, Any]
"""What ``predict`` needs besides latents and timesteps; tensors are batched along dim 0."""


@dataclass(frozen=True, kw_only=True)
class Branches:
    """What the two branches of classifier-free guidance are given, of a batch of one. Only text and sound differ."""

    conditional: Conditions
    unconditional: Conditions


class ModelAdapter(Protocol):
    """One model family for the trainer: loads the released files, prepares conditions, predicts.

    ``transformer`` is the only module that is trained, wrapped and saved. Encoders stay inside the adapter,
    frozen, in eval mode and without gradients.
    """

    transformer: nn.Module
    encoders: Encoders

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> "ModelAdapter":
        """Load the transformer from the released directory layout, offline. Unknown or missing keys are errors.

        The encoders are loaded when they are first used, or by ``encoders.load()``.
        The transformer comes back in float32 on the CPU; the trainer casts and moves it.
        """
        ...

    @classmethod
    def encoders_of(cls, options: AdapterOptions) -> Encoders:
        """The encoders of the released directory alone, none of them loaded yet."""
        ...

    @staticmethod
    def inputs(request: SampleRequest, options: AdapterOptions) -> Inputs:
        """What the encoders must read for this clip; nothing is decoded. A pure function of the request.

        Draws that decide it (start, reference frame, mask) are made with ``request.key.content``.
        """
        ...

    def assemble(self, outputs: Sequence[Mapping[str, Output]], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
        """Latents [B, C, F, H, W] float32 and conditions of one micro-batch, from the encoders' outputs; no gradients.

        Everything that is random at each step happens here: drops, sampling of posteriors. ``outputs`` has an entry for
        every input of each sample.
        """
        ...

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's prediction, [B, C, F, H, W] like ``noisy``. ``timesteps`` is [B], 0..1000."""
        ...
