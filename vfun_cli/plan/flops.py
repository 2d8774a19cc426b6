"""Tokens and FLOPs of training, and what devices can do of them."""

from dataclasses import dataclass, field

from vfun_cli.families.spec import ClipShape, FamilySpec, ModelDims

PEAKS: dict[str, float] = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 matrix products with float32 accumulation, FLOP/s, from NVIDIA's data sheets, by a part of the device's
name; of several that fit, the longest counts."""

SLOWER = ("Laptop", "MIG", "D", "NVL", "CNX")
"""Words that name a slower device or a slice of one, unless the part of the name in the table has them too."""


def peak_of(name: str) -> float | None:
    """The peak of a device with this name, None if the table has none or only a part of the device is there."""
    words = f" {name.replace('-', ' ')} "
    part = max((part for part in PEAKS if f" {part} " in words), key=len, default=None)
    if part is None or any(f" {slower} " in words and slower not in part.split() for slower in SLOWER):
        return None
    return PEAKS[part]


@dataclass(frozen=True, kw_only=True)
class TrainedShare:
    """Which part of a transformer's weights is trained: it decides what the backward pass multiplies."""

    base: int
    """Weights of the model itself."""
    added: int
    """Weights of adapters."""
    trained: int
    """Weights that get a gradient, of either kind."""


@dataclass(frozen=True, kw_only=True)
class ClipCost:
    """What one clip costs."""

    tokens: int
    flops: float
    """Forward and backward, what checkpointing computes a second time left out: model FLOPs."""


@dataclass(kw_only=True)
class Costs:
    """Tokens and training FLOPs of clips, each shape computed once.

    Of the forward pass's FLOPs, A multiply activations with each other (attention) and W activations with weights.
    The backward pass takes 2 A, W for the gradient of the activations, and W times the trained share of the weights for
    theirs: 3 (A + W) when everything trains, 2 W + 3 A and the adapters' own when a LoRA does. Adapters are counted by
    their size. That the gradient of the model's very inputs is not computed is left out of account, and so is that it
    does not go below the first trained layer, which matters if only late blocks are trained. A caption's own keys and
    values are such inputs under a LoRA: 4 % too much for a clip of twice the caption's tokens, under 2 % for long ones.
    """

    spec: FamilySpec
    dims: ModelDims
    share: TrainedShare
    known: dict[tuple[int, int, int], ClipCost] = field(default_factory=dict)

    def of(self, frames: int, height: int, width: int) -> ClipCost:
        """The cost of a clip of this many pixels."""
        key = (frames, height, width)
        if key not in self.known:
            self.known[key] = self._cost(ClipShape(frames=frames, height=height, width=width))
        return self.known[key]

    def _cost(self, shape: ClipShape) -> ClipCost:
        attention = self.spec.model.attention_flops(shape, self.dims)
        weights = self.spec.model.forward_flops(shape, self.dims) - attention
        share = self.share
        passed = weights * (share.base + share.added) / share.base
        flops = 3 * attention + 2 * passed + weights * share.trained / share.base
        return ClipCost(tokens=self.spec.model.sequence_tokens(shape, self.dims), flops=flops)
