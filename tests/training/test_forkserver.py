"""The server that decoding processes come from: a fork of its rank, with nothing of it but what was imported."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import json, os, signal, sys, threading
from multiprocessing import forkserver as library
from pathlib import Path
from vfun_cli.training.data import forkserver

def main():
    forkserver.DECODING = "json"
    held = open(sys.argv[1])
    threads = []
    if sys.argv[2] == "threads":
        waits = threading.Event()
        threads = [threading.Thread(target=waits.wait, daemon=True)]
        threads[0].start()
    forkserver.start_early("fractions")
    early = library._forkserver._forkserver_pid
    forkserver.start("fractions")
    server = library._forkserver._forkserver_pid
    results = forkserver.PROCESSES.SimpleQueue()
    worker = forkserver.PROCESSES.Process(target=results.put, args=(7,))
    worker.start()
    answer = results.get()
    worker.join()
    opened = [str(path.resolve()) for path in Path(f"/proc/{server}/fd").iterdir()]
    status = Path(f"/proc/{server}/status").read_text()
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    print(json.dumps({
        "early": early is not None, "same": early == server, "answer": answer, "held": str(Path(sys.argv[1])) in opened,
        "forked": Path(f"/proc/{server}/cmdline").read_bytes() == Path("/proc/self/cmdline").read_bytes(),
        "deaf": bool(ignored >> (signal.SIGTERM - 1) & 1), "server": server,
    }))

if __name__ == "__main__":
    main()
"""


def started(folder: Path, how: str) -> dict[str, object]:
    held = folder / "lock"
    held.touch()
    script = folder / "rank.py"
    script.write_text(SCRIPT)
    argv = [sys.executable, str(script), str(held), how]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_server_is_a_fork_that_holds_no_files_of_the_rank_and_ends_with_it(tmp_path: Path) -> None:
    found = started(tmp_path, "alone")
    server = found.pop("server")
    assert found == {"early": True, "same": True, "answer": 7, "held": False, "forked": True, "deaf": True}
    for _ in range(1000):
        if _has_ended(Path(f"/proc/{server}/status")):
            return
        time.sleep(0.01)
    raise AssertionError("it outlives its rank")


def _has_ended(status: Path) -> bool:
    try:
        return "(zombie)" in status.read_text()
    except OSError:
        return True


@pytest.mark.slow
def test_a_process_with_threads_is_not_forked(tmp_path: Path) -> None:
    found = started(tmp_path, "threads")
    assert not found["early"] and not found["forked"] and found["answer"] == 7
