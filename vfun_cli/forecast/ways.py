"""What makes a run fit: other values of its options, the cheapest first."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vfun_cli.config.options import BASE_PRECISIONS, RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import as_flag


@dataclass(frozen=True, kw_only=True)
class Way:
    """A change of options."""

    options: Mapping[str, Any]
    costs: str
    """What it costs, in a few words."""

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration with it."""
        return replace(config, **self.options)

    @property
    def typed(self) -> str:
        """As it is typed behind a command."""
        return " ".join(_typed(name, value) for name, value in self.options.items())


def _typed(name: str, value: Any) -> str:
    flag = as_flag(name)
    if isinstance(value, bool):
        return flag if value else as_flag(f"no_{name}")
    words = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f"--{value}" if name == "strategy" and value != "single" else f"{flag} {words}"


def possible_ways(config: RunConfig, ranks: int, *, lora: bool) -> Iterator[Way]:
    """All single changes that may make a run smaller, the cheapest first; each has to be tried."""
    if config.parts_of(ranks) < ranks:
        yield Way(options={"fsdp_shard_size": ranks}, costs="weights are gathered from all machines")
    for possible, way in _WAYS:
        if possible(config, ranks, lora) and way.applied(config) != config:
            yield way


Possible = Callable[[RunConfig, int, bool], bool]


def _keeps_more_than(*modes: str) -> Possible:
    return lambda config, ranks, lora: config.gradient_checkpointing in modes


def _shards_less_than(name: str) -> Possible:
    """Where the strategy shards less than this one; a quantised base cannot be sharded."""

    def possible(config: RunConfig, ranks: int, lora: bool) -> bool:
        now, then = STRATEGIES[config.strategy], STRATEGIES[name]
        more = len(then.sharded) > len(now.sharded) or (then.offloads and not now.offloads)
        return more and config.base_precision == "bf16" and (ranks > 1 or then.offloads)

    return possible


def _base_in(*precisions: str) -> Possible:
    """Where the whole frozen base lies on each rank, in one of these precisions."""
    return lambda config, ranks, lora: (
        lora and STRATEGIES[config.strategy].whole_weights and config.base_precision in precisions
    )


_WAYS: tuple[tuple[Possible, Way], ...] = (
    (
        lambda config, ranks, lora: not config.low_vram and config.cache is None,
        Way(options={"low_vram": True}, costs="encoders are copied to the GPU before each step"),
    ),
    (
        lambda config, ranks, lora: config.cache is None,
        Way(options={"cache": Path("cache")}, costs="vfun cache fills it before the run"),
    ),
    (
        _keeps_more_than("none", "selective"),
        Way(options={"gradient_checkpointing": "attention"}, costs="each block but its self-attention computes twice"),
    ),
    (
        _keeps_more_than("none", "selective", "attention"),
        Way(options={"gradient_checkpointing": "block"}, costs="each block computes twice"),
    ),
    (_shards_less_than("fsdp"), Way(options={"strategy": "fsdp"}, costs="weights are gathered block by block")),
    (
        lambda config, ranks, lora: not config.activation_offload,
        Way(options={"activation_offload": True}, costs="activations wait in the host's memory"),
    ),
    (
        lambda config, ranks, lora: config.optimizer == "adamw",
        Way(options={"optimizer": "adamw8bit"}, costs="moments are rounded to 8 bits"),
    ),
    (_base_in("bf16"), Way(options={"base_precision": "fp8"}, costs="the frozen base is rounded to 8 bits")),
    (_base_in("bf16", "fp8"), Way(options={"base_precision": "nf4"}, costs="the frozen base is rounded to 4 bits")),
    (
        lambda config, ranks, lora: config.stream_blocks is None and _base_in(*BASE_PRECISIONS)(config, ranks, lora),
        Way(options={"stream_blocks": 0}, costs="frozen blocks come from the host's memory in each pass"),
    ),
    (
        _shards_less_than("zero3-offload"),
        Way(options={"strategy": "zero3-offload"}, costs="AdamW works on the processor, weights come from the host"),
    ),
)
"""With where each is possible."""
