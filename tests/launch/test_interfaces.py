"""The network interface by which a machine reaches machine 0."""

import shlex
from pathlib import Path

import pytest

from tests.jobs import finish
from tests.machines import hosts, networked
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import ConfigError
from vfun_cli.families.wan_s2v import SPEC
from vfun_cli.launch import interfaces, job
from vfun_cli.launch.templates import plan_launch
from vfun_cli.run.rundir import RunDir

ELSEWHERE = "192.0.2.77"
"""An address for documents, which no machine has."""


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.9", "localhost"])
@pytest.mark.parametrize("own", [True, False])
def test_a_loopback_address_is_the_loopbacks(address: str, own: bool) -> None:
    assert interfaces.towards(address, own=own) == "lo"


def test_each_address_of_this_machine_is_found_at_its_interface() -> None:
    found = [(name, each) for name, each in interfaces.addresses() if not each.is_link_local]
    assert ("lo", "127.0.0.1") in [(name, str(each)) for name, each in found]
    for name, each in found:
        assert interfaces.towards(str(each), own=True) == name


@pytest.mark.parametrize(
    ("address", "own", "words"),
    [
        (ELSEWHERE, True, ["this is machine 0", ELSEWHERE, "--main-process-ip", "--machine-rank"]),
        ("no-such-host.invalid", False, ["does not resolve", "no-such-host.invalid", "--main-process-ip"]),
    ],
)
def test_an_address_where_nobody_can_meet_is_refused(address: str, own: bool, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        interfaces.towards(address, own=own)
    said = f"{caught.value.message} {caught.value.hint}"
    assert all(word in said for word in words), said


@pytest.mark.slow
def test_a_machine_without_a_way_to_machine_0_is_told_so(tmp_path: Path) -> None:
    with networked(hosts(2, tmp_path)) as machines:
        arguments = ("train", "wan-s2v", "--num-machines=2", "--machine-rank=1", "--main-process-ip", ELSEWHERE)
        said = finish(machines[1].start(*arguments), 2)
    assert f"machine 0 at {ELSEWHERE} cannot be reached from here" in said.err, said.err


def config(machine: int, address: str = "127.0.0.2") -> RunConfig:
    return RunConfig(
        strategy="ddp", num_machines=2, num_processes=2, machine_rank=machine, main_process_ip=address,
        main_process_port=29_500,
    )  # fmt: skip


@pytest.mark.parametrize(("stated", "named"), [("", ["GLOO_SOCKET_IFNAME=lo"]), ("eth9", [])])
def test_the_command_of_several_machines_names_it_unless_the_user_does(
    stated: str, named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", stated)
    interface = job.interface_of(config(0), dry_run=False)
    launch = plan_launch(config(0), SPEC, RunDir(tmp_path), tmp_path / "run.json", interface=interface)
    assert [word for word in shlex.split(launch.command) if word.startswith("GLOO_")] == named


def test_a_dry_run_for_another_machine_is_shown_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert job.interface_of(config(0, ELSEWHERE), dry_run=True) is None
    assert "is not one of its addresses" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError):
        job.interface_of(config(0, ELSEWHERE), dry_run=False)
