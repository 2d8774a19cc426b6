"""What starts the training script: which command of a script it is, and what its own options mean to vfun."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from vfun_cli.errors import ConfigError
from vfun_cli.files import open_bounded
from vfun_cli.scripts.flags import Typed, full_name
from vfun_cli.scripts.rows import Outcome, Row
from vfun_cli.scripts.shell import Command, Script, Word

LARGEST_JSON = 1 << 20
"""Bytes of a DeepSpeed file: the originals' have a thousandth of it."""

PYTHON = re.compile(r"(python|python3)(\.\d+)?")
MODULES = {
    "torch.distributed.launch": "torchrun",
    "torch.distributed.run": "torchrun",
    "accelerate.commands.launch": "accelerate launch",
}
"""What ``python -m`` starts that starts others."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A command that trains."""

    command: Command
    program: str
    """``accelerate launch``, ``torchrun``, ``deepspeed`` or ``python``."""
    before: tuple[Word, ...]
    """Words in front of it: ``nohup``."""
    options: tuple[Word, ...]
    """Its own."""
    script: Word
    arguments: tuple[Word, ...]
    """Those of the script."""

    @property
    def line(self) -> int:
        """Where it begins."""
        return self.command.line

    def __str__(self) -> str:
        return f"line {self.line}: {self.program} {self.script.text}"


def launches(script: Script) -> list[Launch]:
    """The commands that train, outside of what is not read."""
    found = (_launch(command) for command in script.commands if command.inside is None)
    return [launch for launch in found if launch is not None]


def hidden_launches(script: Script) -> list[tuple[Launch, str]]:
    """Those inside of a loop, a condition or a function, each with what it is inside of."""
    found = ((_launch(command), command.inside) for command in script.commands if command.inside is not None)
    return [(launch, inside) for launch, inside in found if launch is not None and inside is not None]


def _launch(command: Command) -> Launch | None:
    texts = [word.text for word in command.words]
    for position, text in enumerate(texts):
        program, start = _program(text, texts, position)
        if program is None:
            continue
        for at in range(start, len(texts)):
            path = PurePosixPath(texts[at])
            if path.suffix == ".py" and path.name.startswith("train"):
                return Launch(
                    command=command,
                    program=program,
                    before=command.words[:position],
                    options=command.words[start:at],
                    script=command.words[at],
                    arguments=command.words[at + 1 :],
                )
        return None
    return None


def _program(text: str, texts: Sequence[str], position: int) -> tuple[str | None, int]:
    """What starts here, and where its options begin."""
    name, after = PurePosixPath(text).name, texts[position + 1 : position + 2]
    if name == "accelerate" and after == ["launch"]:
        return "accelerate launch", position + 2
    if name in ("torchrun", "deepspeed"):
        return name, position + 1
    if PYTHON.fullmatch(name):
        for at in range(position + 1, len(texts) - 1):
            if texts[at] == "-m":
                return MODULES.get(texts[at + 1]), at + 2
            if not texts[at].startswith("-"):
                break
        return "python", position + 1
    return None, position


# What the options mean ------------------------------------------------------------------------------------------------

DIRECT: Mapping[str, str] = {
    "mixed_precision": "mixed_precision",
    "num_processes": "num_processes",
    "num_machines": "num_machines",
    "machine_rank": "machine_rank",
    "main_process_ip": "main_process_ip",
    "main_process_port": "main_process_port",
    "nnodes": "num_machines",
    "node_rank": "machine_rank",
    "master_addr": "main_process_ip",
    "master_port": "main_process_port",
    "num_nodes": "num_machines",
}
"""Options of launchers that are options of a run."""

PROGRAMS: Mapping[str, str] = {"torchrun": "ddp", "deepspeed": "zero2"}
"""What starts a training and with it chooses a strategy, where no option does."""

OWN_FILE = "vfun writes the launcher's file itself"
CLASSES = "the classes to wrap come from the model"
IDLE: Mapping[str, str] = {
    "fsdp_auto_wrap_policy": CLASSES,
    "fsdp_transformer_layer_cls_to_wrap": CLASSES,
    "fsdp_min_num_params": CLASSES,
    "fsdp_state_dict_type": "checkpoints are sharded, and resume under every strategy",
    "fsdp_cpu_ram_efficient_loading": "weights go from the mapped files to where they live",
    "fsdp_sync_module_states": "weights go from the mapped files to where they live",
    "fsdp_use_orig_params": "FSDP2 always keeps the parameters",
    "fsdp_version": "always FSDP2",
    "fsdp_activation_checkpointing": "--gradient-checkpointing says it",
    "fsdp_forward_prefetch": "--fsdp-prefetch says it",
    "fsdp_backward_prefetch": "FSDP2 always gathers ahead in the backward pass; --fsdp-prefetch says how far",
    "zero3_init_flag": "weights go from the mapped files to their shards",
    "zero3_save_16bit_model": "export-bf16 writes whole weights from any strategy",
    "deepspeed_multinode_launcher": "vfun train is started on each machine",
    "deepspeed_moe_layer_cls_names": "no family has such layers",
    "rdzv_backend": "the machines meet at --main-process-ip and --main-process-port",
    "same_network": OWN_FILE,
    "multi_gpu": "several processes say it",
    "num_cpu_threads_per_process": "the ranks of a machine share its cores",
    "gradient_accumulation_steps": "the script's own option says it",
    "gradient_clipping": "--max-grad-norm says it, under every strategy",
    "main_training_function": OWN_FILE,
    "downcast_bf16": "it is about TPUs",
    "use_env": "always so",
    "dynamo_use_dynamic": "--compile says it",
    "dynamo_mode": "--compile says it",
    "log_dir": "logs lie in the run directory",
    "max_restarts": "vfun's own --max-restarts resumes from a checkpoint",
    "monitor_interval": OWN_FILE,
    "quiet": OWN_FILE,
}
"""Options of launchers that vfun needs nothing of, and why."""

SWITCHES = ("use_fsdp", "use_deepspeed", "multi_gpu", "cpu", "use_env", "quiet", "use_cpu", "standalone", "no_python")
DECIDING = (
    "use_fsdp", "use_deepspeed", "zero_stage", "deepspeed_config_file", "offload_optimizer_device",
    "offload_param_device", "fsdp_sharding_strategy", "fsdp_reshard_after_forward", "fsdp_offload_params",
    "gpu_ids", "include", "num_gpus", "nproc_per_node", "cpu", "use_cpu", "config_file", "dynamo_backend",
)  # fmt: skip
"""Those of which this module decides by their values."""

KNOWN = frozenset((*DIRECT, *IDLE, *SWITCHES, *DECIDING))


@dataclass(kw_only=True)
class Placement:
    """What the launcher's options say of a run."""

    options: dict[str, Typed] = field(default_factory=dict)
    """By the run's option: the flag that says it."""
    strategy: str | None = None
    visible: Word | None = None
    """The devices that are used, for ``CUDA_VISIBLE_DEVICES``."""
    per_machine: Typed | None = None
    """Processes of each machine."""
    rows: list[Row] = field(default_factory=list)
    mentioned: dict[str, str] = field(default_factory=dict)
    """Every option that was typed, with its value."""

    def tell(self, outcome: Outcome, typed: Typed, words: str) -> None:
        """Note what becomes of an option."""
        self.rows.append(Row(outcome=outcome, line=typed.line, original=typed.shown, vfun=words))


def placement(launch: Launch, folders: Sequence[Path]) -> Placement:
    """What the launcher's options become.

    Args:
        folders: where a DeepSpeed file may lie that the script names.

    Raises:
        ConfigError: a DeepSpeed file that is there cannot be read.
    """
    found = Placement()
    typed = {flag.name: flag for flag in _options(launch)}
    found.mentioned = {name: flag.text for name, flag in typed.items()}
    for name, flag in typed.items():
        if name in DIRECT:
            found.options[DIRECT[name]] = flag
        elif name in IDLE:
            found.tell("without effect", flag, IDLE[name])
        elif name not in KNOWN:
            found.tell("differs", flag, f"{launch.program} knows no such option, as far as vfun knows; left out")
    _decide(found, typed, launch, folders)
    return found


def _options(launch: Launch) -> Iterator[Typed]:
    """Its options; what vfun does not know takes the next word if that is none."""
    words, position = launch.options, 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.text.startswith("-"):
            continue  # of an option that takes several, or of python
        spelled, equals, _ = word.text.partition("=")
        plain = spelled.lstrip("-").replace("-", "_")
        name = full_name(plain, KNOWN) or plain
        values: tuple[Word, ...] = (word.after(len(spelled) + 1),) if equals else ()
        takes = not equals and name not in SWITCHES and launch.program != "python"
        if takes and position < len(words) and not words[position].text.startswith("-"):
            values = (words[position],)
            position += 1
        yield Typed(name=name, spelled=spelled, line=word.line, values=values)


def _decide(found: Placement, typed: Mapping[str, Typed], launch: Launch, folders: Sequence[Path]) -> None:
    if flag := typed.get("use_deepspeed") or (typed.get("deepspeed_config_file")):
        found.strategy = _deepspeed(found, typed, folders)
        found.tell("translated", flag, f"--{found.strategy}")
    elif flag := typed.get("use_fsdp"):
        found.strategy = _fsdp(found, typed)
        found.tell("translated", flag, f"--{found.strategy}")
    elif launch.program == "python":
        found.strategy = "single"
        line = launch.line
        found.rows.append(
            Row(outcome="translated", line=line, original="started by python alone", vfun="--strategy single")
        )
    elif launch.program in PROGRAMS:
        found.strategy = PROGRAMS[launch.program]
        words = f"--{found.strategy}"
        found.rows.append(Row(outcome="translated", line=launch.line, original=launch.program, vfun=words))
    for name in ("cpu", "use_cpu"):
        if name in typed:
            found.options["device"] = typed[name]
    for name in ("nproc_per_node", "num_gpus"):
        if name in typed:
            found.per_machine = typed[name]
    if flag := typed.get("gpu_ids"):
        if flag.text == "all":
            found.tell("without effect", flag, "all devices are used anyway")
        else:
            found.visible = flag.values[0]
            found.tell("translated", flag, "CUDA_VISIBLE_DEVICES in front of the command")
    if flag := typed.get("include"):
        devices = re.fullmatch(r"localhost:([\d,]+)", flag.text)
        if devices:
            found.visible = flag.values[0].after(len("localhost:"))
            found.tell("translated", flag, "CUDA_VISIBLE_DEVICES in front of the command")
        else:
            found.tell("differs", flag, "not read: start vfun on each machine, with --num-machines and --machine-rank")
    if flag := typed.get("config_file"):
        found.tell(
            "differs", flag, "accelerate's file is not read: add the strategy that it chooses (--fsdp, --zero2, ...)"
        )
    if flag := typed.get("dynamo_backend"):
        if flag.text.lower() == "no":
            found.tell("without effect", flag, "nothing is compiled without --compile")
        else:
            found.tell("differs", flag, "compiles the whole model; add --compile, which compiles its blocks")


def _fsdp(found: Placement, typed: Mapping[str, Typed]) -> str:
    strategy = "fsdp"
    if flag := typed.get("fsdp_sharding_strategy") or typed.get("fsdp_reshard_after_forward"):
        if flag.text.upper() in ("FULL_SHARD", "1", "TRUE"):
            found.tell("kept", flag, "what --fsdp does")
        elif flag.text.upper() in ("NO_SHARD", "3"):
            found.tell("translated", flag, "--ddp: nothing is sharded")
            strategy = "ddp"
        else:
            found.tell("differs", flag, "weights are sharded over all ranks, and gathered for each block")
    if flag := typed.get("fsdp_offload_params"):
        if flag.text.lower() == "true":
            found.tell("differs", flag, "--fsdp keeps everything on the devices; --zero3-offload moves it to the host")
        else:
            found.tell("without effect", flag, "--fsdp keeps everything on the devices")
    return strategy


def _deepspeed(found: Placement, typed: Mapping[str, Typed], folders: Sequence[Path]) -> str:
    """The strategy that the options and, if it is there, DeepSpeed's file ask for."""
    stage, offloads = None, False
    config = typed.get("deepspeed_config_file")
    if config is not None:
        path, content = _deepspeed_file(config, folders)
        if content is not None:
            zero = content.get("zero_optimization")
            zero = zero if isinstance(zero, dict) else {}
            stage, offloads = zero.get("stage", 0), _offloads(zero)
            found.tell("translated", config, f"{path}: stage {stage}{', offloads' * offloads}; its other keys are not")
        elif named := re.search(r"stage_?(\d)", config.text):
            stage = int(typed["zero_stage"].text) if _digits(typed.get("zero_stage")) else int(named[1])
            offloads = "offload" in config.text
            found.tell("translated", config, f"stage {stage}, by its name: the file is not here")
        else:
            found.tell("differs", config, "the file is not here, and its name does not tell the stage")
    if flag := typed.get("zero_stage"):
        if stage is None and _digits(flag):
            stage = int(flag.text)
        found.tell("translated", flag, "the strategy")
    for name in ("offload_optimizer_device", "offload_param_device"):
        if flag := typed.get(name):
            offloads = offloads or flag.text.lower() in ("cpu", "nvme")
            found.tell("translated" if offloads else "without effect", flag, "the strategy")
    strategy = _ZERO.get((stage if stage is not None else 2, offloads))
    if strategy is None:
        nearest = "zero3-offload" if offloads else "zero2"
        found.rows.append(
            Row(
                outcome="differs",
                line=config.line if config else None,
                original=f"ZeRO stage {stage}{' with offload' * offloads}",
                vfun=f"--{nearest}: the nearest that there is",
            )
        )
        return nearest
    return strategy


_ZERO: Mapping[tuple[Any, bool], str] = {
    (0, False): "ddp",
    (2, False): "zero2",
    (3, False): "zero3",
    (3, True): "zero3-offload",
}
"""By stage, and whether anything waits in the host's memory."""


def _digits(flag: Typed | None) -> bool:
    return flag is not None and flag.text.isdecimal()


def _offloads(zero: Mapping[str, Any]) -> bool:
    parts = (zero.get(name) for name in ("offload_optimizer", "offload_param"))
    return any(isinstance(part, dict) and part.get("device", "none") != "none" for part in parts)


def _deepspeed_file(flag: Typed, folders: Sequence[Path]) -> tuple[Path | None, dict[str, Any] | None]:
    """The file, and what it says; None where it is not."""
    for folder in folders if flag.settled else ():
        path = folder / flag.text
        try:
            with open_bounded(path, LARGEST_JSON) as file:
                content = json.loads(file.read())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"line {flag.line}: {path} cannot be read as DeepSpeed's file: {why}.",
                hint="Correct it, or move it away: then its name tells the stage.",
            ) from None
        if not isinstance(content, dict):
            raise ConfigError(f"line {flag.line}: {path} holds no JSON object.", hint="Correct it.")
        return path, content
    return None, None
