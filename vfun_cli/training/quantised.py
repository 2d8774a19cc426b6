"""Frozen linear layers kept in 8 or 4 bits and multiplied in the compute dtype, so that a 14B base fits a small card.

fp8: e4m3 with one scale a row. nf4: the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), one scale
for 64 weights. The weight is dequantised when it is used, forward and backward, and never kept so.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfun_cli.modeling.lazy_weights import NOT_LAZY, LazyWeights
from vfun_cli.training.frozen import FrozenLinear, replace_linears

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution scaled to [-1, 1], with an exact zero (the paper's appendix E)."""

NF4_BLOCK = 64
"""Weights that share a scale."""

FP8_LARGEST = 448.0
"""Largest e4m3 number."""


class QuantisedLinear(FrozenLinear):
    """A frozen linear layer: ``codes`` are bytes, ``scales`` float32; parameters, so that they move and count.

    Args:
        levels: what the codes stand for, where they are numbers of a table. One made where it is used would be a copy
            to the device that the host waits for, in each layer's every pass.
    """

    kept = ("codes", "scales")
    levels: Tensor | None

    def __init__(self, linear: nn.Linear, precision: str, levels: Tensor | None) -> None:
        super().__init__(linear)
        self.precision = precision
        self.register_buffer("levels", levels, persistent=False)
        codes, scales = _QUANTISE[precision](linear.weight.detach().float(), levels)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out, in], dequantised."""
        codes, scales = self.parts()
        shape = (self.out_features, self.in_features)
        dequantised: Tensor = _DEQUANTISE[self.precision](codes, scales, self.levels, shape)
        return dequantised.to(dtype)


def quantise_layers(transformer: nn.Module, precision: str, device: torch.device, lazy: LazyWeights = NOT_LAZY) -> int:
    """Replace the frozen linear layers of all stacks, each read and quantised on ``device`` before the next; how many.

    A stack is a list of modules of one class: the blocks, HunyuanVideo's text refiner, and what Wan-S2V injects audio
    by, which is 1.89 B of the 2.24 B weights outside of its blocks: 3.8 GB in bf16. What is there once (embeddings, the
    output layer) is small and stays as it is: 0.26 B weights of Wan-S2V's linear layers, all that its modulation and
    conditions pass through.
    """
    make = quantiser(precision, device, lazy)
    return sum(replace_linears(stack, make) for stack in list(_stacks(transformer)))


def quantiser(precision: str, device: torch.device, lazy: LazyWeights) -> Callable[[nn.Linear], QuantisedLinear]:
    """What makes a quantised layer on ``device`` of one whose weights may still be in their file."""
    levels = levels_of(precision, device)

    def make(linear: nn.Linear) -> QuantisedLinear:
        with lazy.materialized(linear, device):
            return QuantisedLinear(linear, precision, levels)

    return make


def levels_of(precision: str, device: torch.device) -> Tensor | None:
    """The table that the codes of a precision are numbers of, one for all layers; None where they are values."""
    return torch.tensor(NF4_LEVELS, device=device) if precision == "nf4" else None


def _stacks(transformer: nn.Module) -> Iterator[nn.ModuleList]:
    for module in transformer.modules():
        if isinstance(module, nn.ModuleList) and len({type(member) for member in module}) == 1:
            yield module


def _to_fp8(weight: Tensor, levels: None) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / FP8_LARGEST
    return (weight / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales


def _from_fp8(codes: Tensor, scales: Tensor, levels: None, shape: tuple[int, int]) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float() * scales


def _to_nf4(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(blocks / scales, middles, out_int32=True).to(torch.uint8).flatten()
    return nearest[0::2] << 4 | nearest[1::2], scales


def _from_nf4(codes: Tensor, scales: Tensor, levels: Tensor, shape: tuple[int, int]) -> Tensor:
    nearest = torch.stack((codes >> 4, codes & 15), dim=1).flatten().int()
    dequantised = levels[nearest].view(-1, NF4_BLOCK) * scales
    return dequantised.flatten()[: shape[0] * shape[1]].view(shape)


_QUANTISE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"fp8": _to_fp8, "nf4": _to_nf4}
_DEQUANTISE: dict[str, Callable[..., Tensor]] = {"fp8": _from_fp8, "nf4": _from_nf4}
