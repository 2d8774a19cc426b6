"""What is proved, as data: the commands of each row, what its losses are compared with, and what it needs.

A row trains a demo for a few steps in a run directory of its own. Its losses must be those of its reference: the same
steps on the CPU, or on the same device without the option that the row is about. So must the weights of a resumed run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vfun_cli import families
from vfun_cli.config.options import BASE_PRECISIONS
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import ConfigError, FitError

VFUN = "vfun_cli"
MADE_UP = "vfun_cli.acceptance.made_up"
SCARCE = "vfun_cli.acceptance.scarce"
STEP_MEMORY = "vfun_cli.acceptance.step_memory"

Command = tuple[str, ...]
"""A module that is started as a process, and its arguments."""

DEMO, RUNS = "demo", "runs"
"""The row of a family that makes its demo; the folder of the run directories."""

FIRST = ("wan-s2v", "cogvideox-fun")
"""The families whose rows come first and that are tried in every way: the largest, and one with all else otherwise."""

STEPS = 3

FLOAT32, BF16, STRATEGY, QUANTISED = 2e-3, 0.1, 0.03, 0.1
"""Bounds, as relative differences of a step's loss: float32 on two devices (without TF32); bf16 from float32; the same
bf16 rounded at other places; a base in 8 or 4 bits. At the demo's learning rate steps drift apart quickly."""

REPEATED = {"cpu": 0.0, "cuda": 1e-2}
"""The bound for the same computed twice, in bf16: backward passes of attention on a GPU add in any order. What the
device itself makes of it is the deviation of the rows ``again``.

Of weights it bounds the distance of all of them together. On a CPU four steps of Wan-S2V's demo under FSDP, which
rounds elsewhere, end 5e-4 from those of one process; two steps move the weights by 5e-2, and resumed without the
moments of the checkpoint they end 9e-2 away."""

FORECAST = 0.1
"""The bound for what a step takes of a device, relative to what was forecast."""

LARGE = 4096
"""Side of clips that need more memory than ``scarce.py`` leaves: their pixels alone take 0.8 GB, and 3.2 as float32."""

NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}
"""vfun leaves TF32 as torch has it: off in matrix products, on in the convolutions of the VAE."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that is proved."""

    name: str
    """``family/what``: also the folder of its run."""
    proves: str
    commands: tuple[Command, ...]
    """Run one after another."""
    losses: bool = True
    """Whether there are any, in its run directory."""
    reference: str | None = None
    """The row whose losses and weights it must have."""
    says_how_far_off: bool = False
    """Whether its last command says itself how far it is off, which ``bound`` bounds then."""
    bound: float = 0.0
    steps: tuple[int, ...] = ()
    """The steps that are compared, by default all."""
    weights: tuple[str, ...] = ()
    """Checkpoints and exports in its run directory that are compared with the reference's, one by one."""
    after: str | None = None
    """The row that must have worked before."""
    needs: tuple[str, ...] = ()
    """What the machine must have: names of ``machine.LACKS``."""
    exit_code: int = 0
    """Of its last command."""
    says: tuple[str, ...] = ()
    """What its last command must say."""
    never_says: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    """What its processes find in their environment."""
    alone: bool = False
    """Nothing else may run beside it."""

    @property
    def is_bounded(self) -> bool:
        """Whether it is compared with anything, within ``bound``."""
        return self.reference is not None or self.says_how_far_off


def all_rows(device: str) -> list[Row]:
    """Every row, what tells most first; those that make the demos before all others."""
    rest = [name for name in families.FAMILIES if name not in FIRST]
    names = [*FIRST, *rest]
    groups = [
        [_demo(name) for name in names],
        *(_precisions(name, device) for name in FIRST),
        *(_steps(name, device) for name in FIRST),
        *(_precisions(name, device) for name in rest),
        *(_strategies(name, device) for name in FIRST),
        *(_bases(name, device) for name in FIRST),
        *(_resumed(FIRST[0], strategy, device) for strategy in ("single", "fsdp", "zero3")),
        *([_looked_at(name, device), _looked_at(name, device, "fsdp")] for name in FIRST),
        *(_options(name, device) for name in FIRST),
        [_memory(name, device) for name in FIRST],
        *(_steps(name, device) for name in rest),
        [_fsdp(name, device) for name in rest],
        *(_without_waits(name, device) for name in FIRST),
        [_lora(name, device) for name in rest],
        [_looked_at(name, device) for name in rest],
        [_averaged(FIRST[0], name, device) for name, strategy in STRATEGIES.items() if strategy.sharded],
        [_in_turn(name, device) for name in names],
        [_offloaded(name, device, how) for name, how in zip(FIRST, ("attention", "none"), strict=True)],
        [_out_of_memory(FIRST[0], device)],
    ]
    return [row for group in groups for row in group]


def chosen(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """The rows of these names, or whose names hold a text, with those that they are compared with or come after.

    Raises:
        ConfigError: a text that no name holds.
    """
    by_name = {row.name: row for row in rows}
    named: list[str] = [] if only else list(by_name)
    for text in only:
        found = [text] if text in by_name else [name for name in by_name if text in name]
        named += [name for name in found if name not in named]
        if not found:
            raise ConfigError(
                f"no row of the acceptance run has {text!r} in its name.",
                hint="Names are like wan-s2v/fsdp; vfun acceptance --list prints all.",
                option="--only",
            )
    for name in named:  # grows as it goes
        row = by_name[name]
        named += [other for other in (row.reference, row.after) if other is not None and other not in named]
    return [row for row in rows if row.name in named]


def _demo(family: str) -> Row:
    return Row(
        name=f"{family}/{DEMO}", proves="the demo's model is written, and its media where PyAV is installed",
        commands=((MADE_UP, family),), losses=False,
    )  # fmt: skip


def _trained(
    name: str, proves: str, family: str, device: str, *options: str, command: str = "train",
    before: Sequence[Command] = (), **fields: Any,
) -> Row:  # fmt: skip
    """A few steps through the command line and the launcher."""
    needs = ("av", *fields.pop("needs", ()))
    typed = (
        VFUN, command, family, "--demo", "--device", device, "--num-processes", "1", "--report-to", "none",
        "--max-train-steps", str(STEPS), "--dataloader-num-workers", "0", "--output-dir", f"{RUNS}/{name}", *options,
    )  # fmt: skip
    return Row(
        name=name, proves=proves, commands=(*before, typed), after=f"{family}/{DEMO}", needs=needs, **fields
    )  # fmt: skip


BF16_OPTION = ("--mixed-precision", "bf16")
"""Typed, so that a CPU without bf16 units computes in it too."""


def _like_bf16(family: str) -> dict[str, Any]:
    return {"reference": f"{family}/bf16", "bound": STRATEGY}


def _precisions(family: str, device: str) -> list[Row]:
    """The reference on the CPU, and the device in float32 and in bf16."""
    full = ("--mixed-precision", "no")
    reference = f"{family}/cpu"
    return [
        _trained(reference, "float32 on the CPU, which the others are compared with", family, "cpu", *full),
        _trained(
            f"{family}/fp32", "the step in float32", family, device, *full, reference=reference, bound=FLOAT32,
            variables=NO_TF32,
        ),
        _trained(
            f"{family}/bf16", "the step in bf16", family, device, *BF16_OPTION, reference=reference, bound=BF16
        ),
    ]  # fmt: skip


def _strategies(family: str, device: str) -> list[Row]:
    """Each of them on one process; the training refuses to run under another than was asked for."""
    return [
        _trained(
            f"{family}/{name}", f"{name} of one process", family, device, "--strategy", name, *BF16_OPTION,
            needs=_packages(name), **_like_bf16(family),
        )
        for name in STRATEGIES
        if name != "single"
    ]  # fmt: skip


def _packages(strategy: str) -> tuple[str, ...]:
    return ("deepspeed",) if STRATEGIES[strategy].wrapper == "deepspeed" else ()


def _fsdp(family: str, device: str) -> Row:
    """Its units are the family's own blocks."""
    return _trained(
        f"{family}/fsdp", "fsdp of one process", family, device, "--fsdp", *BF16_OPTION, **_like_bf16(family)
    )


def _lora(family: str, device: str) -> Row:
    """Adapters begin as zeros: the first loss is the model's own."""
    return _trained(
        f"{family}/lora", "LoRA begins with the losses of the model", family, device, *BF16_OPTION, command="lora",
        reference=f"{family}/bf16", bound=STRATEGY, steps=(1,),
    )  # fmt: skip


def _bases(family: str, device: str) -> list[Row]:
    """LoRA on each base, streamed from the host, and under FSDP."""
    lora = _lora(family, device)

    def row(name: str, proves: str, *options: str, **fields: Any) -> Row:
        return _trained(name, proves, family, device, *BF16_OPTION, *options, command="lora", **fields)

    def streamed(of: str, what: str, *options: str, **fields: Any) -> Row:
        """Kernels and their order are the same, and so are the losses."""
        proves = f"all blocks of {what} come from host memory"
        return row(
            f"{of}-stream", proves, *options, "--stream-blocks", "0", reference=of, bound=REPEATED[device], **fields
        )

    rows = [lora, streamed(lora.name, "a base in bf16")]
    for precision in BASE_PRECISIONS[1:]:
        rows.append(
            row(
                f"{lora.name}-{precision}", f"LoRA on a base in {precision}", "--base-precision", precision,
                reference=lora.name, bound=QUANTISED, needs=("cuda",),
            )
        )  # fmt: skip
    rows.append(streamed(f"{lora.name}-nf4", "a base in nf4", "--base-precision", "nf4", needs=("cuda",)))
    rows.append(row(f"{lora.name}-fsdp", "LoRA under FSDP", "--fsdp", reference=lora.name, bound=STRATEGY))
    return rows


def _resumed(family: str, strategy: str, device: str) -> list[Row]:
    """Four steps with a checkpoint in their middle; from there the same again, elsewhere; the last of both exported."""
    whole, resumed = f"{family}/whole-{strategy}", f"{family}/resume-{strategy}"
    needs = _packages(strategy)
    weights = ("checkpoint-4", "checkpoint-4-outputs")

    def exported(row: Row) -> Row:
        export = (VFUN, "export-bf16", f"{RUNS}/{row.name}/{weights[0]}")
        return replace(row, commands=(*row.commands, export), weights=weights)

    once = _trained(
        whole, "the steps that are resumed, and the export", family, device, "--strategy", strategy, *BF16_OPTION,
        "--max-train-steps", "4", "--checkpointing-steps", "2", needs=needs,
    )  # fmt: skip
    again = Row(
        name=resumed, proves="steps resumed after a checkpoint: their losses, the weights at the end, the export",
        commands=((VFUN, "resume", f"{RUNS}/{whole}/checkpoint-2", "--output-dir", f"{RUNS}/{resumed}"),),
        reference=whole, bound=REPEATED[device], steps=(3, 4), after=whole, needs=("av", *needs),
    )  # fmt: skip
    return [exported(once), exported(again)]


def _options(family: str, device: str) -> list[Row]:
    """What costs memory or time otherwise and must not change the losses."""
    like, same = _like_bf16(family), {"reference": f"{family}/bf16", "bound": REPEATED[device]}
    folder, drawn = f"cache/{family}", ("--cache-variants", "4")
    fill = (
        VFUN, "cache", family, "--demo", "--device", device, "--num-processes", "1", "--cache", folder,
        "--max-train-steps", str(STEPS), *BF16_OPTION,
    )  # fmt: skip

    def row(name: str, proves: str, *options: str, **fields: Any) -> Row:
        return _trained(f"{family}/{name}", proves, family, device, *BF16_OPTION, *options, **fields)

    return [
        row("again", "the same run once more", **same),
        row("low-vram", "encoders that wait in host memory", "--low-vram", **same),
        row("inline", "encoders inside the run, of clips that repeat", *drawn),
        row(
            "cache", "a cache, filled before", "--cache", folder, before=(fill,),
            reference=f"{family}/inline", bound=REPEATED[device],
        ),
        row("workers", "decoding in processes beside the device", "--dataloader-num-workers", "2", **same),
        row("attention", "a backward pass that keeps attention", "--gradient-checkpointing", "attention", **same),
        row("selective", "selective checkpointing", "--gradient-checkpointing", "selective", **same),
        row(
            "ema-async", "a moving average, and checkpoints written beside the steps", "--use-ema",
            "--async-checkpoint", "--checkpointing-steps", "1", **same,
        ),
        row("compile", "compiled blocks", "--compile", needs=("compiler",), **like),
    ]  # fmt: skip


def _looked_at(family: str, device: str, strategy: str = "single") -> Row:
    """The rows that it trains on are those that it looks at too, so that the steps stay the same."""
    suffix = "" if strategy == "single" else f"-{strategy}"
    meta = f"vfun-demo/{family}/data/metadata.json"
    row = _trained(
        f"{family}/looked-at{suffix}", "held-out losses and videos before the steps change none; a video afterwards",
        family, device, *BF16_OPTION, "--strategy", strategy, "--validation-meta", meta, "--validation-steps", "100",
        "--validation-sampling-steps", "2", reference=f"{family}/{'bf16' if strategy == 'single' else strategy}",
        bound=REPEATED[device],
    )  # fmt: skip
    generate = (VFUN, "generate", f"{RUNS}/{row.name}", "--demo", "--device", device, "--output", f"videos/{row.name}")
    return replace(row, commands=(*row.commands, generate), says=("video-0",))


def _averaged(family: str, strategy: str, device: str) -> Row:
    """It takes the weights' place before and after every step."""
    return _trained(
        f"{family}/averaged-{strategy}", f"a moving average under {strategy} and looks by it change no step",
        family, device, *BF16_OPTION, "--strategy", strategy, "--use-ema", "--ema-decay", "0.5", "--validation-meta",
        f"vfun-demo/{family}/data/metadata.json", "--validation-steps", "1", "--no-validation-samples",
        needs=_packages(strategy), reference=f"{family}/{strategy}", bound=REPEATED[device],
    )  # fmt: skip


def _made_up(family: str, name: str, device: str, proves: str, command: str = "train", **fields: Any) -> Row:
    """Made-up clips in place of decoded ones, in float32 unless the options say otherwise; on a GPU no step but the
    first may wait for the device.
    """
    options: dict[str, Any] = fields.pop("options", {})
    clips: tuple[str, ...] = fields.pop("clips", ())
    given = {"device": device, "max_train_steps": STEPS, **options}
    return Row(
        name=f"{family}/{name}", proves=proves, after=f"{family}/{DEMO}", variables=NO_TF32,
        commands=((MADE_UP, family, command, f"{RUNS}/{family}/{name}", json.dumps(given), *clips),), **fields,
    )  # fmt: skip


def _steps(family: str, device: str) -> list[Row]:
    """The step itself."""
    reference = f"{family}/made-up-cpu"
    return [
        _made_up(family, "made-up-cpu", "cpu", "float32 on the CPU, of clips that no file holds"),
        _made_up(
            family, "made-up", device, "the step, encoders beside it, without a wait for the device",
            reference=reference, bound=FLOAT32,
        ),
    ]  # fmt: skip


def _in_turn(family: str, device: str) -> Row:
    """Every step has another clip, so a tensor that comes late or is used again too early shows."""
    return _made_up(
        family, "made-up-low-vram", device, "encoders beside the step give what those before it give",
        options={"low_vram": True}, reference=f"{family}/made-up", bound=min(FLOAT32, REPEATED[device]),
    )  # fmt: skip


def _offloaded(family: str, device: str, how: str) -> Row:
    """In float32, because of a demo's layers in bf16 too little is large enough to be moved."""
    return _made_up(
        family, "made-up-offload", device, "what layers save goes to the host and back, without a wait for the device",
        options={"gradient_checkpointing": how, "activation_offload": True}, reference=f"{family}/made-up",
        bound=min(FLOAT32, REPEATED[device]),
    )  # fmt: skip


def _without_waits(family: str, device: str) -> list[Row]:
    """Copies of weights in another type could wait, and so could their dequantisation; wrappers move what enters the
    model, too. What is used most comes first.
    """
    like: dict[str, Any] = {"reference": f"{family}/made-up", "bound": FLOAT32}
    lora: dict[str, Any] = {"command": "lora", "steps": (1,)}
    bf16 = {"mixed_precision": "bf16"}

    def row(name: str, what: str, **fields: Any) -> Row:
        return _made_up(family, f"made-up-{name}", device, f"no step waits for the device {what}", **fields)

    return [
        row("bf16", "in bf16", options=bf16, reference=f"{family}/made-up", bound=BF16),
        row(
            "lora-nf4", "under LoRA in bf16 on a base in nf4", options={**bf16, "base_precision": "nf4"},
            reference=f"{family}/made-up-bf16", bound=QUANTISED, needs=("cuda",), **lora,
        ),
        row("lora", "under LoRA", **lora, **like),
        row(
            "lora-stream", "under LoRA in bf16 while blocks come from host memory",
            options={**bf16, "stream_blocks": 0}, reference=f"{family}/made-up-bf16", bound=STRATEGY, **lora,
        ),
        row(
            "lora-nf4-stream", "while blocks in nf4 come from host memory", command="lora", needs=("cuda",),
            options={**bf16, "base_precision": "nf4", "stream_blocks": 0}, reference=f"{family}/made-up-lora-nf4",
            bound=REPEATED[device],
        ),
        *(row(strategy, f"under {strategy}", options={"strategy": strategy}, **like) for strategy in ("ddp", "fsdp")),
    ]  # fmt: skip


def _memory(family: str, device: str) -> Row:
    """Full and LoRA, each way of recomputation, at the released width on a GPU."""
    return Row(
        name=f"{family}/memory", proves="a step takes what was forecast of the device", after=f"{family}/{DEMO}",
        commands=((STEP_MEMORY, family, device),), losses=False, says_how_far_off=True, bound=FORECAST,
    )  # fmt: skip


def _out_of_memory(family: str, device: str) -> Row:
    """A clip for which no memory is left; last and alone, for the others would find none either."""
    side = {"video_sample_size": LARGE, "token_sample_size": LARGE, "enable_bucket": False, "max_restarts": 1}
    row = _made_up(
        family, "out-of-memory", device, f"out of memory is exit code {FitError.exit_code}, and no restart",
        options=side, clips=(str(LARGE),), losses=False, alone=True, exit_code=FitError.exit_code, says=("memory",),
        never_says=("restart 1 of 1",),
    )  # fmt: skip
    return replace(row, commands=tuple((SCARCE, device, *command) for command in row.commands))
