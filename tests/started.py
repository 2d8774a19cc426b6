"""The ways in which the commands of a job are started, and the variables that each leaves in their environment."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which machine of a job this is, and where they meet."""

    machines: int
    machine: int
    each: int
    """Processes of a machine."""
    address: str = "127.0.0.1"
    port: int = 29_500
    local_rank: int = 0
    """Of a process that was started as one of its machine's."""


def exports(at: Place) -> dict[str, str]:
    """What the documents of the original scripts say, and PAI-DLC sets but for the processes."""
    return {
        "MASTER_ADDR": at.address, "MASTER_PORT": str(at.port), "WORLD_SIZE": str(at.machines), "RANK": str(at.machine),
        "NUM_PROCESS": str(at.machines * at.each),
    }  # fmt: skip


def operator(at: Place) -> dict[str, str]:
    """Kubernetes' Trainer, which tells torchrun."""
    return {
        "PET_NNODES": str(at.machines), "PET_NODE_RANK": str(at.machine), "PET_NPROC_PER_NODE": str(at.each),
        "PET_MASTER_ADDR": at.address, "PET_MASTER_PORT": str(at.port),
    }  # fmt: skip


def pytorchjob(at: Place) -> dict[str, str]:
    """A PyTorchJob's pods: WORLD_SIZE counts processes, RANK pods."""
    return {
        **operator(at), "MASTER_ADDR": at.address, "MASTER_PORT": str(at.port),
        "WORLD_SIZE": str(at.machines * at.each), "RANK": str(at.machine),
    }  # fmt: skip


def rendezvous(at: Place) -> dict[str, str]:
    """torchrun's other words for a meeting place."""
    return {
        "PET_NNODES": f"{at.machines}:{at.machines}", "PET_NODE_RANK": str(at.machine),
        "PET_NPROC_PER_NODE": str(at.each), "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"{at.address}:{at.port}",
    }  # fmt: skip


def rank(at: Place) -> dict[str, str]:
    """One of the processes that torchrun or accelerate starts."""
    return {
        "MASTER_ADDR": at.address, "MASTER_PORT": str(at.port), "LOCAL_RANK": str(at.local_rank),
        "LOCAL_WORLD_SIZE": str(at.each), "RANK": str(at.machine * at.each + at.local_rank),
        "WORLD_SIZE": str(at.machines * at.each), "GROUP_RANK": str(at.machine), "GROUP_WORLD_SIZE": str(at.machines),
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


def step(at: Place, tasks: int = 1) -> dict[str, str]:
    """A task that ``srun`` starts; one a machine, unless told otherwise."""
    others = f",{at.address}-[2-{at.machines}]" if at.machines > 1 else ""
    return {
        "SLURM_JOB_ID": str(at.port - 20_000 + 40_000), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": str(at.machines),
        "SLURM_NNODES": str(at.machines), "SLURM_NODEID": str(at.machine), "SLURM_LOCALID": str(at.local_rank),
        "SLURM_PROCID": str(at.machine * tasks + at.local_rank), "SLURM_NTASKS": str(at.machines * tasks),
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x{at.machines})" if at.machines > 1 else str(tasks),
        "SLURM_STEP_NODELIST": at.address + others, "SLURM_GPUS_ON_NODE": str(at.each),
    }  # fmt: skip


def tasks(at: Place) -> dict[str, str]:
    """A task that ``srun`` starts for each process."""
    return step(at, at.each)


def skypilot(at: Place) -> dict[str, str]:
    """SkyPilot's; it says no port."""
    addresses = [at.address, *(f"10.9.9.{each}" for each in range(1, at.machines))]
    return {
        "SKYPILOT_NUM_NODES": str(at.machines), "SKYPILOT_NODE_RANK": str(at.machine),
        "SKYPILOT_NODE_IPS": "\n".join(addresses), "SKYPILOT_NUM_GPUS_PER_NODE": str(at.each),
    }  # fmt: skip


def mpirun(at: Place) -> dict[str, str]:
    """A process that ``mpirun`` starts for each; the address is the user's to say."""
    return {
        "OMPI_COMM_WORLD_SIZE": str(at.machines * at.each), "OMPI_COMM_WORLD_LOCAL_SIZE": str(at.each),
        "OMPI_COMM_WORLD_RANK": str(at.machine * at.each + at.local_rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(at.local_rank), "MASTER_ADDR": at.address, "MASTER_PORT": str(at.port),
    }  # fmt: skip


WAYS: Mapping[str, Callable[[Place], dict[str, str]]] = {
    way.__name__: way
    for way in (exports, operator, pytorchjob, rendezvous, rank, step, tasks, skypilot, mpirun)
}  # fmt: skip
