"""The first batch of a run as files that people can look at: what the encoders see, before anything is learnt."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from vfun_cli.modeling.inputs import load_inputs
from vfun_cli.modeling.media import writing
from vfun_cli.modeling.pixels import readable
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.data.loader import LoadedBatch


def write_first_batch(run: RunDir, loaded: LoadedBatch) -> None:
    """Videos, images, sounds and captions of every sample of a micro-batch, into the run's ``sanity_check/``."""
    for number, (sample, request) in enumerate(zip(loaded.samples, loaded.batch.requests, strict=True)):
        values = load_inputs({name: each.lazy for name, each in sample.inputs.items()})
        for name, value in values.items():
            stem = run.sanity_check / f"sample-{number}-{name}"
            _write_value(stem, value, Fraction(*request.fps) / request.stride)


def _write_value(stem: Path, value: Any, fps: Fraction) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    value = readable(value)
    if isinstance(value, tuple):
        for part in value:
            _write_value(stem, part, fps)
    elif isinstance(value, str):
        stem.with_suffix(".txt").write_text(value + "\n", encoding="utf-8")
    elif isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[1] == 3:
        if value.shape[0] == 1:
            writing.write_png(stem.with_suffix(".png"), value[0])
        else:
            writing.write_video(stem.with_suffix(".mp4"), value, fps)
    elif isinstance(value, torch.Tensor) and value.ndim == 1:
        writing.write_wav(stem.with_suffix(".wav"), value.numpy(), 16000)
