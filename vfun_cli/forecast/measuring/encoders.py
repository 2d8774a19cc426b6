"""What a VAE holds while it encodes."""

import torch

from vfun_cli.families import adapter_of
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.measuring.gpu import made_up_gpu
from vfun_cli.forecast.measuring.tracker import Tracker
from vfun_cli.forecast.request import Batch
from vfun_cli.imports import uncollected
from vfun_cli.modeling.adapter import AdapterOptions

SHORT, LONGER = 17, 33
"""Frames. VAEs encode a few at a time, and keep of those before what grows with their number alone: what a longer clip
holds is told by clips of these lengths, in a third of the time."""


def encode_peak(spec: FamilySpec, options: AdapterOptions, batch: Batch) -> int:
    """The most bytes beside the weights of the released VAE; clips go through it ``vae_mini_batch`` at a time.

    A clip is the longest that the VAE reads for one of the bucket: with the history before it, where there is one.
    """
    vae = adapter_of(spec).blank_vae(options)
    vae.to(device=options.device, dtype=options.compute_dtype)
    clips, frames = min(batch.clips, options.vae_mini_batch), spec.plan.encoded_frames(batch.frames)

    def peak(count: int) -> int:
        with made_up_gpu() as device, uncollected(), torch.no_grad(), Tracker() as tracker:
            vae.posterior(torch.empty(clips, 3, count, batch.height, batch.width, device=device))
        return tracker.peak

    if frames <= LONGER:
        return peak(frames)
    longer = peak(LONGER)
    return longer + (longer - peak(SHORT)) * (frames - LONGER) // (LONGER - SHORT)
