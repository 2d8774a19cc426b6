"""What encoders weigh, and what a VAE holds while it encodes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from vfun_cli.checkpoints.safetensors import read_file
from vfun_cli.errors import CheckpointError
from vfun_cli.families import adapter_of
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.measuring.gpu import made_up_gpu
from vfun_cli.forecast.measuring.tracker import Tracker
from vfun_cli.forecast.request import Batch
from vfun_cli.imports import uncollected
from vfun_cli.modeling.adapter import AdapterOptions
from vfun_cli.modeling.encoders.clip_vae import ClipVAE
from vfun_cli.modeling.weights import load_pth

WEIGHTS = (".safetensors", ".pth", ".bin")
"""How files with weights end."""
CHANNELS = 16
"""Of the latents of all these VAEs."""
FEW_LATENTS, MORE_LATENTS = 5, 9
SHORT, LONGER = 17, 33
"""Frames. VAEs encode a few at a time, and keep of those before what grows with their number alone: what a longer clip
holds is told by clips of these lengths, in a third of the time."""


def decode_peak(spec: FamilySpec, options: AdapterOptions, batch: Batch) -> int:
    """The same of one clip of the batch's size that is decoded, as it comes from the transformer."""
    vae = _vae(spec, options)
    latents = spec.plan.latent_shape(batch)

    def peak(count: int) -> int:
        with made_up_gpu() as device, uncollected(), torch.no_grad(), Tracker() as tracker:
            vae.decode(torch.empty(1, CHANNELS, count, *latents[1:], device=device))
        return tracker.peak

    return _of_longer(peak, latents[0], FEW_LATENTS, MORE_LATENTS)


def encode_peak(spec: FamilySpec, options: AdapterOptions, batch: Batch) -> int:
    """The most bytes beside the weights of the released VAE; clips go through it ``vae_mini_batch`` at a time.

    A clip is the longest that the VAE reads for one of the bucket: with the history before it, where there is one.
    """
    vae = _vae(spec, options)
    clips, frames = min(batch.clips, options.vae_mini_batch), spec.plan.encoded_frames(batch.frames)

    def peak(count: int) -> int:
        with made_up_gpu() as device, uncollected(), torch.no_grad(), Tracker() as tracker:
            vae.posterior(torch.empty(clips, 3, count, batch.height, batch.width, device=device))
        return tracker.peak

    return _of_longer(peak, frames, SHORT, LONGER)


def _of_longer(peak: Callable[[int], int], count: int, short: int, longer: int) -> int:
    """Of so many frames, as those of two fewer numbers tell it."""
    if count <= longer:
        return peak(count)
    more = peak(longer)
    return more + (more - peak(short)) * (count - longer) // (longer - short)


def _vae(spec: FamilySpec, options: AdapterOptions) -> ClipVAE:
    vae = adapter_of(spec).blank_vae(options)
    vae.to(device=options.device, dtype=options.compute_dtype)
    return vae


def encoder_weights(spec: FamilySpec, options: AdapterOptions, model_dir: str | None) -> dict[str, int]:
    """How many numbers each encoder has: in its files or, where these are not whole, as released."""
    released = {name: int(each.weights * 1e9) for name, each in spec.model.encoders.items()}
    if model_dir is None:
        return released
    try:
        encoders = adapter_of(spec).encoders_of(replace(options, model_dir=Path(model_dir)))
        return {name: sum(map(_numbers, source.files)) for name, source in encoders.sources.items()}
    except (CheckpointError, OSError):  # whoever loads them says what is missing
        return released


def _numbers(path: Path) -> int:
    """Of a file, or of the files of a folder: of the first kind that is there, as each may hold all."""
    if path.is_dir():
        kinds = ([file for file in sorted(path.iterdir()) if file.suffix == suffix] for suffix in WEIGHTS)
        return sum(map(_numbers, next((files for files in kinds if files), [])))
    if path.suffix == ".safetensors":
        return sum(math.prod(tensor.shape) for tensor in read_file(path).values())
    if path.suffix in WEIGHTS:
        return sum(tensor.numel() for tensor in load_pth(path).values())
    return 0
