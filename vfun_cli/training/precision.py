"""In which type what computes. Trainable weights keep a float32 master under either, losses and noise are float32."""

import torch

from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES


def compute_dtype(config: RunConfig) -> torch.dtype:
    """What the transformer computes in, and what frozen weights are kept in."""
    return torch.bfloat16 if config.bf16 else torch.float32


def kept_dtype(config: RunConfig, *, trained: bool) -> torch.dtype:
    """What a weight of the transformer is read in. DeepSpeed makes its float32 masters itself, of what it is given."""
    masters = trained and STRATEGIES[config.strategy].wrapper != "deepspeed"
    return torch.float32 if masters else compute_dtype(config)


def encoder_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """What frozen encoders compute in.

    On a CPU they stay in float32: one with AVX2 alone takes 10 (linear) to 36 (conv3d) times as long in bf16.
    """
    return torch.float32 if device.type == "cpu" else compute_dtype(config)
