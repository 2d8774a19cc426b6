"""A rank of a run of ``made_up.py``: ``vfun_cli.training`` with drawn media, whose steps must not wait."""

import sys
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vfun_cli.modeling import inputs
from vfun_cli.training import __main__ as training
from vfun_cli.training.ending import end_with
from vfun_cli.training.trainer import PendingStep, Trainer

enqueue = Trainer.enqueue


def main(argv: list[str]) -> int:
    """Run the rank; see ``vfun_cli.training``."""
    vars(inputs).update(read_frames=frames, read_audio=sound)
    Trainer.enqueue = without_waits  # type: ignore
    return training.main(argv)


def frames(path: str | Path, indices: Sequence[int], height: int, width: int) -> Tensor:
    """Pictures that depend on the name of the file and their places: uint8 [F, 3, height, width]."""
    drawn = [_rng(path, index).integers(256, size=(3, height, width), dtype=np.uint8) for index in indices]
    return torch.from_numpy(np.stack(drawn))


def sound(path: str | Path, start: Fraction, duration: Fraction, rate: int = 16000) -> NDArray[np.float32]:
    """Noise that depends on the name of the file: float32 [samples]."""
    samples: NDArray[np.float32] = _rng(path, 0).standard_normal(round(duration * rate), dtype=np.float32)
    return samples / np.float32(10)


def _rng(path: str | Path, place: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(Path(path).name.encode()), place])


def without_waits(trainer: Trainer, step: int, micro_batches: list[Any]) -> PendingStep:
    """``Trainer.enqueue``, in which a wait for a CUDA device raises; the first step may, for it sets libraries up."""
    if trainer.accelerator.device.type != "cuda" or step == 0:
        return enqueue(trainer, step, micro_batches)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return enqueue(trainer, step, micro_batches)
    finally:
        torch.cuda.set_sync_debug_mode(before)


if __name__ == "__main__":
    end_with(lambda: main(sys.argv[1:]))
