"""A family's frozen encoders by name: loaded when first used, run without gradients, told apart by their files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vfun_cli.training.encoders.placement import encoding_on

Output = dict[str, Tensor]
"""What an encoder makes of one input, by the encoder's names; the tensors of a VAE are ``mean`` and ``std``."""


class Encoder(Protocol):
    """A frozen module."""

    def outputs(self, inputs: Sequence[Any]) -> list[Output]:
        """One output for each input; neither depends on the others but for rounding."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an encoder comes from."""

    load: Callable[[], Any]
    """Makes the encoder on the CPU. Raises CheckpointError if its files are missing or do not fit."""
    files: tuple[Path, ...]
    """Files and folders that its outputs depend on."""
    settings: str
    """What else they depend on, such as its dtype."""


class Encoders(Mapping[str, Any]):
    """The encoders of one model, by name."""

    def __init__(self, sources: Mapping[str, Source], device: torch.device, *, low_vram: bool = False) -> None:
        self.sources = dict(sources)
        self.device = device
        self.low_vram = low_vram
        self.loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The encoder itself, loaded now if it was not."""
        if name not in self.loaded:
            self.loaded[name] = self.sources[name].load()
        return self.loaded[name]

    def __iter__(self) -> Any:
        """All names."""
        return iter(self.sources)

    def __len__(self) -> int:
        """How many there are, loaded or not."""
        return len(self.sources)

    def load(self) -> None:
        """All that are not there yet. Raises CheckpointError if a part is missing or does not fit."""
        for name in self.sources:
            self[name]

    def run(self, name: str, inputs: Sequence[Any]) -> list[Output]:
        """What the encoder makes of the inputs, on its device."""
        if not inputs:
            return []
        module = self[name]
        with encoding_on(module, self.device, low_vram=self.low_vram):
            found: list[Output] = module.outputs(inputs)
        return found
