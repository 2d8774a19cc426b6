"""A posterior for the demo VAEs as narrow as a trained one's."""

import torch
from torch import nn

LOG_VARIANCE = -8.0
"""exp(-4): a trained VAE is about this sure of its latents. A random one adds noise as strong as the latents, which no
transformer can predict, so that even a memorised clip would keep half of its first loss."""


def lower_posterior_variance(vae: nn.Module, latent_channels: int) -> None:
    """Set the log-variance half of the posterior to ``LOG_VARIANCE`` everywhere, in place."""
    last = getattr(vae, "quant_conv", None)
    if last is None:
        last = vae.get_submodule("encoder.conv_out")
    conv = next(module for module in last.modules() if isinstance(module, nn.Conv3d))
    assert conv.bias is not None and conv.out_channels == 2 * latent_channels
    with torch.no_grad():
        conv.weight[latent_channels:] = 0
        conv.bias[latent_channels:] = LOG_VARIANCE
