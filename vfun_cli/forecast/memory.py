"""What each phase of a step takes of a device, from what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES, Strategy
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.request import Measured

GIB = 1 << 30
CONTEXT = 1 * GIB
"""Of a device, whatever runs there: CUDA's context with its kernels, and the workspaces of cuBLAS and cuDNN."""
COLLECTIVES = 1 * GIB
"""NCCL's channels and buffers, where there are several ranks."""
ROUNDED = 0.02
"""What the allocator loses of what it gives away: blocks of 2 MiB, with ``expandable_segments`` nothing more."""
GATHERED_BLOCKS = 3
"""Blocks that FSDP has whole at a time: the one that computes, the next one, and that one's buffer before it is cut
into weights."""
ZERO_BUCKET = 500_000_000
"""Numbers in a bucket of DeepSpeed's, for gradients and for gathering (its defaults)."""
ZERO3_LIVE = 1_000_000_000
"""Numbers of weights that ZeRO-3 leaves gathered for their next use (``stage3_max_live_parameters``)."""
ZERO3_STEPS = 1_000_000_000
"""Numbers of a rank that it steps at a time, as one tensor (``sub_group_size``)."""
ZERO3_AHEAD = 50_000_000
"""Numbers that it gathers ahead (``stage3_prefetch_bucket_size``)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one rank's device, in bytes."""

    parts: Mapping[str, Mapping[str, int]]
    """By phase, what lies there at its peak, by name."""

    @property
    def phases(self) -> dict[str, int]:
        """The peak of each."""
        return {phase: sum(parts.values()) for phase, parts in self.parts.items()}

    @property
    def peak(self) -> int:
        """The most of all."""
        return max(self.phases.values())

    @property
    def binding(self) -> str:
        """The phase that decides."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {"peak_bytes": self.peak, "phase": self.binding, "phases": {
            phase: {"bytes": sum(parts.values()), **parts} for phase, parts in self.parts.items()}}  # fmt: skip


def memory(config: RunConfig, spec: FamilySpec, measured: Measured, ranks: int) -> Memory:
    """Of one rank of so many; the micro-batch is the one that was measured."""
    strategy = STRATEGIES[config.strategy]
    kept = _kept(config, strategy, measured)
    encoders = encoder_bytes(config, spec, measured, max(1, ranks // config.num_machines))
    resident = 0 if config.low_vram else sum(encoders.values())
    working = resident if not config.low_vram else max(encoders.values(), default=0)
    gathered = _gathered(config, strategy, measured)
    gradients = 0 if strategy.offloads else measured.gradients
    encodes = config.cache is None
    parts = {
        "load": {**kept, "encoders": resident},
        "encode": {**kept, "encoders": working, "encoding": measured.encode if encodes else 0},
        "forward": {**kept, "encoders": resident, "gathered": gathered, "activations": measured.forward},
        "backward": {
            **kept, "encoders": resident, "gathered": gathered,
            **_backward(config, strategy, measured, gradients),
        },
        "optimizer": {
            **kept, "encoders": resident, "gradients": gradients, "buffers": _step(config, strategy, measured),
        },
        "checkpoint": {**kept, "encoders": resident},
    }  # fmt: skip
    if measured.predict:
        parts["sampling"] = {
            **kept, "encoders": sum(encoders.values()), "gathered": gathered,
            "a video": max(measured.predict, measured.decode),
        }  # fmt: skip
    return Memory(parts={phase: _with_losses(found, ranks) for phase, found in parts.items()})


def encoder_bytes(config: RunConfig, spec: FamilySpec, measured: Measured, here: int) -> dict[str, int]:
    """Weights of each encoder on one rank's device; none where a cache has what they give.

    Args:
        here: the ranks of a machine, which may share one.
    """
    if config.cache is not None:
        return {}
    shares, size = STRATEGIES[config.strategy].shares_encoders, config.compute_bytes
    return {
        name: measured.encoders[name] * (4 if each.float32 else size) // (here if each.shared and shares else 1)
        for name, each in spec.model.encoders.items()
    }


def _kept(config: RunConfig, strategy: Strategy, measured: Measured) -> dict[str, int]:
    """What lies there from step to step."""
    if strategy.offloads:
        return {"weights": 0, "masters": 0, "moments": 0, "average": 0}
    return {
        "weights": measured.weights,
        "masters": measured.masters,
        "moments": measured.moments,
        "average": measured.average,
    }


def _backward(config: RunConfig, strategy: Strategy, measured: Measured, gradients: int) -> dict[str, int]:
    """Gradients grow while what was kept for them goes: the most is held at one end, or at the other.

    Where micro-batches are summed, the gradients of the first ones are there from the beginning. Under FSDP those of
    what lies outside of blocks wait for the end of the pass, when they are sent together.
    """
    begun = gradients if config.gradient_accumulation_steps > 1 else 0
    block, outside = (
        _in_flight(config, strategy, measured, unit) for unit in (measured.trained_in_block, measured.trained_outside)
    )
    waiting = config.compute_bytes * measured.trained_outside if strategy.wrapper == "fsdp" else 0
    ends = (
        {"gradients": begun, "activations": measured.backward, "buffers": block},
        {"gradients": gradients, "activations": measured.last, "buffers": block + waiting},
        {"gradients": gradients, "activations": 0, "buffers": outside},
    )
    return max(ends, key=lambda parts: sum(parts.values()))


def _gathered(config: RunConfig, strategy: Strategy, measured: Measured) -> int:
    """Weights that are whole while they are computed with, beside the parts of them that are kept."""
    size = config.compute_bytes
    if strategy.gathers == "blocks":
        blocks = GATHERED_BLOCKS + config.fsdp_prefetch
        return size * (measured.outside + blocks * measured.largest_block)
    if strategy.gathers == "layers":
        return size * min(ZERO3_LIVE + ZERO3_AHEAD, measured.parameters)
    return 0


def _in_flight(config: RunConfig, strategy: Strategy, measured: Measured, unit: int) -> int:
    """Gradients on their way to the ranks that keep them. ``unit``: how many FSDP sends at a time."""
    compute = config.compute_bytes
    if strategy.wrapper == "fsdp":  # in the compute type, and as they are summed
        return (compute + (2 if config.fsdp_reduce_dtype == "bf16" else 4)) * unit
    if strategy.wrapper == "deepspeed":  # two buckets, one of which is filled while the other one is summed in float32
        return (2 * compute + 4) * min(ZERO_BUCKET, measured.trained)
    return 0


def _step(config: RunConfig, strategy: Strategy, measured: Measured) -> int:
    """What the step takes beside weights, gradients and moments: what the optimizer makes, and what DeepSpeed joins
    gradients in, unless they were summed there."""
    if strategy.offloads:
        return 0
    joined = 0
    if strategy.gathers == "layers":
        joined = min(measured.masters, 4 * ZERO3_STEPS)
    elif strategy.wrapper == "deepspeed" and not config.bf16:
        joined = measured.masters
    return joined + measured.step


def _with_losses(parts: Mapping[str, int], ranks: int) -> dict[str, int]:
    total = sum(parts.values())
    fixed = CONTEXT + (COLLECTIVES if ranks > 1 else 0)
    return {name: size for name, size in parts.items() if size} | {"CUDA": fixed, "allocator": int(ROUNDED * total)}
