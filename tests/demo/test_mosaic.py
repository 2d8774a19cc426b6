"""What the tiny VAEs show of a clip."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vfun_cli import families
from vfun_cli.demo.default import make_model
from vfun_cli.demo.media import CLIPS, DemoClip, draw
from vfun_cli.families import adapter_of
from vfun_cli.modeling.adapter import AdapterOptions
from vfun_cli.modeling.encoders.clip_vae import ClipVAE

pytestmark = pytest.mark.slow

RECOGNISABLE = 20.0
"""dB; the mean colour of a clip is at 16 to 19, its mosaic at 21 to 24."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def vae_of(family: str, folder: Path) -> ClipVAE:
    spec = families.find(family)
    model = make_model(spec, folder)
    options = AdapterOptions(model_dir=model, compute_dtype=torch.float32, device=torch.device("cpu"))
    vae: ClipVAE = adapter_of(spec).encoders_of(options)["vae"]
    return vae


def pixels(clip: DemoClip, number: int, *, frames: int) -> Tensor:
    """[1, 3, F, H, W] in [-1, 1], a quarter as high and wide."""
    small = replace(clip, width=clip.width // 4, height=clip.height // 4)
    drawn, _ = draw(small, np.random.default_rng([0, number]))
    return (torch.from_numpy(drawn[:frames]).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


def psnr(found: Tensor, expected: Tensor) -> float:
    return float(10 * torch.log10(4 / (found - expected).square().mean()))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_a_mosaic_vae_decodes_is_what_it_encoded(family: str, folder: Path) -> None:
    vae = vae_of(family, folder)
    clips = [pixels(clip, number, frames=9) for number, clip in enumerate(CLIPS, 1)]
    latents = [vae.encode(clip) for clip in clips]
    found = [psnr(vae.decode(each), clip) for each, clip in zip(latents, clips, strict=True)]
    assert min(found) > RECOGNISABLE and len(found) == len(CLIPS), found
    deviation = float(torch.cat([each.flatten() for each in latents]).std())
    assert 1.5 < deviation < 3  # far above the posterior's 0.02
    noise = [torch.randn(each.shape, generator=torch.Generator().manual_seed(0)) for each in latents]
    sampled = [vae.decode(vae.encode(clip, each)) for clip, each in zip(clips, noise, strict=True)]
    assert min(map(psnr, sampled, clips)) > RECOGNISABLE


@pytest.mark.parametrize("family", families.FAMILIES)
def test_latents_of_a_mosaic_vae_are_the_mean_colours_of_their_block(family: str, folder: Path) -> None:
    vae = vae_of(family, folder)
    flat = torch.zeros(1, 3, 9, 32, 48) + torch.tensor([0.5, -0.25, -1.0]).view(1, 3, 1, 1, 1)
    other = flat.clone()
    other[:, :, 5:, 8:16, 16:24] = 1.0
    changed = (vae.encode(other) - vae.encode(flat)).abs().amax(dim=1)[0] > 0.1
    assert changed.nonzero().tolist() == [[2, 1, 2]]
    torch.testing.assert_close(vae.decode(vae.encode(flat)), flat, atol=0.01, rtol=0)
