"""A family's frozen encoders by name: loaded when first used, run without gradients, identified by their files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vfun_cli.modeling.encoders.placement import encoding_on
from vfun_cli.modeling.encoders.sharding import EncoderSharding

Output = dict[str, Tensor]
"""What an encoder makes of one input, by the encoder's names; those of a VAE are ``mean`` and ``std``."""


class Encoder(Protocol):
    """A frozen module."""

    def outputs(self, inputs: Sequence[Any]) -> list[Output]:
        """One output for each input, made as if it were alone: what a cache holds must not depend on neighbours.

        Of a batch, a device rounds otherwise than of its parts, in bf16 by far more than losses may differ.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EncoderSource:
    """Where an encoder comes from."""

    load: Callable[[], Any]
    """Makes the encoder on the CPU. Raises CheckpointError if its files are missing or do not fit."""
    files: tuple[Path, ...]
    """Files and folders that its outputs depend on."""
    settings: str
    """What else they depend on, such as its dtype."""
    dummy_input: Any = None
    """For a large encoder, which ranks may share: what a rank with fewer inputs than the others encodes too."""


class Encoders(Mapping[str, Any]):
    """The encoders of one model, by name."""

    def __init__(self, sources: Mapping[str, EncoderSource], device: torch.device, *, low_vram: bool = False) -> None:
        self.sources = dict(sources)
        self.device = device
        self.low_vram = low_vram
        self.loaded: dict[str, Any] = {}
        self.sharding: EncoderSharding | None = None

    def __getitem__(self, name: str) -> Any:
        """The encoder itself, loaded now if it was not.

        It leaves the host at once, so that a rank never holds two there (Wan's text encoder alone is 11.4 GB).
        """
        if name not in self.loaded:
            encoder = self.sources[name].load()
            sharding = self._sharding_of(name)
            if sharding is not None:
                sharding.shard(encoder)
            elif not self.low_vram:
                encoder.to(self.device)
            self.loaded[name] = encoder
        return self.loaded[name]

    def __iter__(self) -> Any:
        """All names."""
        return iter(self.sources)

    def __len__(self) -> int:
        """How many there are, loaded or not."""
        return len(self.sources)

    def shard_over(self, sharding: EncoderSharding) -> None:
        """Shard the large encoders over the ranks; before any is loaded. From now on the ranks run them together."""
        self.sharding = sharding

    @property
    def shared(self) -> list[str]:
        """The encoders that all ranks run at once, with or without inputs of their own."""
        return [name for name in self.sources if self._sharding_of(name) is not None]

    def _sharding_of(self, name: str) -> EncoderSharding | None:
        """How the ranks share this encoder; None if each has its own."""
        return None if self.sources[name].dummy_input is None else self.sharding

    def load(self) -> None:
        """Load all that are not loaded yet.

        Raises:
            CheckpointError: a part is missing or does not fit.
        """
        for name in self.sources:
            self[name]

    @contextmanager
    def for_now(self) -> Iterator[None]:
        """What is loaded in the block goes after it: a run that reads a cache has no room for encoders."""
        before = set(self.loaded)
        try:
            yield
        finally:
            self.loaded = {name: encoder for name, encoder in self.loaded.items() if name in before}

    def unload(self) -> None:
        """Let go of all; one that is used again is loaded again."""
        self.loaded.clear()

    def run(self, name: str, inputs: Sequence[Any], shared_calls: int = 0) -> list[Output]:
        """What the encoder makes of the inputs, on its device.

        A shared encoder runs ``shared_calls`` times on every rank, as often as the rank with most inputs needs, and
        stays on the device, where it takes a part of its size.
        """
        num_dummies = max(0, shared_calls - len(inputs))
        if not inputs and not num_dummies:
            return []
        read = [*inputs, *[self.sources[name].dummy_input] * num_dummies]
        with self._on_device(name) as module:
            found: list[Output] = module.outputs(read)
        return found[: len(inputs)]

    def decode(self, name: str, latents: Tensor) -> Tensor:
        """What :meth:`ClipVAE.decode` of the VAE ``name`` makes of the latents, on its device."""
        with self._on_device(name) as module:
            pixels: Tensor = module.decode(latents)
        return pixels

    @contextmanager
    def _on_device(self, name: str) -> Iterator[Any]:
        """The encoder, on its device at least until it is done."""
        module = self[name]
        with encoding_on(module, self.device, low_vram=self.low_vram and self._sharding_of(name) is None):
            yield module
