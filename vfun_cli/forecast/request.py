"""What a measurement is asked for, and what it answers: plain values that go from process to process."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from vfun_cli.config.options import CONDITIONING, LORA, MEMORY, OPTIMISATION, RunConfig, options

PANELS = (CONDITIONING, OPTIMISATION, MEMORY, LORA)
"""Of the options that a step's memory may depend on; with them, those of ``OTHERS``."""
OTHERS = ("strategy",)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The micro-batch of a bucket."""

    frames: int
    height: int
    width: int
    """In pixels."""
    clips: int = 1

    def __str__(self) -> str:
        clips = f"{self.clips} x " if self.clips > 1 else ""
        return f"{clips}{self.frames} frames of {self.width}x{self.height}"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A step of one micro-batch."""

    family: str
    lora: bool
    stated: Mapping[str, Any]
    """The transformer's ``config.json``."""
    model_dir: str | None
    """Where the encoders' files are; None: those of the released model count."""
    config: Mapping[str, Any]
    """Of the options, by name, those that matter."""
    ranks: int
    batch: Batch
    samples: bool
    """Whether videos of the batch's size are made, too."""

    @classmethod
    def of(
        cls, family: str, config: RunConfig, stated: Mapping[str, Any], ranks: int, batch: Batch, *, lora: bool
    ) -> Self:
        """About a run of these options."""
        folder = config.pretrained_model_name_or_path
        model_dir = str(folder.absolute()) if folder is not None and folder.is_dir() else None
        told = config.to_json()
        asked = {name: told[name] for name, (_, _, opt) in options().items() if opt.panel in PANELS or name in OTHERS}
        return cls(
            family=family, lora=lora, stated=stated, model_dir=model_dir, config=asked, ranks=ranks, batch=batch,
            samples=config.validates and config.validation_samples,
        )  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls(**{**values, "batch": Batch(**values["batch"])})

    def to_json(self) -> dict[str, Any]:
        """For the other process."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes of one rank, rank 0's."""

    weights: int
    """What the model has: float32 masters of what trains but under DeepSpeed, the compute type else."""
    masters: int
    """DeepSpeed's float32 masters."""
    gradients: int
    moments: int
    average: int
    step: int
    """What the optimizer's step makes and lets go."""
    saved: int
    """What a forward pass keeps for the backward pass."""
    forward: int
    """The most in the forward pass, with what it keeps."""
    backward: int
    """The most in the backward pass, with what is kept; gradients are not counted."""
    last: int
    """The same where the backward pass reaches the first layers."""
    offloaded: int
    """What of ``saved`` waits on the host, beside it (``--activation-offload``)."""
    streamed: int
    """Weights that wait on the host (``--stream-blocks``); those that are there count among ``weights``."""
    predict: int
    """The most in a pass without gradients, where videos are made; otherwise 0."""
    decode: int
    """The most that the VAE holds while it decodes a video of the batch's size, beside its weights; otherwise 0."""
    encode: int
    """The most that the VAE holds while it encodes the micro-batch, beside its weights."""
    parameters: int
    """Numbers: of the whole transformer."""
    trained: int
    """Numbers: of what trains."""
    largest_block: int
    """Numbers: of a transformer block."""
    trained_in_block: int
    outside: int
    """Numbers: of what lies outside of blocks."""
    trained_outside: int
    encoders: Mapping[str, int]
    """Numbers of each encoder, by its name."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From the other process."""
        numbers = {each.name: int(values[each.name]) for each in fields(cls) if each.name != "encoders"}
        return cls(**numbers, encoders={name: int(count) for name, count in values["encoders"].items()})
