"""Machines, their numbers and where they meet, as each way of starting a job says them."""

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.started import WAYS, Place, exports, mpirun, operator, pytorchjob, rank, skypilot, step
from vfun_cli import families
from vfun_cli.config import cluster
from vfun_cli.config.resolve import HERE, Resolved, resolve
from vfun_cli.errors import ConfigError

SPEC = families.find("cogvideox-fun")
PORT_UNSAID = {"skypilot"}
PROCESSES_OPEN = {"mpirun", "tasks"}
"""With one process a machine, that is the machine's command."""


def settle(environ: dict[str, str], base: dict[str, Any] | None = None, **typed: Any) -> Resolved:
    return resolve("train", SPEC, {"device": "cpu", **typed}, base=base, environ=environ, starts=True)


def refusal(environ: dict[str, str], **typed: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        settle(environ, **typed)
    return f"{caught.value.message}\n{caught.value.hint}"


@st.composite
def places(draw: st.DrawFn) -> Place:
    machines, each = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    return Place(
        machines=machines, machine=draw(st.integers(0, machines - 1)), each=each,
        address=draw(st.sampled_from(["gpu001", "10.0.0.7", "node-b.cluster.local"])),
        port=draw(st.integers(20_000, 39_999)), local_rank=draw(st.integers(0, each - 1)),
    )  # fmt: skip


def meant(way: str, at: Place) -> dict[str, Any]:
    """What the launch gets, as far as the environment says it."""
    found: dict[str, Any] = {"num_machines": at.machines, "machine_rank": at.machine}
    if at.machines > 1:
        port = 29_500 if way in PORT_UNSAID else at.port
        found |= {"main_process_ip": at.address, "main_process_port": port}
    gpus_are_counted = way in ("step", "skypilot")
    if not (way in PROCESSES_OPEN and at.each == 1) and not gpus_are_counted:
        found["num_processes"] = at.machines * at.each
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@given(at=places())
def test_each_way_of_starting_gives_what_was_meant(way: str, at: Place) -> None:
    resolved = settle(WAYS[way](at))
    expected = meant(way, at)
    assert {name: getattr(resolved.config, name) for name in expected} == expected
    if at.machines > 1:
        assert all(resolved.sources[name].startswith("$") for name in expected if name != "main_process_port")
    assert settle(WAYS[way](at), **expected).config == resolved.config, "equal values may be typed, too"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@given(at=places(), option=st.sampled_from(cluster.OPTIONS), by=st.integers(1, 5))
def test_what_is_typed_otherwise_is_refused_and_named(way: str, at: Place, option: str, by: int) -> None:
    environ, expected = WAYS[way](at), meant(way, at)
    assume(option in expected and at.machines > 1)
    assume(option in cluster.read(environ).stated)
    value = "gpu999" if option == "main_process_ip" else expected[option] + by
    said = refusal(environ, **{option: value})
    option = f"--{option.replace('_', '-')}"
    assert said.startswith(f"{option} is {value}, and $") and f"Drop {option}" in said and "env -u " in said


@pytest.mark.slow
@pytest.mark.parametrize("way", [name for name in WAYS if name not in ("exports", "pytorchjob")])
@given(first=places(), second=places())
def test_two_environments_that_differ_are_refused_and_both_named(way: str, first: Place, second: Place) -> None:
    assume(first.machines != second.machines)
    # WORLD_SIZE beside torchrun's settings may count the processes of all pods, as a PyTorchJob's does.
    assume(way not in ("operator", "rendezvous") or first.machines * first.each != second.machines)
    inner = way == "rank"  # its WORLD_SIZE is no number of machines, which another way says then
    other = skypilot(second) if inner else {**exports(second), **address_of(first)}
    said = refusal({**other, **WAYS[way](first)})
    assert str(first.machines) in said and str(second.machines) in said and "env -u " in said
    assert said.count("$") >= 2


def address_of(at: Place) -> dict[str, str]:
    return {"MASTER_ADDR": at.address, "MASTER_PORT": str(at.port)}


TWO = Place(machines=2, machine=1, each=2, address="gpu001", port=23_456)


@pytest.mark.parametrize("other", ["operator", "step", "skypilot", "mpirun"])
def test_two_environments_that_agree_are_one(other: str) -> None:
    at = Place(machines=2, machine=1, each=1, address="gpu001", port=23_456)
    found = settle({**WAYS[other](at), **exports(at)}).config
    assert (found.num_machines, found.machine_rank, found.num_processes) == (2, 1, 2)
    assert (found.main_process_ip, found.main_process_port) == ("gpu001", 23_456)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "1"}, ["$RANK is set, and nothing says how many machines", "WORLD_SIZE"]),
        ({"WORLD_SIZE": "2"}, ["$WORLD_SIZE makes num_machines 2", "which of them", "RANK"]),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["the address of machine 0", "MASTER_ADDR"]),
        ({**exports(TWO), "WORLD_SIZE": "two"}, ["$WORLD_SIZE is 'two'", "env -u WORLD_SIZE"]),
        ({**exports(TWO), "MASTER_PORT": "-1"}, ["$MASTER_PORT is '-1'"]),
        ({**exports(TWO), "RANK": "2"}, ["machine_rank 2 of 2"]),
        ({**exports(TWO), "NUM_PROCESS": "3"}, ["num_processes 3 does not divide"]),
        ({"LOCAL_RANK": "0"}, ["$LOCAL_RANK is set, and $RANK and $WORLD_SIZE are not", "env -u LOCAL_RANK"]),
        (
            {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"},
            ["$LOCAL_RANK is set", "how many ranks this machine has", "LOCAL_WORLD_SIZE"],
        ),
        ({**rank(TWO), "WORLD_SIZE": "5"}, ["$WORLD_SIZE is 5 and $LOCAL_WORLD_SIZE is 2", "the same number"]),
        ({**rank(TWO), "RANK": "3", "GROUP_RANK": "1"}, ["numbered machine by machine"]),
        ({**rank(TWO), "GROUP_WORLD_SIZE": "4"}, ["$WORLD_SIZE / $LOCAL_WORLD_SIZE", "$GROUP_WORLD_SIZE", "2", "4"]),
        ({**step(TWO), "SLURM_STEP_TASKS_PER_NODE": "2,1"}, ["'2,1'", "srun --ntasks-per-node=1"]),
        ({**operator(TWO), "PET_NNODES": "1:4"}, ["'1:4'", "does not change"]),
        ({**operator(TWO), "PET_NODE_RANK": ""}, ["$PET_NNODES makes num_machines 2", "which of them"]),
        (
            {**pytorchjob(TWO), "WORLD_SIZE": "3"},
            ["$PET_NNODES makes num_machines 2", "$WORLD_SIZE makes it 3", "env -u WORLD_SIZE", "env -u PET_NNODES"],
        ),
        ({k: v for k, v in mpirun(TWO).items() if "MASTER" not in k}, ["the address of machine 0", "MASTER_ADDR"]),
        ({**mpirun(TWO), "OMPI_COMM_WORLD_RANK": "1"}, ["numbered machine by machine", "--map-by slot"]),
    ],
)  # fmt: skip
def test_what_is_not_whole_or_no_number_is_refused_and_named(environ: dict[str, str], words: list[str]) -> None:
    said = refusal(environ)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("environ", [exports(TWO), rank(TWO), rank(Place(machines=1, machine=0, each=2))])
def test_a_strategy_of_one_process_is_refused_where_there_are_several(environ: dict[str, str]) -> None:
    said = refusal(environ, strategy="single")
    assert "strategy single trains in one process, and $WORLD_SIZE" in said and "--ddp" in said


@pytest.mark.parametrize("environ", [exports(TWO), rank(TWO), rank(Place(machines=1, machine=0, each=2))])
def test_an_open_strategy_is_one_of_several_processes(environ: dict[str, str]) -> None:
    assert settle(environ).config.strategy == "ddp"


def test_the_port_of_one_machine_is_not_a_launchers() -> None:
    """There torchrun listens itself."""
    found = settle(rank(Place(machines=1, machine=0, each=2)))
    assert (found.config.main_process_port, found.config.num_processes) == (None, 2)


def test_a_step_of_mpiruns_own_is_not_read() -> None:
    """Its daemons lie in one, without the machine that it was typed on."""
    daemons = step(Place(machines=1, machine=0, each=1))
    assert settle({**daemons, **mpirun(TWO)}).config.num_machines == 2


@pytest.mark.parametrize("number", [None, "4294967291", "4294967290"])
def test_a_batch_script_is_no_step(number: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {**step(TWO), "SLURM_STEP_ID": number or ""}
    assert settle(environ).config.num_machines == 1
    assert "This job of SLURM has 2 machines" in capsys.readouterr().err
    settle({**environ, "SLURM_NNODES": "1"})
    assert not capsys.readouterr().err


def test_gpus_that_a_scheduler_counts_are_processes_unless_the_run_is_on_processors() -> None:
    job = cluster.read(step(TWO))
    assert cluster.settle(job, {}, {}, counts_gpus=True)["num_processes"].value == 4
    assert "num_processes" not in cluster.settle(job, {}, {}, counts_gpus=False)
    assert settle(step(TWO), num_processes=2).config.num_processes == 2


def test_a_named_address_and_port_count_before_those_of_a_list_of_machines() -> None:
    found = settle({**step(TWO), "MASTER_ADDR": "gpu001-ib", "MASTER_PORT": "1234"}).config
    assert (found.main_process_ip, found.main_process_port) == ("gpu001-ib", 1234)
    assert settle(step(TWO), main_process_ip="gpu001-ib").config.main_process_ip == "gpu001-ib"


def test_two_names_of_one_machine_are_one_address() -> None:
    assert settle(exports(Place(machines=2, machine=0, each=1, address="localhost")), main_process_ip="127.0.0.1")


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu001", "gpu001"),
        ("gpu[001-003,7],login2", "gpu001"),
        ("gpu7,login2", "gpu7"),
        ("rack[0-1]n[03-12]-ib", "rack0n03-ib"),
        ("a.b-c[10]", "a.b-c10"),
    ],
)
def test_the_first_of_slurms_hosts(hosts: str, first: str) -> None:
    assert cluster.first_host(hosts) == first


def test_the_local_rank_is_known_where_a_launcher_starts_all_of_a_machine() -> None:
    at = Place(machines=2, machine=1, each=3, local_rank=2)
    for way in ("rank", "tasks", "mpirun"):
        job = cluster.read(WAYS[way](at))
        assert (job.local_rank, job.local_ranks) == (2, 3)
    for way in ("exports", "operator", "pytorchjob", "rendezvous", "step", "skypilot"):
        assert cluster.read(WAYS[way](at)).local_rank is None


def test_a_continuation_is_where_its_own_launch_is() -> None:
    first = settle(exports(TWO))
    alone = {name: value for name, value in first.config.to_json().items() if name not in cluster.OPTIONS}
    assert settle({}, base=alone).config.num_machines == 1
    again = settle({**exports(TWO), "WORLD_SIZE": "4", "NUM_PROCESS": ""}, base=first.config.to_json())
    assert (again.config.num_machines, again.sources["num_processes"]) == (4, HERE)


@pytest.mark.parametrize("way", ["rank", "tasks", "mpirun"])
def test_a_first_process_that_sees_its_own_gpu_alone_is_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Place(machines=2, machine=0, each=4)
    monkeypatch.setattr("vfun_cli.devices.gpu_count", lambda: 1)
    said = refusal(WAYS[way](at), device="cuda")
    assert "4 ranks of this machine were started" in said and "sees 1 GPUs" in said and "one task a machine" in said
    monkeypatch.setattr("vfun_cli.devices.gpu_count", lambda: 4)
    assert settle(WAYS[way](at), device="cuda").config.num_processes == 8


def test_a_command_that_starts_nothing_reads_no_machines() -> None:
    assert resolve("train", SPEC, {}, environ=exports(TWO)).config.num_machines == 1
