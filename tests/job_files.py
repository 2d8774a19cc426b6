"""What a scheduler's own validator would say of the files of ``--emit``: which fields there are, and what they take."""

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

Shape = Any
"""A type, a pattern of a text, a value itself, [a shape] of a list's entries, or {name: shape}, where ``name!`` must be
there and ``*`` stands for any name."""


def faults(value: Any, shape: Shape, at: str = "") -> Iterator[str]:
    """Where a value is not of a shape."""
    if isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            yield f"{at} is {value!r}, not a mapping"
            return
        known = {name.rstrip("!"): inner for name, inner in shape.items()}
        yield from (f"{at}: no {name[:-1]}" for name in shape if name.endswith("!") and name[:-1] not in value)
        for name, inner in value.items():
            if name not in known and "*" not in known:
                yield f"{at}.{name}: there is no such field"
            else:
                yield from faults(inner, known.get(name, known.get("*")), f"{at}.{name}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{at} is {value!r}, not a list"
            return
        for place, inner in enumerate(value):
            yield from faults(inner, shape[0], f"{at}[{place}]")
    elif isinstance(shape, re.Pattern):
        if not isinstance(value, str) or not shape.fullmatch(value):
            yield f"{at} is {value!r}, not {shape.pattern}"
    elif isinstance(shape, type):
        if type(value) is not shape:
            yield f"{at} is {value!r}, no {shape.__name__}"
    elif value != shape:
        yield f"{at} is {value!r}, not {shape!r}"


# sbatch -------------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"[1-9]\d*")
SIGNALS = "|".join(each.name.removeprefix("SIG") for each in signal.Signals)

SBATCH: Mapping[str, re.Pattern[str] | None] = {
    "job-name": re.compile(r"[\w.-]{1,200}"),
    "nodes": re.compile(r"[1-9]\d*(-\d+)?"),
    "ntasks-per-node": NUMBER,
    "gpus-per-node": re.compile(r"(\w+:)?\d+"),
    "cpus-per-task": NUMBER,
    "time": re.compile(r"(\d+-)?\d+:[0-5]\d:[0-5]\d"),
    "signal": re.compile(rf"(R?B?:)?({SIGNALS})(@\d{{1,5}})?"),
    "requeue": None,
    "open-mode": re.compile(r"append|truncate"),
    "output": re.compile(r"([^%\s]|%[AaJjNnstuxb])+"),
    "partition": re.compile(r"\S+"),
    "account": re.compile(r"\S+"),
}
"""Long options that a script may give, and what each takes; None: nothing."""


def directives(script: str) -> dict[str, str | None]:
    """The options of a script's ``#SBATCH`` lines; those after the first command are none, and count as faults."""
    lines = script.splitlines()
    assert lines[0].startswith("#!"), "sbatch: This does not look like a batch script."
    first_command = next(place for place, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    found: dict[str, str | None] = {}
    for place, line in enumerate(lines):
        if not line.startswith("#SBATCH"):
            continue
        assert place < first_command, f"sbatch does not read {line!r}: a command stands before it"
        name, equals, value = line.removeprefix("#SBATCH --").partition("=")
        assert name not in found, f"twice: {line}"
        found[name] = value if equals else None
    return found


def faults_of_sbatch(script: str) -> Iterator[str]:
    """What ``sbatch --test-only`` and bash would not take."""
    for name, value in directives(script).items():
        if name not in SBATCH:
            yield f"sbatch: unrecognized option '--{name}'"
        elif (pattern := SBATCH[name]) is None:
            yield from [] if value is None else [f"sbatch: option '--{name}' doesn't allow an argument"]
        elif value is None or not pattern.fullmatch(value):
            yield f"sbatch: invalid value of --{name}: {value}"
    yield from faults_of_bash(script)


def faults_of_bash(script: str) -> Iterator[str]:
    """What bash and, where it is installed, shellcheck find in a script."""
    checks = [["bash", "-n"]]
    if shutil.which("shellcheck") is not None:
        checks.append(["shellcheck", "--severity=warning", "-"])
    for check in checks:
        said = subprocess.run(check, input=script, capture_output=True, text=True, check=False)
        if said.returncode:
            yield f"{check[0]}: {said.stdout}{said.stderr}"


# A PyTorchJob of kubeflow.org/v1 ------------------------------------------------------------------------------------

LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
"""A name of DNS, which a service's name must be."""
QUANTITY = re.compile(r"\d+(\.\d+)?([KMGTPE]i?)?")

CONTAINER: Shape = {
    "name!": LABEL,
    "image!": str,
    "command": [str],
    "args": [str],
    "workingDir": str,
    "env": [{"name!": str, "value": str}],
    "ports": [{"name": re.compile(r"[a-z0-9-]{1,15}"), "containerPort!": int, "protocol": str}],
    "resources": {"limits": {"*": int}, "requests": {"*": int}},
    "volumeMounts": [{"name!": LABEL, "mountPath!": str, "readOnly": bool, "subPath": str}],
}
REPLICA: Shape = {
    "replicas!": int,
    "restartPolicy!": re.compile("Always|OnFailure|Never|ExitCode"),
    "template!": {
        "metadata": {"labels": {"*": str}, "annotations": {"*": str}},
        "spec!": {
            "containers!": [CONTAINER],
            "terminationGracePeriodSeconds": int,
            "nodeSelector": {"*": str},
            "volumes": [
                {
                    "name!": LABEL,
                    "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
                    "emptyDir": {"medium": "Memory", "sizeLimit": QUANTITY},
                }
            ],
        },
    },
}
PYTORCHJOB: Shape = {
    "apiVersion!": "kubeflow.org/v1",
    "kind!": "PyTorchJob",
    "metadata!": {"name!": LABEL, "namespace": LABEL, "labels": {"*": str}, "annotations": {"*": str}},
    "spec!": {
        "nprocPerNode": re.compile(r"auto|cpu|gpu|[1-9]\d*"),
        "runPolicy": {
            "cleanPodPolicy": re.compile("All|Running|None"),
            "backoffLimit": int,
            "activeDeadlineSeconds": int,
            "ttlSecondsAfterFinished": int,
            "suspend": bool,
        },
        "pytorchReplicaSpecs!": {"Master!": REPLICA, "Worker": REPLICA},
    },
}

MASTER_SUFFIX = "-master-0"
"""Of the service by which the others find the first machine."""


def faults_of_pytorchjob(text: str) -> Iterator[str]:
    """What the operator and Kubernetes would not take."""
    job = _one_document(text)
    yield from faults(job, PYTORCHJOB)
    if not LABEL.fullmatch(job["metadata"]["name"] + MASTER_SUFFIX):
        yield "the name is too long for the pods' services"
    for kind, replica in job["spec"]["pytorchReplicaSpecs"].items():
        pod = replica["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        if mounted != {volume["name"] for volume in pod.get("volumes", [])}:
            yield f"{kind}: volumes and mounts differ"
        if [container["name"] for container in pod["containers"]] != ["pytorch"]:
            yield f"{kind}: the operator looks for a container named pytorch"
        if replica["replicas"] < 1 or (kind == "Master" and replica["replicas"] != 1):
            yield f"{kind}: {replica['replicas']} replicas"


# A task of SkyPilot -------------------------------------------------------------------------------------------------

EXIT_CODES = int
SKYPILOT: Shape = {
    "name": LABEL,
    "num_nodes": int,
    "envs": {"*": str},
    "file_mounts": {"*": str},
    "volumes": {"*": str},
    "setup": str,
    "run!": str,
    "resources": {
        "accelerators": str,
        "cpus": re.compile(r"\d+\+?"),
        "memory": re.compile(r"\d+\+?"),
        "infra": str,
        "image_id": re.compile(r"docker:.+"),
        "use_spot": bool,
        "ports": str,
        "job_recovery": {
            "strategy": re.compile("FAILOVER|EAGER_NEXT_REGION"),
            "max_restarts_on_errors": int,
            "recover_on_exit_codes": [EXIT_CODES],
        },
    },
}


def faults_of_skypilot(text: str) -> Iterator[str]:
    """What ``sky jobs launch`` would not take."""
    task = _one_document(text)
    yield from faults(task, SKYPILOT)
    yield from faults_of_bash(f"#!/bin/bash\n{task.get('run', '')}")


class _Strict(yaml.SafeLoader):
    """Refuses what kubectl refuses: a name twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        assert len(names) == len(set(names)), f"a name stands twice in {names}"
        return super().construct_mapping(node, deep)


def _one_document(text: str) -> Any:
    return yaml.load(text, _Strict)


FAULTS_OF = {
    "slurm": faults_of_sbatch,
    "kubernetes": faults_of_pytorchjob,
    "skypilot": faults_of_skypilot,
    "torchrun": faults_of_bash,
}
"""By the word that --emit takes."""
