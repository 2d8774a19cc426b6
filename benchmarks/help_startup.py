"""``vfun --help`` beside ``accelerate --help``: the time a person waits. Run: python benchmarks/help_startup.py"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import record

ROUNDS = 11
LIMIT = 0.09
"""The most that vfun may take of accelerate's time."""


def command(name: str) -> list[str]:
    """The installed command beside this interpreter, with --help."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        sys.exit(f"{name} is not installed beside {sys.executable}: pip install -e .")
    return [found, "--help"]


def seconds(argv: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(argv, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    given = record.parser("help_startup", __doc__).parse_args()
    rounds = 1 if given.smoke else ROUNDS
    commands = {name: command(name) for name in ("vfun", "accelerate")}
    for argv in () if given.smoke else commands.values():
        seconds(argv)  # fills the page cache and the byte code
    # Taken in turns, so that other work on the machine hits both.
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, argv in commands.items():
            taken[name].append(seconds(argv))
    medians = {name: round(median(values), 3) for name, values in taken.items()}
    ratio = medians["vfun"] / medians["accelerate"]
    result = {
        "rounds": rounds,
        "median_seconds": medians,
        "fastest_seconds": {name: round(min(values), 3) for name, values in taken.items()},
        "vfun_over_accelerate": round(ratio, 3),
        "limit": LIMIT,
    }
    record.write_result(given, result)
    print(json.dumps(result, indent=1))
    if ratio > LIMIT and not given.smoke:  # one round on a busy machine proves nothing
        sys.exit(f"vfun --help takes {ratio:.3f} of accelerate --help; the limit is {LIMIT}")


if __name__ == "__main__":
    main()
