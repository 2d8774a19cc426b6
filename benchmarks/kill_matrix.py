"""What goes wrong on one of several machines: what the others say, with what they end and when, what the run becomes.

Machines are launchers on this host with a folder, an environment and an address of their own, which share a run
directory. One is killed, frozen, told to stop, left without room on a disk, or started otherwise than the others.
Every checkpoint that counts as complete afterwards is read to its last byte; then the same command runs again on all
machines, and its weights and moments must equal those of an undisturbed run bit for bit.

    python benchmarks/kill_matrix.py
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

from tests import machine_deaths
from tests.jobs import Said
from tests.machine_deaths import CASES, FAMILY, NOTICED, Case, Trained
from vfun_cli import families
from vfun_cli.demo import default as demo_default

SMALLEST = ("another option",)


def main() -> None:
    parser = record.parser("kill_matrix", __doc__)
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    given = parser.parse_args()
    names = SMALLEST if given.smoke else given.cases
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        demo_default.make(families.find(FAMILY))
        demo = demo_default.FOLDER.absolute()
        machine_deaths.rows_of_one_clip(demo)
        straight: dict[int, Trained] = {}
        rows: list[dict[str, Any]] = []
        for case in (case for case in CASES if case.name in names):
            folder = Path(scratch) / case.name.replace(" ", "-")
            if case.machines not in straight:
                place = Path(scratch) / f"undisturbed-{case.machines}"
                straight[case.machines] = machine_deaths.undisturbed(place, demo, machines=case.machines)
            rows.append(row(case, machine_deaths.performed(case, folder, demo), straight[case.machines]))
            print(rows[-1], file=sys.stderr, flush=True)
            record.write_result(given, summary(rows))
    if not all(each["good"] for each in rows):
        raise SystemExit("not every case ended as it should")


def row(case: Case, ending: machine_deaths.Ending, straight: Trained) -> dict[str, Any]:
    """What came of a case."""
    *others, harmed = ending.said
    codes = [said.code for said in ending.said]
    equal = ending.became == straight
    told = all(re.search(case.says, " ".join(said.err.split())) for said in others)
    alike = {said.code for said in others} == {case.code} and harmed.code in (case.code, -9)
    return {
        "case": case.name,
        "machines": case.machines,
        "message": message(others[0]),
        "codes": codes,
        "seconds": ending.seconds,
        "complete_checkpoints": ending.steps,
        "bit_equal_afterwards": equal,
        "good": bool(told and alike and equal and (not case.harm or not case.code or max(ending.seconds) < NOTICED)),
    }  # fmt: skip


def message(said: Said) -> str:
    """The error, or the last that was said of how it ended."""
    text = " ".join(said.err.split())
    found = re.search(r"error: .*?(?= next: |$)", text) or re.search(
        r"(preempted after|restart 1 of 1).*?(?= next: |$)", text
    )
    return re.sub(r"/\S*/(?=shared|machine-)", "", found[0]) if found else ""


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All cases, and the slowest that ended with an error."""
    return {
        "cases": len(rows),
        "good": sum(each["good"] for each in rows),
        "slowest_end_seconds": max(max(each["seconds"]) for each in rows),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
