"""The record of a benchmark: when, how and on what it was measured, and the options that every script has."""

import argparse
import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from vfun_cli.acceptance import machine

RESULTS = Path(__file__).absolute().parent / "results"


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """With the options that all benchmarks have: how to see that a script runs, and where its result goes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help="as small as it can be; the result is printed, not written")
    made.add_argument(
        "--output", type=lambda text: Path(text).absolute(), help=f"where to write; default: results/{name}.json"
    )
    # The load of the benchmark itself says nothing about how quiet the machine was: ask before it starts.
    made.set_defaults(name=name, load_average=round(os.getloadavg()[0], 1))
    return made


def write_result(given: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """Write the record of these numbers, of a benchmark whose options came from ``parser``.

    A benchmark that takes long calls it after every part, so that one which is stopped leaves what it has.
    """
    text = json.dumps({**header(given), **numbers}, indent=1) + "\n"
    output = given.output or (None if given.smoke else RESULTS / f"{given.name}.json")
    if output is None:
        print(text, end="", flush=True)
    else:
        output.parent.mkdir(exist_ok=True)
        output.write_text(text, encoding="utf-8")


def header(given: argparse.Namespace) -> dict[str, Any]:
    """The date, the command, the hardware and the versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", f"benchmarks/{given.name}.py", *sys.argv[1:]]),
        "hardware": {**machine.hardware(), "load_average": given.load_average},
        "versions": machine.versions(),
    }
