"""One acceptance run: its rows in a folder of their own, and its results."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vfun_cli import __version__, devices
from vfun_cli.acceptance import machine, report
from vfun_cli.acceptance.pool import Pool
from vfun_cli.acceptance.rows import Row
from vfun_cli.run.rundir import ensure_writable, write_atomically

RECORD, FAILURES = "acceptance.json", "failures.log"


def prove(
    rows: Sequence[Row], *, device: str, minutes: float, jobs: int, output_dir: Path
) -> tuple[Pool, dict[str, Any]]:
    """Run the rows, and leave RECORD and FAILURES in ``output_dir``, also of a run that is interrupted.

    Returns:
        What came of the rows, and the record.

    Raises:
        EnvironmentFault: there is no such device, or the folder cannot be written.
    """
    devices.check_processes(device, 1)
    ensure_writable(output_dir)
    found_on = {"hardware": machine.hardware(), "versions": machine.versions()}
    date, began = datetime.now(UTC).strftime("%Y-%m-%d"), time.monotonic()
    with TemporaryDirectory(prefix="work-", dir=output_dir.absolute(), ignore_cleanup_errors=True) as place:
        pool = Pool(place=Path(place), lacks=machine.lacks(device), deadline=began + 60 * minutes)
        try:
            with report.shown(rows, pool):
                pool.run(rows, jobs)
        finally:
            found = {
                "date": date,
                "command": shlex.join(["vfun", *sys.argv[1:]]),
                "vfun": __version__,
                "device": device,
                "minutes": minutes,
                "jobs": jobs,
                **found_on,
                "seconds": round(time.monotonic() - began),
                "counts": report.counts(pool),
                "rows": report.record(rows, pool),
            }
            write_atomically(output_dir / RECORD, json.dumps(found, indent=1) + "\n")
            write_atomically(output_dir / FAILURES, report.failures(rows, pool))
    return pool, found
