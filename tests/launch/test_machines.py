"""Commands of several machines in one run directory: what one of them meets ends all, in the same words."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vfun_cli.errors import CheckpointError, VfunError
from vfun_cli.launch import machines, supervise
from vfun_cli.launch.machines import COMES_WITHIN, GRACE, MEETS_WITHIN, MOST_PATIENCE, SAID_AFTER, SILENT, Machine
from vfun_cli.run.messages import Failure, MachineReport, RankError
from vfun_cli.run.rundir import RunDir


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "LOOK", 0.0)
    monkeypatch.setattr(machines.ownership, "new_id", lambda: "a command")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "logs").mkdir()
    return RunDir(tmp_path)


def failure(kind: str, time: float, message: str) -> Failure:
    return Failure(kind=kind, time=time, message=message, hint="Go on.", exit_code=1)


def met(run: RunDir, count: int) -> list[Machine]:
    """That many machines, of two processes each, which have heard of each other."""
    job = [Machine(run, number, machines=count, processes=2 * count) for number in range(count)]
    for number in range(count):
        beat(run, number)
    for machine in job:
        machine.look()
    return job


def beat(run: RunDir, number: int, **said: object) -> None:
    """A sign of life of a machine, in place of its command's thread."""
    beat.count = getattr(beat, "count", 0) + 1  # type: ignore[attr-defined]
    values = {"state": "works", "attempt": 1, "command": "a command", **said}
    MachineReport(machine=number, beat=str(beat.count), **values).write(run)  # type: ignore[arg-type, attr-defined]


def ends(machine: Machine) -> bool:
    """Whether its ranks are ended within the looks that they have to say something."""
    return [machine.must_end() for _ in range(GRACE + 2)][-1]


def agree(run: RunDir, job: list[Machine], met_there: list[Failure | None]) -> list[str]:
    """What each says that all ended with, when the others have reported to machine 0 before it asks."""
    for number, own in list(enumerate(met_there))[1:]:
        beat(run, number, state="failed", attempt=job[0].attempt, failure=own)
    return [machine.agree(own).message for machine, own in zip(job, met_there, strict=True)]


@pytest.mark.parametrize(
    ("met_there", "cause"),
    [
        ([failure("crash", 1, "lost 2"), failure("error", 3, "bad rows"), failure("killed", 2, "dead")], "bad rows"),
        ([failure("crash", 1, "lost 1"), failure("killed", 2, "dead"), None], "dead"),
        ([None, failure("crash", 2, "second"), failure("crash", 1, "first")], "first"),
    ],
)
def test_all_machines_end_with_the_same_cause(met_there: list[Failure | None], cause: str, run: RunDir) -> None:
    assert agree(run, met(run, 3), met_there) == [cause] * 3


def test_a_machine_that_fails_ends_the_ranks_of_the_others_after_they_could_speak(run: RunDir) -> None:
    first, second, third = met(run, 3)
    assert not ends(first) and not ends(second)
    beat(run, 2, state="failed", failure=failure("crash", 1, "x"))
    assert not ends(second), "the others hear of it from machine 0"
    assert not first.must_end()
    assert ends(first) and ends(second)
    RankError(rank=5, time=1, message="", hint=None, exit_code=1, crash=True, traceback="").write(run)
    assert ends(third)
    assert [error.rank for error in third.errors()] == [5] and not second.errors()


@pytest.mark.parametrize("number", [0, 1])
def test_a_machine_without_a_sign_of_life_is_named(number: int, run: RunDir) -> None:
    machine, gone = met(run, 2)[number], 1 - number
    for _ in range(SILENT - 1):
        assert not machine.must_end()
    beat(run, gone)
    looks = [machine.must_end() for _ in range(1 + SILENT + GRACE)]
    assert not any(looks[:-1]) and looks[-1]
    said = machine.agree(failure("crash", 1, "Connection closed by peer"))
    assert f"machine {gone} has gone without a word" in said.message and said.kind == "error"


def test_a_peer_that_was_lost_is_waited_for_before_it_is_blamed(run: RunDir) -> None:
    first, _ = met(run, 2)
    looks = []
    said = first.agree(failure("crash", 1, "lost"), given_up=lambda: looks.append(first) or len(looks) > SILENT - 2)
    assert said.message == "lost"
    assert "machine 1 has gone" in first.agree(failure("crash", 1, "lost")).message


def test_looks_count_while_own_signs_of_life_get_through_and_others_get_as_long_as_those_were_late(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any run of stalls of the disk: nobody is blamed within SILENT looks after the last, who is dead is then."""
    clock = Clock()
    monkeypatch.setattr(machines.time, "monotonic", clock)
    draws = random.Random(7)
    for _ in range(6):
        machine, _ = met(run, 2)
        machine._say()
        for _ in range(draws.randrange(4)):
            stall = draws.randrange(5, 120)
            for _ in range(stall):  # no sign of life gets through, of either
                clock.now += 1
                assert not machine.must_end()
            machine._say()
            patience = SILENT + min(stall, MOST_PATIENCE)
            for _ in range(draws.randrange(1, patience)):  # the other one is not back yet
                clock.now += 1
                machine._say()
                assert not machine.must_end()
            beat(run, 1)
        looks = 0
        while not machine._gone():
            clock.now += 1
            machine._say()
            machine.must_end()
            looks += 1
        assert SILENT <= looks <= SILENT + 1


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_command_that_was_lost_and_started_anew_is_not_taken_for_the_lost_one(run: RunDir) -> None:
    for machine, lost in zip(met(run, 2), (1, 0), strict=True):
        for _ in range(SILENT - 1):
            beat(run, lost, command="another")
            assert not machine.must_end(), "the lost one may be about to end"
        beat(run, lost, command="another")
        assert ends(machine) and f"machine {lost} has gone" in machine.agree(None).message


EARLIER = {"command": "an earlier command", "job": "an earlier command of machine 0"}


def test_a_command_that_is_still_ending_is_not_taken_for_the_one_that_follows_it(run: RunDir) -> None:
    """A scheduler may start each machine again as soon as its own command has ended."""
    beat(run, 1, **EARLIER)
    machine = Machine(run, 0, machines=2, processes=2)
    beat(run, 1, state="failing", **EARLIER)
    assert not ends(machine)
    beat(run, 1, state="ended", failure=failure("error", 1, "of an earlier job"), **EARLIER)
    assert not ends(machine)
    beat(run, 1, state="failed", failure=failure("error", 1, "of this job"))
    assert ends(machine) and machine.agree(None).message == "of this job"


@pytest.mark.parametrize("state", ["works", "ended"])
def test_machine_0_is_not_followed_where_it_ends_the_job_of_an_earlier_command(state: str, run: RunDir) -> None:
    job = EARLIER["job"]
    beat(run, 0, command=job)
    beat(run, 1, state="ended", **EARLIER)
    machine = Machine(run, 1, machines=2, processes=2)
    beat(run, 0, command=job, state=state)
    assert not ends(machine)
    beat(run, 0, state="failed", failure=failure("error", 1, "of this job"))
    assert ends(machine) and machine.agree(None).message == "of this job"


def test_where_the_job_of_the_command_before_it_fails_a_command_that_was_started_anew_ends_with_it(run: RunDir) -> None:
    job = EARLIER["job"]
    beat(run, 1, **EARLIER)
    machine = Machine(run, 1, machines=2, processes=2)
    beat(run, 0, command=job, state="failed", failure=failure("error", 1, "machine 1 has gone"))
    assert ends(machine) and machine.agree(None).message == "machine 1 has gone"


def test_machine_0_is_followed_once_the_ranks_have_met_its_own_whatever_command_was_here_before(run: RunDir) -> None:
    """As where that one was lost before machine 0 had heard of it."""
    beat(run, 1, **EARLIER)
    machine = Machine(run, 1, machines=2, processes=4)
    RankError.reserve(run, 2)
    assert not ends(machine)
    beat(run, 0, command=EARLIER["job"])
    for _ in range(SILENT):
        assert not machine.must_end()
    assert ends(machine) and "machine 0 has gone" in machine.agree(None).message


def test_a_command_that_follows_one_that_ended_well_is_heard(run: RunDir) -> None:
    first, _ = met(run, 2)
    beat(run, 1, state="ended")
    first.look()
    beat(run, 1, command="another", state="failed", failure=failure("error", 1, "of the second"))
    assert ends(first) and first.agree(None).message == "of the second"


def test_who_has_not_come_is_said_and_when_all_have(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    beat(run, 2, state="ended", failure=failure("error", 1, "no model there"))
    machine = Machine(run, 0, machines=4, processes=4)
    beat(run, 1)
    for _ in range(SAID_AFTER + 5):
        assert not machine.must_end()
        machine.tell()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("waiting for machines 2, 3:") == 1 and "ended with this: no model there" in said
    assert "this ends in 30 minutes" in said
    for number in (2, 3):
        beat(run, number)
    machine.must_end()
    machine.tell()
    machine.tell()
    assert capsys.readouterr().err == "all machines have come.\n"


def test_who_never_comes_ends_all(run: RunDir) -> None:
    first, second, _ = (Machine(run, number, machines=3, processes=3) for number in range(3))
    beat(run, 1)
    beat(run, 0)
    for look in range(COMES_WITHIN + GRACE - 1):
        if look % (SILENT // 2) == 0:
            beat(run, 1)
        assert not first.must_end()
    assert first.must_end() and ends(second)
    beat(run, 1, state="failed")
    said = first.agree(None)
    assert said.message.startswith("machine 2 has not come within 30 minutes") and said.kind == "error"
    assert second.agree(None) == said


def test_launchers_that_do_not_meet_end_all_once_every_machine_has_started_its_own(run: RunDir) -> None:
    first, second, _ = met(run, 3)
    for look in range(MEETS_WITHIN + 100):
        if look % 10 == 0:
            beat(run, 0)
            beat(run, 1)
            beat(run, 2, state="begins")  # it still checks its rows
        assert not first.must_end() and not second.must_end()
    for look in range(MEETS_WITHIN + GRACE - 1):
        if look % 10 == 0:
            beat(run, 1)
            beat(run, 2)
        assert not first.must_end()
    assert first.must_end() and ends(second)
    beat(run, 1, state="failed")
    beat(run, 2, state="failed")
    said = first.agree(None)
    assert "their launchers have not met within 10 minutes" in said.message and "--main-process-ip" in str(said.hint)


def test_ranks_that_have_started_may_take_as_long_as_they_like(run: RunDir) -> None:
    first, _ = met(run, 2)
    RankError.reserve(run, 0)
    for look in range(2 * MEETS_WITHIN):
        if look % 10 == 0:
            beat(run, 1)
        assert not first.must_end()


def test_all_machines_that_have_gone_are_named(run: RunDir) -> None:
    first, *_ = met(run, 4)
    for _ in range(SILENT + 2):
        beat(run, 2)
        first.must_end()
    beat(run, 2, state="failed")
    assert first.agree(None).message.startswith("machines 1, 3 have gone without a word")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CheckpointError("no model."), 5, "machine 1: no model."),
        (KeyboardInterrupt(), 130, "machine 1: interrupted."),
        (ValueError("odd"), 1, "machine 1: ValueError: odd."),
    ],
)
def test_what_a_command_meets_before_its_ranks_ends_the_others_too(
    error: BaseException, code: int, words: str, run: RunDir
) -> None:
    first, second = (Machine(run, number, machines=2, processes=2) for number in range(2))
    with pytest.raises(type(error)), second.taking_part():
        first.look()  # it is there
        raise error
    assert ends(first)
    said = first.agree(None)
    assert (said.message, said.exit_code, said.kind) == (words, code, "error")


def test_what_an_earlier_command_reported_counts_for_nothing(run: RunDir) -> None:
    beat(run, 1, state="ended", failure=failure("error", 1, "of an earlier job"))
    machine = Machine(run, 0, machines=2, processes=2)
    assert not ends(machine)
    assert machine.agree(failure("crash", 2, "of this one")).message == "of this one", "and nobody is waited for"


@pytest.mark.parametrize(
    "harm",
    ["", "{", "[]", '{"machine": 1, "state": "?", "attempt": 1, "beat": "", "command": "", "failure": null}'],
)
def test_a_report_that_cannot_be_read_is_no_silence(harm: str, run: RunDir) -> None:
    machine, _ = met(run, 2)
    run.machine_report(1).write_text(harm)
    for _ in range(2 * SILENT):
        assert not machine.must_end()


def test_all_begin_the_next_attempt_from_the_checkpoint_that_machine_0_names(run: RunDir) -> None:
    job = met(run, 3)
    for found in ((4, 2, None), (8, 4, 4)):
        agree(run, job, [failure("crash", 1, "x")] * 3)
        assert [each.next_attempt(step) for each, step in zip(job, found, strict=True)] == [found[0]] * 3
        for each in job:
            each.look()
        assert not any(ends(each) for each in job)


def test_no_attempt_begins_after_machine_0_has_ended(run: RunDir) -> None:
    job = met(run, 2)
    with pytest.raises(CheckpointError), job[0].taking_part():
        assert agree(run, job, [failure("crash", 1, "x")] * 2) == ["x", "x"]
        raise CheckpointError("it is damaged.")
    job[1].look()
    with pytest.raises(CheckpointError, match=r"^machine 0: it is damaged\.$"):
        job[1].next_attempt(2)


def test_a_launch_ends_with_the_error_of_another_machine(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "GRACE", 0)
    machine = met(run, 2)[1]
    reason = Failure(kind="error", time=1, message="bad rows", hint="Mend them.", exit_code=3)
    beat(run, 0, state="failed", failure=reason)
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    with supervise.stop_requests(run, 1) as stop, pytest.raises(VfunError) as caught:
        supervise.launch(argv, machine, 0, stop, stdin=subprocess.DEVNULL, way_on=str)
    assert (caught.value.message, caught.value.exit_code) == ("bad rows", 3)


def test_a_machine_alone_reports_nothing_and_waits_for_nobody(run: RunDir) -> None:
    alone = Machine(run)
    with alone.taking_part():
        assert not ends(alone) and alone.next_attempt(3) == 3
        assert alone.agree(failure("crash", 1, "x")).message == "x"
    assert not [*run.logs.iterdir()]


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_machine_meets_ends_others_that_still_check_their_rows(
    number: int, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "BEAT", 0.02)
    machine, other = met(run, 3)[number], 2 * (number == 0)
    reason = Failure(kind="error", time=1, message=f"machine {other}: no model", hint="Get it.", exit_code=5)
    with pytest.raises(CheckpointError, match=rf"^machine {other}: no model$"), machine.taking_part():
        beat(run, other, state="ended", failure=reason)
        checks_rows()
    said = MachineReport.read(run, number)
    assert said is not None and (said.state, said.failure) == ("ended", reason), (
        "and the others hear it in the same words"
    )


def test_a_machine_that_dies_ends_others_that_still_check_their_rows(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "BEAT", 0.02)
    with pytest.raises(VfunError, match="machine 1 has gone without a word"), met(run, 2)[0].taking_part():
        checks_rows()


def test_ranks_that_are_launched_are_ended_by_whoever_watches_them(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "BEAT", 0.02)
    machine = met(run, 2)[0]
    with machine.taking_part():
        machine.launches()
        beat(run, 1, state="ended", failure=failure("error", 1, "x"))
        time.sleep(0.3)
    assert ends(machine)


def checks_rows() -> None:
    """As long as nobody stops it, up to ten seconds."""
    for _ in range(1000):
        time.sleep(0.01)
