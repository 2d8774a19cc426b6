"""Random numbers as a function of position: (seed, epoch, row, copy, purpose), never of call order.

Nothing here keeps state, so there is no generator to save in a checkpoint, and a sample gets the same noise
whatever the number of ranks (the idea of ``fold_in`` in big_vision).
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class SampleKey:
    """Identity of one draw of one clip: which seed, which epoch, which metadata row, which repetition of it."""

    seed: int
    epoch: int
    row: int
    copy: int = 0
    variants: int = 0
    """How many epochs draw what the encoders see anew before it repeats; 0: all of them."""
    drops: bool = True
    """Whether conditions are left out now and then, as in training; without, every sample has all of its own."""

    @property
    def content(self) -> "SampleKey":
        """The key of draws that decide what an encoder sees: with ``variants``, only so many of them are different."""
        return replace(self, epoch=self.epoch % self.variants, variants=0) if self.variants else self

    def entropy(self, purpose: str) -> int:
        """A 128-bit integer for this sample and purpose; purposes are independent of each other."""
        text = f"{self.seed}/{self.epoch}/{self.row}/{self.copy}/{purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")

    def numpy(self, purpose: str) -> np.random.Generator:
        """A numpy generator for small draws: sizes, starts, drops, timesteps."""
        return np.random.Generator(np.random.PCG64(self.entropy(purpose)))

    def chance(self, purpose: str, probability: float) -> bool:
        """One Bernoulli draw: whether a condition is left out. Never where nothing is."""
        return self.drops and bool(self.numpy(purpose).random() < probability)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal float32 on the CPU, so that every device sees the same numbers."""
        generator = torch.Generator().manual_seed(self.entropy(purpose) % 2**63)
        return torch.randn(shape, generator=generator)
