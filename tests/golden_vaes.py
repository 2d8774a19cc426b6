"""The golden VAEs, as the loaders of released files make them."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from vfun_cli.modeling.encoders.clip_vae import ClipVAE
from vfun_cli.modeling.encoders.cogvideox_vae import CogVideoXVAE
from vfun_cli.modeling.encoders.hunyuan_vae import HunyuanVAE
from vfun_cli.modeling.encoders.magvit_vae import MagvitVAE
from vfun_cli.modeling.encoders.wan_vae import WanVAE, load_wan_vae

GOLDEN = Path(__file__).parent / "golden"
EASYANIMATE = "easyanimate_v5.1_control/vae"
WAN = "sampling/wan_vae"
KINDS = {"cogvideox_fun/vae": CogVideoXVAE, EASYANIMATE: MagvitVAE, "hunyuanvideo/vae": HunyuanVAE}
SAME = {"easyanimate_v5_control/vae": EASYANIMATE}
"""To the byte."""
VAES = (*KINDS, WAN)


@cache
def golden_vae(name: str) -> ClipVAE:
    """The VAE in float32."""
    name = SAME.get(name, name)
    if name == WAN:
        return WanVAE(load_wan_vae(load_file(GOLDEN / WAN / "weights.safetensors"), dtype=torch.float32, where=WAN))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copy(GOLDEN / name / "config.json", folder)
        shutil.copy(GOLDEN / name / "weights.safetensors", folder / "diffusion_pytorch_model.safetensors")
        return KINDS[name].from_folder(folder, dtype=torch.float32)
