"""Templates to launch files, and the exact command that starts the training processes. Nothing is started here."""

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from vfun_cli import children
from vfun_cli.config import cluster
from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.families.spec import FamilySpec
from vfun_cli.run.rundir import RunDir
from vfun_cli.shipped import shipped

# torchrun answers signals by SIGTERM to the ranks and SIGKILL after 30 seconds, which no large checkpoint keeps to.
# At those that ask to save the launcher just ends, and the ranks notice and save in peace.
_VARIABLES = {"PYTHONUNBUFFERED": "1", "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGQUIT"}

WAITING: Mapping[str, str] = {"GOMP_SPINCOUNT": "10000"}
"""How OpenMP threads wait for each other: ten thousand looks, some dozen microseconds, and then asleep. On two cores a
step of Wan-S2V takes 1.45 times as long without any look; OpenMP's 300,000 take a twentieth off it where nothing else
runs, and make it 1.2 times as long beside a busy process for each core.
"""

ALLOCATION: Mapping[str, str] = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Clips of many sizes leave gaps in fixed segments of the device's memory. Under its newer name, PYTORCH_ALLOC_CONF,
torch 2.9 to 2.11 read it and did nothing (pytorch/pytorch#183387)."""

_UNLESS_STATED: Sequence[tuple[Collection[str], Mapping[str, str]]] = (
    (("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"), WAITING),
    (("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), ALLOCATION),
)
"""What ranks find in their environment where the user's has none of these names."""

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"

_LOOPBACK = "127.0.0.1"

_MEETS_WITHIN = f"timeout={12 * 3600}"
"""Seconds that machines wait for each other to start their ranks. The commands know better who has come and who still
checks rows or a checkpoint (``machines.COMES_WITHIN``); torchrun's own 10 minutes would end those."""


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """What a launch writes and runs."""

    files: dict[Path, str]
    argv: list[str]
    interface: str | None = None
    """By which this machine reaches machine 0, as far as it was looked for."""

    @property
    def command(self) -> str:
        """The argv as a shell would take it, for people to read."""
        return shlex.join(self.argv)


def plan_launch(
    config: RunConfig, spec: FamilySpec, run: RunDir, run_json: Path, *, interface: str | None = None
) -> LaunchPlan:
    """Render the launch files of this machine.

    Args:
        interface: the network interface by which gloo finds the other machines; None where the user's variable says it.
    """
    folder = run.launch(config.machine_rank).absolute()
    accelerate_file = folder / "accelerate.yaml"
    deepspeed_file = folder / "deepspeed.json"
    strategy = STRATEGIES[config.strategy]
    values = _values(config, spec) | {"deepspeed_config_file": _yaml_text(str(deepspeed_file))}
    files = {accelerate_file: _render(strategy.launch_file, values)}
    if strategy.deepspeed_file is not None:
        files[deepspeed_file] = _render(strategy.deepspeed_file, values)
    meeting, variables = _meeting(config, interface, os.environ)
    argv = children.command(
        "vfun_cli.training.launcher",
        "--config_file",
        str(accelerate_file),
        *meeting,  # accelerate heeds no such lines of its file
        "-m",
        "vfun_cli.training",
        str(run_json.absolute()),
        # accelerate's DeepSpeed launcher lets the ranks import from the folder that it is started in.
        directory=shipped("templates") / "accelerate",
        variables=_VARIABLES | _unless_stated(os.environ) | variables,
    )
    return LaunchPlan(files=files, argv=argv, interface=interface)


def _unless_stated(environ: Mapping[str, str]) -> dict[str, str]:
    """How the work is done, which is the user's to decide."""
    left = (variables for names, variables in _UNLESS_STATED if environ.keys().isdisjoint(names))
    return {name: value for variables in left for name, value in variables.items()}


def _meeting(config: RunConfig, interface: str | None, environ: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Where ranks listen: at the meeting place, and for the exchange of tensors on a CPU. As arguments, and variables.

    Those that have no other machine to hear from listen on the loopback address, by default at a free port.
    """
    if config.num_machines == 1:
        where = {"PET_RDZV_ENDPOINT": f"{_LOOPBACK}:{config.main_process_port or 0}", GLOO_INTERFACE: "lo"}
        return ["--rdzv_backend", "loopback"], where
    variables = {} if interface is None else {GLOO_INTERFACE: interface}
    if not cluster.launcher_listens(environ):
        return ["--rdzv_conf", _MEETS_WITHIN], variables
    variables["PET_RDZV_ENDPOINT"] = f"{config.main_process_ip}:{config.main_process_port}"
    variables["PET_RDZV_ID"] = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    conf = f"rank={config.machine_rank},{_MEETS_WITHIN}"
    # Without --same_network accelerate would have an endpoint of its own.
    return ["--rdzv_backend", "beside-store", "--rdzv_conf", conf, "--same_network"], variables


def _meets_elsewhere(config: RunConfig, environ: Mapping[str, str]) -> bool:
    """Whether PET_RDZV_ENDPOINT says where the ranks meet, instead of accelerate's file."""
    return config.num_machines == 1 or cluster.launcher_listens(environ)


def _values(config: RunConfig, spec: FamilySpec) -> dict[str, Any]:
    return {
        "bf16": _json_bool(config.bf16),
        "use_cpu": _json_bool(config.device == "cpu"),
        "pin_memory": _json_bool(config.device == "cuda"),
        "num_machines": config.num_machines,
        "num_processes": config.num_processes,
        "machine_rank": config.machine_rank,
        "main_process_ip": _yaml_text(config.main_process_ip),
        # Where PET_RDZV_ENDPOINT says it, 0 keeps accelerate from looking whether that port is free.
        "main_process_port": 0 if _meets_elsewhere(config, os.environ) else config.main_process_port,
        "gathered_classes": ",".join(spec.model.gathered_classes),
        "train_batch_size": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "max_grad_norm": config.max_grad_norm,
    }


def _render(template: str, values: dict[str, Any]) -> str:
    return Template((shipped("templates") / template).read_text(encoding="utf-8")).substitute(values)


def _json_bool(value: bool) -> str:
    return "true" if value else "false"


def _yaml_text(value: str) -> str:
    """Escaped for a double-quoted YAML string."""
    return value.replace("\\", "\\\\").replace('"', '\\"')
