"""What processes tell each other arrives as it was said; what is missing, cut or of another kind counts as not said."""

from dataclasses import replace
from pathlib import Path

import pytest

from vfun_cli.run.messages import FillReport, Outcome, RankError, StopRequest, clear_messages
from vfun_cli.run.rundir import RunDir

STOP = StopRequest(reason="interrupted")
OUTCOME = Outcome(ending="preempted", step=7)
ERROR = RankError(rank=1, time=2.0, message="no.", hint=None, exit_code=3, crash=False, traceback="")
EARLIER = RankError(rank=4, time=1.0, message="first.", hint="Help.", exit_code=1, crash=True, traceback="")
FILLED = FillReport(rank=1, ending="completed", encoded=5, needed=6)
HARMS = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'"interrupted"',
    b'{"ending": "completed"}',
    b'{"ending": "?", "step": 1}',
    b"\xff",
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert (StopRequest.read(run), Outcome.read(run), RankError.read_all(run), FillReport.read_all(run)) == (
        None, None, [], [],
    )  # fmt: skip
    for message in (STOP, OUTCOME, ERROR, EARLIER, FILLED):
        message.write(run)
    assert StopRequest.read(run) == STOP and Outcome.read(run) == OUTCOME and OUTCOME.exit_code == 75
    assert RankError.read_all(run) == [EARLIER, ERROR] and FillReport.read_all(run) == [FILLED]
    clear_messages(run)
    assert not [*run.logs.iterdir()]


def test_a_machine_deletes_what_it_said_and_nothing_of_another(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    mine, theirs = [replace(ERROR, rank=rank) for rank in (2, 3)], [replace(ERROR, rank=rank) for rank in (0, 1)]
    for error in (*mine, *theirs):
        error.write(run)
    for machine in (0, 1):
        STOP.write(run, machine)
        OUTCOME.write(run, machine)
    clear_messages(run, 1, ranks_elsewhere=(0, 1))
    assert RankError.read_all(run) == theirs
    assert StopRequest.read(run, 0) == STOP and Outcome.read(run, 0) == OUTCOME
    assert StopRequest.read(run, 1) is None and Outcome.read(run, 1) is None


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_message_is_none_but_a_request_to_stop_still_asks(harm: bytes, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    for path in (run.stop_request(), run.outcome(), run.rank_error(0), run.fill_report(0)):
        path.write_bytes(harm)
    ERROR.write(run)
    assert StopRequest.read(run) == StopRequest(reason="preempted")
    assert Outcome.read(run) is None and FillReport.read_all(run) == [] and RankError.read_all(run) == [ERROR]
