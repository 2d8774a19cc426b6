"""Weights with which a tiny VAE shows what it encoded: its latents are mean colours of blocks, 4 x 8 x 8 pixels each.

Residual branches and attention are silent, down-samplers take means and up-samplers repeat: red, green and blue go
through both networks in channels of their own, and what comes out is the clip in mosaic.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vfun_cli.demo.vae import lower_posterior_variance
from vfun_cli.modeling.encoders.clip_vae import ClipVAE
from vfun_cli.modeling.encoders.hunyuan_vae import HunyuanVAE
from vfun_cli.modeling.encoders.wan_vae import WanVAE

LATENT_CHANNELS = 16
COLOUR_DEVIATION = 0.2
"""Black is -1, white 1. What deviates by this much in colour deviates by 1 in scaled latents. The demo's blocks are at
0.45, their latents at 2.3, where a trained VAE's are at 1: a tiny transformer is narrower (32) than its tokens (64), so
half the noise stays, of which the mixture of 16 channels to 3 colours then leaves 0.06."""
SMALL = 1e-4
"""Of colours in front of a group norm: as its epsilon is 1e-6, it multiplies what is so small by 1000, whatever it is.
Larger ones it would bring to size 1, in a dark clip as in a bright one."""
LARGE = 1000.0
"""Of the constant beside the colours in front of an RMS norm, which has no epsilon: its size is all that the norm sees.
The activation then reads colours of about 0.004, of which it makes half."""


@dataclass(frozen=True, kw_only=True)
class _Channels:
    """How colours travel."""

    write: Tensor
    """[n, 3]: what the first n channels have of red, green and blue."""
    constant: Tensor
    """[n]: and beside them."""
    read: Tensor
    """[3, n]: the colours, of what the last norm and activation made of the channels."""


def show_blocks(vae: ClipVAE, seed: int = 0) -> None:
    """Give all that a VAE computes with new weights, in place: each latent channel is a mixture of a block's colours.

    The same seed, the same weights; torch's global generator is not read.
    """
    model: Any = vae.get_submodule("model")
    encoder, decoder = model.encoder, model.decoder
    drawn = torch.randn(LATENT_CHANNELS, 3, generator=torch.Generator().manual_seed(seed))
    mixture = functional.normalize(drawn) / COLOUR_DEVIATION
    with torch.no_grad():
        _pass_on(model, first_tap=1 if isinstance(vae, HunyuanVAE) else 0)
        deviation, mean = _raw(vae)
        scaled = deviation[:, None] * mixture
        inverse = torch.linalg.pinv(scaled.double()).float()
        for part, into, at_zero, out, offset in (
            (encoder, torch.eye(3), torch.zeros(3), scaled, mean),
            (decoder, inverse, -inverse @ mean, torch.eye(3), torch.zeros(3)),
        ):
            first, last = _convolution(part.conv_in), _convolution(part.conv_out)
            channels = _rms_channels(last.in_channels) if isinstance(vae, WanVAE) else _group_channels()
            _set(first, channels.write @ into, channels.constant + channels.write @ at_zero)
            _set(last, out @ channels.read, offset)
        lower_posterior_variance(model, LATENT_CHANNELS)


def _raw(vae: ClipVAE) -> tuple[Tensor, Tensor]:
    """Deviation and mean [z] of the networks' own latents where the scaled ones have 1 and 0."""
    if isinstance(vae, WanVAE):
        return vae.std.flatten(), vae.mean.flatten()
    scale: float = vae.scale  # type: ignore[assignment]  # of all others
    return torch.full((LATENT_CHANNELS,), 1 / scale), torch.zeros(LATENT_CHANNELS)


def _group_channels() -> _Channels:
    """Every colour and its negative, which the norm takes no mean off; silu(x) - silu(-x) = x."""
    pairs = torch.eye(3).repeat_interleave(2, dim=0) * torch.tensor([1.0, -1.0] * 3)[:, None]  # [6, 3]
    return _Channels(write=SMALL * pairs, constant=torch.zeros(6), read=1e-3 / SMALL * pairs.T)


def _rms_channels(width: int) -> _Channels:
    """The colours and one large constant."""
    read = 2 * LARGE / width**0.5 * torch.eye(3, 4)
    return _Channels(write=torch.eye(4, 3), constant=LARGE * torch.eye(4)[3], read=read)


def _convolution(module: nn.Module) -> Any:
    return getattr(module, "conv", module)


def _set(convolution: Any, weight: Tensor, bias: Tensor) -> None:
    """``weight`` [out, in] at the pixel itself and ``bias`` [out] for the first channels, nothing for the others."""
    convolution.weight.zero_()
    convolution.bias.zero_()
    convolution.weight[: len(weight), : weight.shape[1], -1, 1, 1] = weight
    convolution.bias[: len(bias)] = bias


def _pass_on(model: nn.Module, *, first_tap: int) -> None:
    """Every convolution to the identity, or the mean of what it strides over; branches beside that way to zero.

    first_tap: which of the three of a strided convolution lies on a block's first pixel.
    """
    for name, module in model.named_modules():
        last = name.removesuffix(".conv").rpartition(".")[2]
        if last in ("conv2", "proj") or name.endswith("to_out.0"):
            for parameter in module.parameters():
                parameter.zero_()
        elif name.startswith("decoder.norm_out.conv_") and isinstance(module, nn.Conv3d):  # latents steer this norm
            module.weight.zero_()
            nn.init.constant_(_bias(module), 1.0 if "conv_y" in name else 0.0)
        elif isinstance(module, nn.Conv2d | nn.Conv3d) and last not in ("conv1", "to_qkv", "conv_y", "conv_b"):
            _pass_channels_on(module, first_tap)


def _bias(convolution: nn.Conv2d | nn.Conv3d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias


def _pass_channels_on(convolution: nn.Conv2d | nn.Conv3d, first_tap: int) -> None:
    """Channel to channel; time is causal: its last tap is the frame itself."""
    width, kernel = convolution.in_channels, convolution.kernel_size
    taps = torch.ones(())
    for axis, (size, stride) in enumerate(zip(kernel, convolution.stride, strict=True)):
        is_time = len(kernel) == 3 and axis == 0
        line = torch.zeros(size)
        if stride == 2:
            start = size - 2 if is_time else first_tap
            line[start : start + 2] = 0.5
        else:
            line[size - 1 if is_time else size // 2] = 1.0
        taps = taps[..., None] * line
    # (3, 1, 1) to twice the channels: of two frames, which Wan doubles time with.
    doubles_time = convolution.out_channels == 2 * width and kernel == (3, 1, 1)
    convolution.weight.zero_()
    _bias(convolution).zero_()
    for channel in range(convolution.out_channels if doubles_time else min(width, convolution.out_channels)):
        convolution.weight[channel, channel % width] = taps
