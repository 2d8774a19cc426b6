"""Optimizers: every one once, with where it comes from, what it takes, what it keeps and where it works.

What it keeps of each parameter decides how large a checkpoint is and where that can be carried: numbers of the
parameter's own shape can be cut and joined like the parameter, so any strategy takes them over; factors of a matrix,
and numbers that share a scale with their neighbours, cannot.
"""

import ast
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from vfun_cli.config.options import RunConfig

Shape = tuple[int, ...]
Arguments = Mapping[str, Any]

BETAS, DECAY, EPSILON = ("adam_beta1", "adam_beta2"), ("adam_weight_decay",), ("adam_epsilon",)
ADAM_OPTIONS = (*BETAS, *DECAY, *EPSILON)

WHOLE = ("none", "ddp")
"""Wrappers of strategies under which every rank has whole parameters and gradients; see ``Strategy.wrapper``."""
EVERYWHERE = (*WHOLE, "fsdp", "deepspeed")

LOW_RATE = 0.5
"""Of the learning rate: what ``trainable_modules_low_learning_rate`` train at, as the original scripts have it."""

_SMALLEST_8BIT = 4096
"""Numbers of a tensor (of a shard, where there are some) below which torchao keeps float32."""
_BLOCK_8BIT = 256
"""Numbers that share a scale; a tensor that they do not divide is kept in float32, too."""


def _adamw_state(shape: Shape, arguments: Arguments) -> dict[str, int]:
    moments = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if arguments.get("amsgrad") else []))
    return {**dict.fromkeys(moments, 4 * math.prod(shape)), "step": 4}


def _adamw8bit_state(shape: Shape, arguments: Arguments) -> dict[str, int]:
    numbers, block = math.prod(shape), arguments.get("block_size", _BLOCK_8BIT)
    if numbers < _SMALLEST_8BIT or numbers % block:
        return _adamw_state(shape, arguments)
    codes_and_scales = numbers + 4 * numbers // block
    return {name: size if name == "step" else codes_and_scales for name, size in _adamw_state(shape, arguments).items()}


def _factors(shape: Shape, name: str) -> dict[str, int]:
    """One number for each row and one for each column of a matrix, or of each matrix in a stack of them."""
    numbers = 4 * math.prod(shape)
    return {f"{name}_row": numbers // shape[-1], f"{name}_col": numbers // shape[-2]}


def _adafactor_state(shape: Shape, arguments: Arguments) -> dict[str, int]:
    return {"step": 4, **(_factors(shape, "var") if len(shape) > 1 else {"variance": 4 * math.prod(shape)})}


def _came_state(shape: Shape, arguments: Arguments) -> dict[str, int]:
    numbers = 4 * math.prod(shape)
    kept = {"step": 8, "RMS": 4, "exp_avg": numbers}
    if len(shape) > 1:
        return {**kept, **_factors(shape, "exp_avg_sq"), **_factors(shape, "exp_avg_res")}
    return {**kept, "exp_avg_sq": numbers}


def _prodigy_state(shape: Shape, arguments: Arguments) -> dict[str, int]:
    numbers, looked_at = 4 * math.prod(shape), 4 * math.ceil(math.prod(shape) / arguments.get("slice_p", 1))
    # p0 is a single zero where a parameter begins with nothing but zeros.
    return {"step": 8, "s": looked_at, "p0": looked_at, "exp_avg": numbers, "exp_avg_sq": numbers}


def _muon_state(shape: Shape, arguments: Arguments) -> dict[str, int]:
    return {"momentum_buffer": 4 * math.prod(shape)} if len(shape) == 2 else _adamw_state(shape, {})


Copies = tuple[float, float]
"""In float32: of all parameters, and of the largest one."""


def _one_at_a_time(copies: float) -> Callable[[Arguments], Copies]:
    return lambda arguments: (0, copies)


def _adamw_copies(arguments: Arguments) -> Copies:
    """None in one pass over each tensor, which is what torch does where nothing else is said."""
    if arguments.get("fused", True) and not arguments.get("foreach"):
        return 0, 0
    return (1, 0) if arguments.get("foreach", True) else (0, 3)


def _adafactor_copies(arguments: Arguments) -> Copies:
    return (1, 0) if arguments.get("foreach", True) else (0, 2)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One optimizer. What differs between them is a column here."""

    name: str
    place: str
    """``module:class``."""
    package: str | None = None
    """What is to be installed for it, where vfun itself does not depend on that."""
    module: str | None = None
    """The package's module."""
    extra: str | None = None
    """Its optional dependency of vfun."""
    takes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Its arguments that are options of vfun: one option, or several for a tuple."""
    given: Arguments = field(default_factory=dict)
    """Its arguments that vfun decides."""
    arguments: tuple[str, ...] | None = None
    """Its other arguments, for ``optimizer_args``; None where they are known to its constructor alone."""
    fused: bool = False
    """Whether torch has it in one pass over each tensor."""
    compiled: bool = False
    """Whether its step is compiled."""
    others: str | None = None
    """It takes matrices alone; who takes the other parameters."""
    state: Callable[[Shape, Arguments], dict[str, int]] = _adamw_state
    """Bytes of what it keeps of a parameter of this shape, by name, as a checkpoint holds them."""
    copies: Callable[[Arguments], Copies] = _adamw_copies
    """What its step makes and lets go, on a GPU: as torch works there, on all tensors at a time, or one by one. Where
    it is compiled, what it makes when it is not."""
    wrappers: tuple[str, ...] = WHOLE
    """Where it works."""
    because: str = ""
    """Why nowhere else."""
    converts: bool = False
    """Whether all that it keeps is a number for each of the parameter's, or one for all of them."""
    in_blocks: bool = False
    """Whether neighbouring numbers are kept with a common scale: each rank saves what it has, as it is."""
    counts: bool = False
    """Whether it counts, or estimates, in its parameter groups."""
    one_rate: bool = False
    """Whether all parameters must have the same learning rate."""
    usual_rate: float | None = None
    """Its usual learning rate, where it is far from that of AdamW."""
    rate_means: str = ""
    """What the learning rate is then."""

    @property
    def options(self) -> set[str]:
        """The options of vfun that have an effect on it."""
        others = set() if self.others is None else OPTIMIZERS[self.others].options
        return {option for names in self.takes.values() for option in names} | others


_AS_ADAM = {"betas": BETAS, "weight_decay": DECAY, "eps": EPSILON}
_MATRICES = "it needs whole matrices, and each rank has a part of one"

OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer(
            name="adamw",
            place="torch.optim:AdamW",
            takes=_AS_ADAM,
            arguments=("amsgrad", "foreach", "fused", "capturable"),
            fused=True,
            wrappers=EVERYWHERE,
            converts=True,
        ),
        Optimizer(
            name="adamw8bit",
            place="torchao.optim:AdamW8bit",
            package="torchao",
            module="torchao",
            extra="adamw8bit",
            takes=_AS_ADAM,
            arguments=("amsgrad", "block_size"),
            compiled=True,
            state=_adamw8bit_state,
            copies=_one_at_a_time(6),
            wrappers=(*WHOLE, "fsdp"),
            because="DeepSpeed's checkpoints cannot hold its blocks of 8-bit numbers",
            in_blocks=True,
        ),
        Optimizer(
            name="adafactor",
            place="torch.optim:Adafactor",
            takes={"weight_decay": DECAY},
            arguments=("beta2_decay", "eps", "d", "foreach"),
            state=_adafactor_state,
            copies=_adafactor_copies,
            because=_MATRICES,
            usual_rate=1e-2,
            rate_means="is relative to the size of each weight",
        ),
        Optimizer(
            name="came",
            place="came_pytorch:CAME",
            package="came-pytorch",
            module="came_pytorch",
            extra="came",
            # As the original scripts have it, whatever their adam_... options say.
            given={"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)},
            arguments=("betas", "eps", "clip_threshold", "weight_decay"),
            state=_came_state,
            copies=_one_at_a_time(5),
            because=_MATRICES,
        ),
        Optimizer(
            name="prodigy",
            place="prodigyopt:Prodigy",
            package="prodigyopt",
            module="prodigyopt",
            extra="prodigy",
            takes=_AS_ADAM,
            arguments=(
                "beta3", "d0", "d_coef", "decouple", "growth_rate", "safeguard_warmup", "slice_p",
                "use_bias_correction",
            ),
            state=_prodigy_state,
            copies=_one_at_a_time(2),
            because="it estimates one rate from all weights, and each rank has a part of them",
            counts=True,
            one_rate=True,
            usual_rate=1.0,
            rate_means="is a factor on the rate that it finds by itself",
        ),
        Optimizer(
            name="muon",
            place="torch.optim:Muon",
            takes={"weight_decay": DECAY},
            # A step as large as AdamW's, so that one learning rate fits the matrices and the rest.
            given={"adjust_lr_fn": "match_rms_adamw"},
            arguments=("momentum", "nesterov", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn"),
            others="adamw",
            state=_muon_state,
            copies=_one_at_a_time(3),
            because=_MATRICES,
        ),
    )
}  # fmt: skip

OPTIMIZER_FLAGS = {"use_8bit_adam": "adamw8bit", "use_came": "came"}
"""The original scripts' flags that choose an optimizer."""

_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def find(name: str) -> Optimizer:
    """The optimizer of this name, or the class of an installed package that it names.

    Raises:
        ConfigError: it is neither.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if not _CLASS.fullmatch(name):
        raise ConfigError(
            f"there is no optimizer {name!r}.{did_you_mean(name, OPTIMIZERS)}",
            hint=f"Use one of {', '.join(OPTIMIZERS)}, or a class of an installed package: torch.optim.RAdam.",
            option="--optimizer",
        )
    module, _, kind = name.rpartition(".")
    return Optimizer(
        name=name, place=f"{module}:{kind}", copies=lambda arguments: (2, 0), wrappers=EVERYWHERE, converts=True,
        counts=True,
    )  # fmt: skip


def packages(name: str | None) -> list[str]:
    """What is installed for it beside what vfun depends on, as far as the table tells."""
    package = OPTIMIZERS[name].package if name in OPTIMIZERS else None
    return [] if package is None else [package]


def parse_arguments(entries: Sequence[str]) -> dict[str, Any]:
    """What ``optimizer_args`` say: numbers, booleans, tuples, and text where it is none of these.

    Raises:
        ConfigError: an entry that is not ``name=value``, or a name twice.
    """
    found: dict[str, Any] = {}
    for part in (part for entry in entries for part in _PART.findall(entry)):
        name, equals, text = (word.strip() for word in part.partition("="))
        if not (equals and text and name.isidentifier()):
            raise _refused(f"{part.strip()!r} is not name=value", "Write --optimizer-args ns_steps=6,nesterov=false.")
        if name in found:
            raise _refused(f"{name} is given twice", "Keep one of them.")
        found[name] = _value(text)
    return found


_PART = re.compile(r"(?:[^,(\[]|\([^)]*\)?|\[[^\]]*\]?)+")
"""Up to a comma that is in no brackets."""

_WORDS = {"true": True, "false": False, "none": None}


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for read in (ast.literal_eval, float):  # the second knows inf
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    return text


def _refused(what: str, hint: str) -> ConfigError:
    return ConfigError(f"optimizer_args: {what}.", hint=hint, option="--optimizer-args")


def check_arguments(optimizer: Optimizer, arguments: Arguments) -> None:
    """Refuse arguments that an optimizer does not take.

    Raises:
        ConfigError: one of them.
    """
    if "lr" in arguments:
        raise _refused("the learning rate is an option of its own", "Use --learning-rate.")
    if optimizer.arguments is None:
        return
    known = {*optimizer.takes, *optimizer.arguments}
    for name in arguments:
        if name not in known:
            raise _refused(
                f"{optimizer.name} takes no {name}.{did_you_mean(name, known)}".removesuffix("."),
                f"It takes {', '.join(sorted(known))}.",
            )


def constructor_arguments(optimizer: Optimizer, config: "RunConfig", arguments: Arguments) -> dict[str, Any]:
    """All that it is made with beside parameters and learning rate; ``arguments`` are stronger than options."""
    options = {name: tuple(getattr(config, option) for option in names) for name, names in optimizer.takes.items()}
    single = {name: values if len(values) > 1 else values[0] for name, values in options.items()}
    return {**optimizer.given, **single, **arguments}


def state_bytes(config: "RunConfig", shapes: Iterable[Shape], *, ranks: int = 1) -> int:
    """What a checkpoint holds of the optimizer's state of parameters of these shapes, at most.

    Of a class that is not in the table, two float32 numbers for each of a parameter are assumed.

    Args:
        ranks: over which FSDP cuts each parameter.
    """
    optimizer, arguments = find(config.optimizer), parse_arguments(config.optimizer_args)
    cut = ranks if optimizer.in_blocks else 1  # what else is sharded takes the same
    return sum(sum(optimizer.state(shard, arguments).values()) for shape in shapes for shard in _shards(shape, cut))


def step_bytes(config: "RunConfig", shapes: Iterable[Shape]) -> int:
    """What a step over parameters of these shapes makes and lets go, at most, beside all that is kept.

    Of a class that is not in the table, two copies of all are assumed: most of torch's make one or two.
    """
    of_all, of_largest = find(config.optimizer).copies(parse_arguments(config.optimizer_args))
    numbers = [math.prod(shape) for shape in shapes]
    return round(4 * (of_all * sum(numbers) + of_largest * max(numbers, default=0)))


def ranks_of_a_parameter(config: "RunConfig") -> int:
    """Over how many ranks FSDP cuts each parameter; 1 under other strategies."""
    return config.parts_of(config.num_processes or 1) if STRATEGIES[config.strategy].wrapper == "fsdp" else 1


def _shards(shape: Shape, ranks: int) -> Iterator[Shape]:
    """As FSDP cuts a parameter: the first ranks get equal parts of its rows, rounded up."""
    if ranks == 1 or not shape:
        yield shape
        return
    rows = math.ceil(shape[0] / ranks)
    for first in range(0, shape[0], max(rows, 1)):
        yield (min(rows, shape[0] - first), *shape[1:])


def cut_by(options: Mapping[str, Any]) -> tuple[str, int]:
    """The strategy of a run's options, and over how many ranks it cuts what the optimizer keeps."""
    return str(options["strategy"]), int(options.get("fsdp_shard_size") or options["num_processes"])


def carries_over(optimizer: Optimizer, before: tuple[str, int], now: tuple[str, int]) -> bool:
    """Whether another strategy or number of ranks can go on from what the optimizer kept.

    Args:
        before: the strategy that saved it, and over how many ranks that cut it (``cut_by``).
        now: the same of the one that would load it.
    """
    whole = all(strategy in STRATEGIES and STRATEGIES[strategy].whole_weights for strategy, _ in (before, now))
    return optimizer.converts or whole or before == now


def notices(config: "RunConfig", said: set[str]) -> Iterator[str]:
    """What has no effect on the optimizer, or not the usual one.

    Args:
        said: options that somebody has set.
    """
    optimizer, rate = find(config.optimizer), config.learning_rate
    known = optimizer.name in OPTIMIZERS
    idle = [name for name in ADAM_OPTIONS if name in said and name not in optimizer.options]
    if idle:
        yield f"without effect on {optimizer.name}: {', '.join(idle)}. What it takes is said by --optimizer-args."
    if optimizer.usual_rate is not None and rate < optimizer.usual_rate / 10:
        yield (
            f"the learning rate of {optimizer.name} {optimizer.rate_means}: {optimizer.usual_rate:g} is usual, and "
            f"{rate:g} may train next to nothing."
        )
    if not known and STRATEGIES[config.strategy].sharded:
        yield (
            f"under {config.strategy} {optimizer.name} is given a part of each parameter on each rank; only an "
            "optimizer to which each number is a matter of its own trains as it does on one."
        )
