"""Scripts of the tests that two processes run together."""

import os
import subprocess
import sys
from pathlib import Path


def run_on_two_ranks(script: Path, folder: Path) -> None:
    """``script FOLDER`` under torchrun.

    Raises:
        AssertionError: a rank failed; the message ends with what the ranks said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ran = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
