"""``--emit``: the file that starts a job on all machines is one that its scheduler takes, and says what was typed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.commands.conftest import Vfun, digest
from tests.job_files import FAULTS_OF, directives
from tests.schedulers import ONE_RANK, container_of, started_by, without_image
from tests.started import Place, step
from vfun_cli import families
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import ConfigError
from vfun_cli.launch import emit
from vfun_cli.launch.emit import ENGINES, Emitted, Wishes, emitted, file_of
from vfun_cli.launch.job import Job, decide
from vfun_cli.run.messages import PREEMPTION_SIGNALS

COMMAND = ("lora", "cogvideox-fun", "--demo")
SMALL = ("--video-sample-size=64", "--token-sample-size=64", "--video-sample-n-frames=16")
"""What the demo's clips are large enough for."""
EXIT_CODES = (0, 1, 2, 6, 75, 130, 137)


@pytest.fixture
def emits(vfun: Vfun, place: Path) -> Callable[..., str]:
    """The file that a command prints."""

    def run(engine: str, *arguments: str) -> str:
        said = vfun(*COMMAND, "--emit", engine, *arguments)
        assert said.code == 0, said.err
        return said.out

    return run


@pytest.fixture(scope="module")
def job(pristine: Path) -> Job:
    """A job of four machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(pristine)
        spec = families.find("cogvideox-fun")
        given = {"num_machines": 4, "fit_check": False}
        resolved = resolve("lora", spec, given, demo=demo_default.make(spec), environ={}, gpus_there=8)
        return decide("lora", spec, resolved, dry_run=True)


def of_engine(engine: str, job: Job, **wishes: Any) -> Emitted:
    return emitted(job, Wishes(engine=engine, **wishes))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("machines", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_scheduler_takes_the_file(engine: str, machines: int, device: str, emits: Callable[..., str]) -> None:
    text = emits(engine, "--nodes", str(machines), "--device", device, "--no-fit-check")
    assert not list(FAULTS_OF[engine](text))
    assert started_by(engine, text)[:3] == ["vfun", "lora", "cogvideox-fun"]


def test_what_is_asked_of_slurm(emits: Callable[..., str]) -> None:
    text = emits("slurm", "--nodes=4", "--num-processes=32", "--device=cuda", "--no-fit-check", "--time-limit=12.5",
                 "--grace=120", "--dataloader-num-workers=3")  # fmt: skip
    asked = directives(text)
    assert asked["nodes"] == "4" and asked["ntasks-per-node"] == "1"
    assert asked["gpus-per-node"] == "8" and asked["cpus-per-task"] == "32"
    assert (asked["time"], asked["signal"]) == ("12:30:00", "TERM@120")
    assert {"requeue", "open-mode", "output"} <= asked.keys()
    assert float(option(started_by("slurm", text), "--max-hours")) == pytest.approx(12.5 - 240 / 3600, abs=0.01)


def test_what_is_asked_of_kubernetes(emits: Callable[..., str]) -> None:
    job = yaml.safe_load(emits("kubernetes", "--nodes=4", "--gpus-per-node=2", "--no-fit-check", "--grace=77"))["spec"]
    replicas = job["pytorchReplicaSpecs"]
    assert {kind: replica["replicas"] for kind, replica in replicas.items()} == {"Master": 1, "Worker": 3}
    assert job["nprocPerNode"] == "2"
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        assert replica["restartPolicy"] == "ExitCode" and pod["terminationGracePeriodSeconds"] == 77
        assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 2}
        shared_memory = next(
            mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == "/dev/shm"
        )
        volume = next(volume for volume in pod["volumes"] if volume["name"] == shared_memory["name"])
        assert volume["emptyDir"] == {"medium": "Memory"}


def test_one_machine_of_kubernetes_has_no_workers(emits: Callable[..., str]) -> None:
    job = yaml.safe_load(emits("kubernetes", "--no-fit-check"))
    assert [*job["spec"]["pytorchReplicaSpecs"]] == ["Master"]


def test_what_is_asked_of_skypilot(emits: Callable[..., str]) -> None:
    task = yaml.safe_load(emits("skypilot", "--nodes=3", "--num-processes=12", "--no-fit-check"))
    assert task["num_nodes"] == 3 and task["resources"]["accelerators"] == "<GPU>:4"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


def option(words: Sequence[str], name: str) -> str:
    return words[words.index(name) + 1]


# The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_the_command_is_the_users_own(engine: str, vfun: Vfun, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed, exported or written down, from wherever it is started; nothing of this machine."""
    (place / "a run").mkdir()
    model, data = (f"vfun-demo/cogvideox-fun/{part}" for part in ("model", "data"))
    (place / "vfun.toml").write_text(f'train_data_meta = "{data}/metadata.json"\nlearning_rate = 3e-5\n')
    monkeypatch.setenv("MODEL_NAME", model)
    said = vfun(
        "train", "cogvideox-fun", "--emit", engine, "--nodes=2", "--gpus-per-node=4", "--no-fit-check", "--zero3",
        "--output_dir", "a run/it's", "--no-low-vram", "--seed", "7", "--trainable_modules", "attn1", "ff", *SMALL,
    )  # fmt: skip
    assert said.code == 0, said.err
    words = started_by(engine, said.out)
    assert words[:3] == ["vfun", "train", "cogvideox-fun"]
    assert option(words, "--pretrained-model-name-or-path") == str(place / model)
    assert option(words, "--train-data-meta") == str(place / data / "metadata.json")
    assert option(words, "--output-dir") == str(place / "a run/it's")
    assert (option(words, "--seed"), float(option(words, "--learning-rate"))) == ("7", 3e-5)
    assert {"--zero3", "--no-low-vram", "--no-fit-check"} <= set(words)
    assert option(words, "--resume-from-checkpoint") == "latest"
    assert (option(words, "--num-machines"), option(words, "--num-processes")) == ("2", "8")
    assert not {"--machine-rank", "--main-process-ip", "--device", "--max-grad-norm", "--emit"} & set(words)


def test_a_path_that_nobody_said_is_where_the_command_was_typed(vfun: Vfun, place: Path) -> None:
    model, data = (f"vfun-demo/cogvideox-fun/{part}" for part in ("model", "data/metadata.json"))
    said = vfun("lora", "cogvideox-fun", "--emit=slurm", "--no-fit-check", "--pretrained-model-name-or-path", model,
                "--train-data-meta", data, *SMALL)  # fmt: skip
    assert option(started_by("slurm", said.out), "--output-dir") == str(place / "output_dir")


@pytest.mark.parametrize(
    ("engine", "typed"), [("slurm", True), ("skypilot", True), ("kubernetes", False), ("torchrun", False)]
)
def test_a_port_is_typed_where_no_variable_says_it(engine: str, typed: bool, emits: Callable[..., str]) -> None:
    """Beside torchrun, which listens there itself, a command of one machine would find the port taken."""
    text = emits(engine, "--no-fit-check", "--main-process-port=31234")
    assert "31234" in text
    assert ("--main-process-port" in started_by(engine, text)) == typed


def test_the_command_means_the_same_wherever_it_is_started(job: Job, tmp_path: Path) -> None:
    """Read again in another folder and without variables, its options are those that were decided."""
    made = of_engine("slurm", job, time_limit=3)
    typed = {name.replace("-", "_"): value for name, value in pairs(made.words[1:])}
    there = resolve("lora", job.spec, typed, environ={}, directory=tmp_path, gpus_there=8).config
    own = {"max_hours": 3 - 600 / 3600, "resume_from_checkpoint": "latest"}
    expected = {**job.config.absolute().to_json(), **own}
    found = there.to_json()
    assert found.pop("max_hours") == pytest.approx(expected.pop("max_hours"), abs=0.01)
    assert found == expected


def pairs(words: Sequence[Sequence[str]]) -> Any:
    for name, *value in words:
        no = name.startswith("--no-")
        yield name.removeprefix("--no-").removeprefix("--"), value[0] if value else not no


WORD = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufffe\uffff"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WORD, min_size=1, max_size=4))
@example(words=["$(hostname)", "$$HOME", "`id`", "a\\", "'", '"', "a b\n  c\td\n", "#", "<IMAGE>", "*", "", "~"])
@example(words=["é", "\U0001f600", "مي\u200cخواهم", "\ufeff", "$(RANK)", "${RANK}", "{{x}}", "!!x", "- a", "&a", "*m"])
def test_every_word_arrives_as_it_was_typed(engine: str, words: list[str], job: Job) -> None:
    made = replace(of_engine(engine, job), words=[["vfun", "lora"], *([word] for word in words)])
    assert started_by(engine, file_of(made)) == ["vfun", "lora", *words]


@pytest.mark.parametrize("sign", ["\r", "\x07", "\x85", "\u2028", "\udce9"])
def test_what_no_file_can_say_is_refused(sign: str, job: Job) -> None:
    config = replace(job.config, validation_prompts=(f"a{sign}b",))
    sources = {**job.resolved.sources, "validation_prompts": "option"}
    odd = replace(job, resolved=replace(job.resolved, config=config, sources=sources))
    with pytest.raises(ConfigError, match=r"^validation_prompts holds .* which a file of --emit cannot say\.$"):
        of_engine("slurm", odd)


# Time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "typed", "hours", "max_hours"),
    [
        ("slurm", (), 24, 24 - 1 / 6),
        ("slurm", ("--time-limit=2", "--grace=60"), 2, 2 - 1 / 30),
        ("slurm", ("--max-hours=3",), 3 + 1 / 6, 3),
        ("slurm", ("--max-hours=1", "--time-limit=4"), 4, 1),
        ("kubernetes", (), None, None),
        ("kubernetes", ("--time-limit=5",), 5, 5 - 1 / 6),
        ("skypilot", ("--max-hours=3",), None, 3),
    ],
)
def test_the_run_stops_before_the_job_is_ended(
    engine: str, typed: Sequence[str], hours: float | None, max_hours: float | None, emits: Callable[..., str]
) -> None:
    text = emits(engine, "--no-fit-check", *typed)
    words = started_by(engine, text)
    found = float(option(words, "--max-hours")) if "--max-hours" in words else None
    assert found == (max_hours and pytest.approx(max_hours, abs=0.01))
    if engine == "slurm":
        assert hours is not None and directives(text)["time"] == f"{int(hours)}:{round(60 * (hours % 1)):02}:00"


# What does not go together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--emit=slrum"], ["'slrum'", "'slurm'", "kubernetes"]),
        (["--emit=slurm", "--dry-run"], ["--dry-run", "Drop one"]),
        (["--emit=slurm", "--overwrite"], ["--overwrite", "delete"]),
        (["--emit=slurm", "--nodes=2", "--machine-rank=1"], ["machine_rank", "option", "Leave it out"]),
        (["--emit=slurm", "--nodes=2", "--main-process-ip=10.0.0.1"], ["main_process_ip"]),
        (["--emit=slurm", "--gpus-per-node=4", "--num-processes=16", "--nodes=2"], ["--gpus-per-node 4", "8 on each"]),
        (["--emit=slurm", "--gpus-per-node=4", "--device=cpu"], ["--gpus-per-node 4", "cpu"]),
        (["--emit=slurm", "--time-limit=0.1"], ["--time-limit 0.1", "--grace 300"]),
        (["--emit=slurm", "--time-limit=2", "--max-hours=2"], ["--time-limit 2", "1.83", "max_hours is 2"]),
        (["--emit=skypilot", "--grace=60"], ["--grace", "skypilot", "--time-limit"]),
        (["--emit=slurm", "--nodes=2", "--strategy=single"], ["single", "num_processes 2"]),
        (["--gpus-per-node=4"], ["--gpus-per-node", "Add --emit"]),
        (["--time-limit=4"], ["--time-limit", "Add --emit"]),
        (["--grace=4"], ["--grace", "Add --emit"]),
    ],
)
def test_what_makes_no_sense_together_is_said(
    arguments: Sequence[str], words: Sequence[str], vfun: Vfun, place: Path
) -> None:
    said = vfun(*COMMAND, "--no-fit-check", *arguments)
    assert (said.code, said.out) == (2, ""), said.err
    assert all(word in said.err for word in words), said.err


def test_a_job_that_always_begins_at_one_checkpoint_is_refused(job: Job) -> None:
    config = replace(job.config, resume_from_checkpoint="checkpoint-2")
    with pytest.raises(
        ConfigError, match=r"resume_from_checkpoint checkpoint-2: the job would go back there each time"
    ):
        emit.check(replace(job.resolved, config=config), Wishes(engine="slurm"))


def test_a_directory_that_holds_another_run_is_refused_before_the_job_waits_in_a_queue(
    vfun: Vfun, place: Path, never_trains: None
) -> None:
    """What the job will say when it starts is said now."""
    small = ("--device=cpu", "--strategy=single", "--nodes=1", "--max-train-steps=4", "--dataloader-num-workers=0")
    assert vfun(*COMMAND, *small).code == 0
    said = vfun(*COMMAND, *small, "--emit=slurm", "--learning-rate=0.5")
    assert said.code == 5 and "learning_rate" in said.err and not said.out
    said = vfun(*COMMAND, *small, "--emit=slurm", "--max-train-steps=8")
    assert said.code == 0 and "begins anew" not in said.err


def test_data_that_only_a_file_can_describe_are_refused(vfun: Vfun, place: Path) -> None:
    data = "vfun-demo/cogvideox-fun/data/metadata.json"
    (place / "vfun.toml").write_text(f'[[data]]\nmeta = "{data}"\ncaption_prefix = "in the style of b"\n')
    said = vfun("lora", "cogvideox-fun", "--emit=slurm", "--no-fit-check", *SMALL,
                "--pretrained-model-name-or-path=vfun-demo/cogvideox-fun/model")  # fmt: skip
    assert said.code == 2 and "[[data]]" in said.err and not said.out


def test_data_that_are_not_there_are_an_error_as_ever(vfun: Vfun, place: Path) -> None:
    said = vfun(*COMMAND, "--emit=slurm", "--no-fit-check", "--train-data-meta=missing.json")
    assert said.code == 3 and not said.out


# What is printed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_written_and_the_rest_is_said(engine: str, vfun: Vfun, place: Path) -> None:
    before = digest(place)
    said = vfun(*COMMAND, "--emit", engine, "--no-fit-check")
    assert digest(place) == before and not (place / "vfun-demo/output_dir").exists()
    assert "taken to have 8 GPUs" in " ".join(said.err.split())
    for placeholder in ENGINES[engine].fill_in:
        assert said.out.count(placeholder) >= 2, "at the head, and where it belongs"
        assert placeholder in said.err
    assert ENGINES[engine].submit in said.err and ENGINES[engine].submit in said.out


def test_the_file_for_programs(vfun: Vfun, place: Path) -> None:
    text = vfun(*COMMAND, "--emit=slurm", "--no-fit-check").out
    found = json.loads(vfun(*COMMAND, "--emit=slurm", "--no-fit-check", "--json").out)
    assert found["file"] == text
    assert set(found["fill_in"]) == {"<IMAGE>", "<MOUNTS>"} and found["submit"] == "sbatch job.sbatch"


def test_gpus_of_this_machine_are_those_of_the_job(vfun: Vfun, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfun_cli.devices.gpu_count", lambda: 3)
    said = vfun(*COMMAND, "--emit=slurm", "--no-fit-check", "--nodes=2")
    assert directives(said.out)["gpus-per-node"] == "3"
    assert option(started_by("slurm", said.out), "--num-processes") == "6"


def test_the_machines_of_this_commands_own_job_are_not_those_of_the_file(
    emits: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node that salloc has given."""
    before = emits("slurm", "--no-fit-check", "--nodes=4")
    for name, value in step(Place(machines=2, machine=1, each=3)).items():
        monkeypatch.setenv(name, value)
    assert emits("slurm", "--no-fit-check", "--nodes=4") == before


def test_nodes_are_machines(vfun: Vfun, place: Path) -> None:
    found = [
        json.loads(vfun(*COMMAND, "--dry-run", "--json", "--device=cpu", name, "2", "--main-process-port=29500").out)
        for name in ("--nodes", "--num-machines", "--num_machines")
    ]
    assert all(each["config"]["num_machines"] == 2 for each in found)


@pytest.mark.parametrize("command", ["train", "lora"])
def test_the_help_has_them(command: str, vfun: Vfun) -> None:
    said = vfun(command, "--help")
    assert all(flag in said.out for flag in ("--emit", "--nodes", "--gpus-per-node", "--time-limit", "--grace"))


@pytest.mark.slow
def test_a_demo_that_is_not_made_is_told_how_to_be(vfun: Vfun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = vfun("train", "wan-s2v", "--demo", "--emit=slurm", "--no-fit-check")
    assert said.code == 0 and not [*tmp_path.iterdir()]
    command = re.search(r"vfun (validate-meta .*--demo)", " ".join(said.err.split()))
    assert command is not None, said.err
    assert vfun(*shlex.split(command[1])).code == 0
    assert Path(option(started_by("slurm", said.out), "--pretrained-model-name-or-path")).is_dir()


# What the files do -------------------------------------------------------------------------------------------------


def test_a_script_whose_image_is_not_filled_in_ends_at_once(emits: Callable[..., str], tmp_path: Path) -> None:
    script = emits("slurm", "--no-fit-check")
    for text in (script, script.replace("IMAGE='<IMAGE>'", "IMAGE='vfun:1'")):
        said = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=False)
        assert said.returncode == 2 and "not filled in" in said.stderr


def test_an_image_that_is_filled_in_is_what_srun_gets(emits: Callable[..., str], tmp_path: Path) -> None:
    script = emits("slurm", "--no-fit-check").replace("<IMAGE>", "vfun:1").replace("<MOUNTS>", "/a:/a,/b c:/b c")
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "8"}
    said = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=True)
    assert {"--container-image=vfun:1", "--container-mounts=/a:/a,/b c:/b c", "--cpus-per-task=8"} <= {
        *said.stdout.splitlines()
    }


@pytest.mark.parametrize("code", EXIT_CODES)
def test_a_job_of_slurm_ends_with_the_runs_code_and_is_queued_again_after_75(
    code: int, emits: Callable[..., str], tmp_path: Path
) -> None:
    for tool, does in {"srun": f"exit {code}", "scontrol": 'echo "$@" > "$0.said"'}.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / tool).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    script = without_image(emits("slurm", "--no-fit-check"))
    assert subprocess.run(["bash"], input=script, env=environment, text=True, check=False).returncode == code
    asked = tmp_path / "scontrol.said"
    assert asked.exists() == (code == 75)
    assert code != 75 or asked.read_text() == "requeue 17\n"


@pytest.mark.parametrize("code", EXIT_CODES)
def test_a_pod_ends_so_that_the_operator_starts_it_again_after_75_alone(code: int, job: Job) -> None:
    made = replace(of_engine("kubernetes", job), words=[["sh", "-c", f"exit {code}"]])
    ended = subprocess.run(container_of(file_of(made), "Master"), check=False).returncode
    assert (ended >= 128) == (code == 75), "128 and above: it is made anew"
    assert ended == {75: 143, 130: 1, 137: 1}.get(code, code)


def test_a_pod_that_is_asked_to_stop_waits_until_its_command_has_saved(job: Job, tmp_path: Path) -> None:
    made = replace(of_engine("kubernetes", job), words=that_waits(tmp_path))
    assert asked_to_stop(container_of(file_of(made), "Worker"), signal.SIGTERM, dict(os.environ)) == (143, "saved\n")


@pytest.mark.parametrize("code", EXIT_CODES)
def test_a_script_for_torchrun_ends_with_the_runs_code(code: int, job: Job, tmp_path: Path) -> None:
    made = replace(of_engine("torchrun", job), words=[["sh", "-c", f"exit {code}"]])
    said = subprocess.run(["bash", "-c", file_of(made)], env=with_torchrun(tmp_path), check=False)
    assert said.returncode == code


@pytest.mark.parametrize("asks", [signal.SIGTERM, signal.SIGINT])
def test_a_script_for_torchrun_hands_a_request_on_to_the_run_alone(
    asks: signal.Signals, job: Job, tmp_path: Path
) -> None:
    made = replace(of_engine("torchrun", job), words=that_waits(tmp_path))
    assert asked_to_stop(["bash", "-c", file_of(made)], asks, with_torchrun(tmp_path)) == (75, "saved\n")


def that_waits(folder: Path) -> list[list[str]]:
    """A command that saves at SIGTERM."""
    (folder / "run.py").write_text(WAITS_FOR_SIGTERM)
    return [[sys.executable, str(folder / "run.py")]]


def asked_to_stop(command: Sequence[str], asks: signal.Signals, environment: Mapping[str, str]) -> tuple[int, str]:
    """How a command ends whose first process gets a signal, and what it says then."""
    started = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip
    try:
        assert started.stdout is not None and started.stdout.readline() == "works\n"
        started.send_signal(asks)
        said, _ = started.communicate(timeout=30)
        return started.returncode, said
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


WAITS_FOR_SIGTERM = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
signal.signal(signal.SIGTERM, signal.SIG_DFL)
print("works", flush=True)
signal.sigwait([signal.SIGTERM])
print("saved", flush=True)
raise SystemExit(75)
"""


def with_torchrun(folder: Path) -> dict[str, str]:
    """The environment of a machine on which torchrun starts one process, and ends with 1 if that fails."""
    (folder / "torchrun").write_text(f"{ONE_RANK.replace('exec ', '')}[ $? -eq 0 ] || exit 1\n")
    (folder / "torchrun").chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "NODE_RANK": "0", "MASTER_ADDR": "here"}


def test_a_script_for_torchrun_that_is_not_told_its_machine_ends_at_once(job: Job) -> None:
    script = file_of(of_engine("torchrun", job))
    for variables in ({}, {"NODE_RANK": "0"}, {"MASTER_ADDR": "10.0.0.1"}):
        said = subprocess.run(["bash", "-c", script], env=os.environ | variables, capture_output=True, text=True)
        assert said.returncode == 2 and "NODE_RANK" in said.stderr and "MASTER_ADDR" in said.stderr


def test_an_image_that_is_not_filled_in_is_none_that_a_registry_could_have(job: Job) -> None:
    reference = re.compile(r"[a-z0-9]+([._/:-]+[A-Za-z0-9]+)*")
    for engine in ("kubernetes", "skypilot"):
        text = file_of(of_engine(engine, job))
        images = re.findall(r'(?:image|image_id): "(?:docker:)?(.*)"', text)
        assert images and not any(map(reference.fullmatch, images))


@pytest.mark.parametrize("engine", ENGINES)
def test_checks_of_the_files_find_what_is_wrong(engine: str, job: Job) -> None:
    wrongs: Mapping[str, Mapping[str, str]] = {
        "slurm": {"--signal=TERM@300": "--signal=TERM,300", "--nodes=4": "--node=4", "esac": "esca", "24:00:00": "1d"},
        "kubernetes": {
            "ExitCode": "OnExit",
            "name: pytorch\n": "name: torch\n",
            'Node: "8"': "Node: 8",
            "limits": "limit",
        },
        "skypilot": {"num_nodes: 4": 'num_nodes: "4"', "recover_on_exit_codes": "recover_on", "run:": "runs:"},
        "torchrun": {"kill -0": "(kill -0", "trap 'rm": "trap rm"},
    }
    text = file_of(of_engine(engine, job))
    assert not list(FAULTS_OF[engine](text))
    for right, wrong in wrongs[engine].items():
        assert right in text
        assert list(FAULTS_OF[engine](text.replace(right, wrong))), wrong


def test_the_signal_is_one_that_the_run_takes() -> None:
    assert getattr(signal, f"SIG{emit.SIGNAL}") in PREEMPTION_SIGNALS
