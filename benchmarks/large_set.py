"""What a run of ten million rows on a thousand ranks takes of one rank before its first step: time and memory.

Run from the repository root: ``python benchmarks/large_set.py``. Each part is a process of its own, so that its peak is
its own. A rank plans the epoch twice as it starts (to compare its digest with the launch's, and to train by it), and
then reads the rows of its own steps. Beside that, what reading all rows took before they were stored.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from plan_sets import mixed_set
from record import parser, write_result

from vfun_cli.families import FAMILIES
from vfun_cli.metadata.records import Metadata, Record, read_metadata
from vfun_cli.metadata.stored import store_rows, stored_rows
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.balance import mean_over_max
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.schedule import plan_epoch

RANKS = 1000
FAMILY_NAMES = ("wan-s2v", "cogvideox-fun")
"""Of all families the plan differs in sizes alone: one of videos, one with images."""


def fields(row: int) -> dict[str, Any]:
    """A row of the usual length: 315 bytes of JSON."""
    place = f"part-{row // 1000:05d}/clip-{row:08d}"
    text = (
        "A person in a red coat speaks to the camera while the wind moves the trees behind; "
        f"clip number {row} of the set, filmed at noon."
    )
    sizes = {"width": 1280, "height": 720, "frames": 120, "fps": 25}
    return {"file_path": f"train/{place}.mp4", "audio_path": f"wav/{place}.wav", "text": text, "type": "video", **sizes}


class Records:
    """As many of them as are asked for, each made when it is looked at."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Record]:
        """In order."""
        return (Record(row=row, fields=(said := fields(row)), raw=said) for row in range(self.rows))


def save_table(folder: Path, rows: int, family: str) -> None:
    """What the launch saves of the clips."""
    images = 0.3 if "image" in FAMILIES[family].media_types else 0.0
    mixed_set(rows, images=images).save(folder / f"{family}.npz")


def plan(folder: Path, rows: int, family: str) -> dict[str, Any]:
    """A rank's plan of the first epoch, from the saved clips."""
    spec = FAMILIES[family]
    table = ClipTable.load(folder / f"{family}.npz")
    options, started = PlanOptions.pick(spec.defaults.train, world_size=RANKS), time.perf_counter()
    planned = plan_epoch(spec, spec.model.dims, table, options, 0)
    planned_in = time.perf_counter() - started
    digest = planned.digest()
    digested_in, kept = time.perf_counter() - started - planned_in, resident()
    balance = mean_over_max(planned)
    assert balance is not None  # there are rows
    return {
        "plan_seconds": round(planned_in, 1),
        "digest_seconds": round(digested_in, 2),
        "kept_mb": kept,
        "steps": planned.num_steps,
        "mean_over_max_flops": round(balance, 5),
        "digest": digest,
    }


def store(folder: Path, rows: int, family: str) -> dict[str, Any]:
    """What machine 0 writes for the ranks of all machines."""
    path, started = folder / "rows.sqlite", time.perf_counter()
    metadata = Metadata(path=path, format="jsonl", rows=rows, records=Records(rows), problems=())  # type: ignore[arg-type]
    store_rows(path, metadata, "all")
    return {"seconds": round(time.perf_counter() - started, 1), "bytes_a_row": path.stat().st_size // rows}


def read_own(folder: Path, rows: int, family: str) -> dict[str, Any]:
    """A rank reads the rows of its steps."""
    started = time.perf_counter()
    found = stored_rows(folder / "rows.sqlite", "all")
    assert found is not None
    own = range(7, rows, RANKS)
    for row in own:
        assert found[1](row)["type"] == "video"
    return {"rows": len(own), "seconds": round(time.perf_counter() - started, 2)}


def read_all(folder: Path, rows: int, family: str) -> dict[str, Any]:
    """A rank reads all rows, of a tenth of the set."""
    few, path = rows // 10, folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(fields(row))}\n" for row in range(few))
    before, started = resident(), time.perf_counter()
    metadata = read_metadata(path)
    assert metadata.rows == few
    seconds = time.perf_counter() - started
    return {"rows": few, "seconds": round(seconds, 1), "kept_bytes_a_row": (resident() - before) * 2**20 // few}


PARTS: dict[str, Callable[[Path, int, str], Any]] = {
    each.__name__: each for each in (save_table, plan, store, read_own, read_all)
}


def resident() -> int:
    """Memory of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20


def apart(part: str, folder: Path, rows: int, family: str = "") -> dict[str, Any]:
    """A part in a process of its own, with its peak."""
    arguments = [sys.executable, __file__, "--part", part, str(folder), str(rows), family]
    said = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    done: dict[str, Any] = json.loads(said.splitlines()[-1])
    print(part, family, done, flush=True)
    return done


def main() -> None:
    """Measure each part, print it and write the record."""
    arguments = parser("large_set", __doc__)
    arguments.add_argument("--part", nargs=4, metavar=("PART", "FOLDER", "ROWS", "FAMILY"), help="one part alone")
    given = arguments.parse_args()
    if given.part:
        part, folder, number, family = given.part
        done = PARTS[part](Path(folder), int(number), family) or {}
        print(json.dumps({**done, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
        return
    rows = 20_000 if given.smoke else 10_000_000
    with TemporaryDirectory() as name:
        folder, plans = Path(name), {}
        for family in FAMILY_NAMES:
            apart("save_table", folder, rows, family)
            plans[family] = apart("plan", folder, rows, family)
        others = {part: apart(part, folder, rows) for part in ("store", "read_own", "read_all")}
    write_result(given, {"rows": rows, "ranks": RANKS, "plan": plans, **others})


if __name__ == "__main__":
    main()
