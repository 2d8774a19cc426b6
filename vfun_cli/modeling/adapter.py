"""The interface of a model family: what its encoders read, what the transformer is given, what it predicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from vfun_cli.checkpoints.given import Given
from vfun_cli.metadata.fields import texts_of
from vfun_cli.modeling.captions import AS_STATED, CAPTION_DROPOUT, CaptionOptions, caption_of
from vfun_cli.modeling.encoders.clip_vae import ClipVAE
from vfun_cli.modeling.encoders.frozen import Encoders, Output
from vfun_cli.modeling.inputs import AudioSegment, ClipInput, LazyInput, Value
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.shaped import Shaped


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """The part of the configuration that a family may depend on."""

    model_dir: Path
    given: Given = field(default_factory=Given)
    """Weights that were named instead of the model directory's."""
    compute_dtype: torch.dtype
    """dtype of the frozen encoders and of their outputs."""
    device: torch.device
    vae_mini_batch: int = 1
    low_vram: bool = False
    train_mode: str | None = None
    """None: the family's first mode."""
    control_ref_image: str = "first_frame"
    caption_dropout: float = CAPTION_DROPOUT
    """How often a caption is left out."""
    guidance_scale: float = 6.0
    """Embedded guidance in training, of a model that is told one."""
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
    place: str = ""
    """What its row is called where there are several data sets; empty: by its number."""
    captions: CaptionOptions = AS_STATED

    @property
    def row(self) -> str:
        """What its row is called."""
        return self.place or f"row {self.key.row}"

    @property
    def caption(self) -> str:
        """What is read of the row's texts, unless it is dropped."""
        return caption_of(texts_of(self.record), self.key.content, self.captions)


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
    guidance: float
    """Scale of classifier-free guidance; at 1 or less there is no unconditional branch."""
    image: ClipInput | None = None
    """One frame [1, 3, H, W]: the first of the video, or whom it shows."""
    end_image: ClipInput | None = None
    """The last frame, of a family that can be given it."""
    reference: ClipInput | None = None
    """Whom the video shows, where a family has such a picture beside ``image``."""
    control: ClipInput | None = None
    """The clip [F, 3, H, W] that it follows."""
    audio: AudioSegment | None = None
    """Mono samples at 16 kHz, the whole sound."""
    seconds: Fraction = Fraction(0)
    """Of ``audio``."""
    edit: ClipInput | None = None
    """The clip [F, 3, H, W] that the video is a changed one of."""
    edit_mask: LazyInput | None = None
    """Where that is made anew, bool [F, 1, H, W]; None: everywhere."""
    strength: float = 1.0
    """How much of it is replaced by noise: this share of the steps is made."""
    start_from_ref: bool = False
    """Of a family that makes segments: the first one continues ``image``, as if it had stood still."""

    @property
    def is_guided(self) -> bool:
        """Whether there are two branches."""
        return self.guidance > 1


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
    unconditional: Conditions | None
    """None without guidance."""


class Schedule(Protocol):
    """The noise levels of one segment, see ``sampling.schedules``."""

    def last(self, count: int) -> None:
        """Leave out all but the last ``count`` steps."""

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Clean latents as noisy as the first step expects them."""

    @property
    def timesteps(self) -> Tensor:
        """[N] that are left."""


class ModelAdapter(Protocol):
    """One model family for the trainer: loads the released files, prepares conditions, predicts.

    ``transformer`` is the only module that is trained, wrapped and saved. Encoders stay inside the adapter,
    frozen, in eval mode and without gradients.
    """

    transformer: nn.Module
    encoders: Encoders
    options: AdapterOptions

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> "ModelAdapter":
        """Load the transformer from the released directory layout, offline. Unknown or missing keys are errors.

        The encoders are loaded when they are first used, or by ``encoders.load()``.
        The transformer comes back in float32 on the CPU; the trainer casts and moves it.
        """
        ...

    @classmethod
    def blank(cls, config: Mapping[str, Any], options: AdapterOptions) -> Self:
        """A model as its ``config.json`` describes it, of no files: parameters on meta, no encoders.

        Raises:
            CheckpointError: no model can be made of the configuration.
        """
        ...

    def blank_conditions(self, latents: Tensor) -> Conditions:
        """Conditions without values for latents [B, C, F, H, W] float32, on their device, as ``assemble`` gives them
        of clips of which nothing is dropped.
        """
        ...

    @staticmethod
    def blank_vae(options: AdapterOptions) -> ClipVAE:
        """The released VAE of no files, its parameters on meta."""
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

    def latent_shape(self, request: Shaped) -> tuple[int, int, int, int]:
        """[C, f, h, w] of the latents of a segment."""
        ...

    @classmethod
    def inputs_to_sample(cls, request: VideoRequest, options: AdapterOptions) -> Inputs:
        """What the encoders must read to make this video; nothing is decoded."""
        ...

    def segments(self, request: VideoRequest) -> int:
        """How many times noise becomes latents until the video is whole."""
        ...

    def branches(
        self, outputs: Mapping[str, Output], request: VideoRequest, segment: int, shown: Tensor | None
    ) -> Branches:
        """The conditions of one segment, from the encoders' outputs: posteriors by their mean, nothing dropped.

        ``shown`` are the pixels [F, 3, H, W] in [-1, 1] of the segments before, None at the first.
        """
        ...

    def begin(self, noise: Tensor, branches: Branches, request: VideoRequest, schedule: Schedule) -> Tensor:
        """The latents that a segment starts from, [1, C, f, h, w] like ``noise``, and the schedule set for them."""
        ...

    def pixels(self, latents: Tensor, branches: Branches, request: VideoRequest) -> Tensor:
        """The frames of a segment, [F, 3, H, W] in [-1, 1]; fewer than were asked for where some only led to it."""
        ...

    def heard_from(self, request: VideoRequest) -> Fraction:
        """The second of the sound that is heard with the first frame."""
        ...


class WholeVideo:
    """How most families sample: a video is one segment, made of noise alone and decoded as it is."""

    encoders: Encoders

    def segments(self, request: VideoRequest) -> int:
        """See :class:`ModelAdapter`."""
        return 1

    def begin(self, noise: Tensor, branches: Branches, request: VideoRequest, schedule: Schedule) -> Tensor:
        """See :class:`ModelAdapter`."""
        return noise

    def pixels(self, latents: Tensor, branches: Branches, request: VideoRequest) -> Tensor:
        """See :class:`ModelAdapter`."""
        return self.encoders.decode("vae", latents)[0].transpose(0, 1)

    def heard_from(self, request: VideoRequest) -> Fraction:
        """See :class:`ModelAdapter`."""
        return Fraction(0)


NEGATIVE = "negative "
"""Before the name of an input that the unconditional branch reads in the place of that input."""


def captions_to_sample(request: VideoRequest, *encoders: str) -> Inputs:
    """The prompt for each of these encoders, under its name, and the negative prompt where guidance reads it."""
    inputs = {name: Input(encoder=name, lazy=Value(request.prompt)) for name in encoders}
    if request.is_guided:
        inputs |= {NEGATIVE + name: Input(encoder=name, lazy=Value(request.negative_prompt)) for name in encoders}
    return inputs


def both_branches(
    outputs: Mapping[str, Output], request: VideoRequest, conditions: Callable[[Mapping[str, Output]], Conditions]
) -> Branches:
    """What ``conditions`` makes of the outputs, and of those with what the unconditional branch reads instead."""
    replaced = {name.removeprefix(NEGATIVE): output for name, output in outputs.items() if name.startswith(NEGATIVE)}
    return Branches(
        conditional=conditions(outputs),
        unconditional=conditions({**outputs, **replaced}) if request.is_guided else None,
    )


def cast(conditions: Conditions, dtype: torch.dtype) -> Conditions:
    """Floating tensors in the dtype of the transformer's inputs: nothing casts them later."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in conditions.items()
    }
