"""How weights and work are spread over processes: every strategy once, with all that depends on it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to spread a run. What differs between strategies is a column here or a line of its launch file."""

    name: str
    wrapper: Literal["none", "ddp", "fsdp", "deepspeed"]
    """What accelerate wraps the transformer in."""
    zero_stage: int | None = None
    """DeepSpeed's."""
    sharded: tuple[str, ...] = ()
    """What a rank keeps only a part of: ``optimizer`` state (float32 masters included), ``gradients``, ``weights``."""
    gathers: Literal["blocks", "layers"] | None = None
    """Where weights are sharded, what of them is whole while it computes: a transformer block, or one layer."""
    checkpoint_format: Literal["plain", "dcp", "deepspeed"] = "plain"
    """In what form weights and optimizer are written; see ``training/state/formats.py``."""
    offloads: bool = False
    """Whether masters, moments, gradients and the parts of weights lie in the host's memory."""
    several_processes: bool = True
    """Whether it makes sense on more than one process."""

    @property
    def launch_file(self) -> str:
        """The template for accelerate."""
        return f"accelerate/{self.name}.yaml"

    @property
    def deepspeed_file(self) -> str | None:
        """The template for DeepSpeed, where it is used."""
        return f"deepspeed/{self.name}.json" if self.wrapper == "deepspeed" else None

    @property
    def whole_weights(self) -> bool:
        """Whether each rank has all float32 masters: a quantised base needs them."""
        return not self.sharded

    @property
    def whole_blocks(self) -> bool:
        """Whether a block's weights are there when it computes: compilation and DoRA need them."""
        return self.gathers != "layers"

    @property
    def shares_encoders(self) -> bool:
        """Whether the ranks keep one large text encoder between them, as they do the transformer."""
        return "weights" in self.sharded

    @property
    def saves_copies(self) -> bool:
        """Whether a checkpoint holds, beside the float32 masters, the weights that the model computes with."""
        return self.wrapper == "deepspeed" and "weights" not in self.sharded


_EVERYTHING = ("optimizer", "gradients", "weights")

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(name="single", wrapper="none", several_processes=False),
        Strategy(name="ddp", wrapper="ddp"),
        Strategy(name="fsdp", wrapper="fsdp", sharded=_EVERYTHING, gathers="blocks", checkpoint_format="dcp"),
        Strategy(
            name="zero2",
            wrapper="deepspeed",
            zero_stage=2,
            sharded=("optimizer", "gradients"),
            checkpoint_format="deepspeed",
        ),
        Strategy(
            name="zero3",
            wrapper="deepspeed",
            zero_stage=3,
            sharded=_EVERYTHING,
            gathers="layers",
            checkpoint_format="deepspeed",
        ),
        Strategy(
            name="zero3-offload",
            wrapper="deepspeed",
            zero_stage=3,
            sharded=_EVERYTHING,
            gathers="layers",
            checkpoint_format="deepspeed",
            offloads=True,
        ),
    )
}

STRATEGY_FLAGS = {
    "ddp": "ddp",
    "fsdp": "fsdp",
    "zero2": "zero2",
    "zero3": "zero3",
    "zero3_offload": "zero3-offload",
    "use_fsdp": "fsdp",
    "use_deepspeed": "zero2",
}
"""Flags that choose a strategy; ``use_…`` are those of the original scripts."""
