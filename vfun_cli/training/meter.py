"""FLOPs and tokens of a step, and the share of the device's peak that they come to (MFU): what they are of."""

import torch
from torch import nn

from vfun_cli.plan.flops import TrainedShare, peak_of


def peak_flops(device: torch.device, stated_tflops: float | None) -> float | None:
    """The device's peak in FLOP/s: what the user stated, else the table's; None where neither knows."""
    if stated_tflops is not None:
        return stated_tflops * 1e12
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def trained_share(transformer: nn.Module) -> TrainedShare:
    """Counted on the transformer before a strategy cuts it up, adapters (peft's ``lora_`` layers) included."""
    counts = {"base": 0, "added": 0, "trained": 0}
    for name, parameter in transformer.named_parameters():
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        counts["added" if ".lora_" in name else "base"] += size
        counts["trained"] += size * parameter.requires_grad
    return TrainedShare(**counts)
