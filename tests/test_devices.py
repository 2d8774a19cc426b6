"""What a process may use of the machine it runs on."""

import os
import subprocess
import sys

import pytest

from vfun_cli.devices import check_processes, cpu_cores
from vfun_cli.errors import EnvironmentFault


def test_a_process_that_was_given_one_core_counts_one_and_trains_on_one_thread() -> None:
    code = (
        "from vfun_cli.devices import cpu_cores; from vfun_cli.training.strategy import prepare_environment;"
        "import torch; prepare_environment('cpu'); print(cpu_cores(), torch.get_num_threads())"
    )
    one = min(os.sched_getaffinity(0))
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {one}),
    )  # fmt: skip
    assert said.stdout.split() == ["1", "1"]


def test_more_processes_than_cores_are_refused_and_two_always_allowed() -> None:
    check_processes("cpu", 2)
    too_many = max(2, cpu_cores()) + 1
    with pytest.raises(EnvironmentFault, match=f"processor cores for {too_many} processes"):
        check_processes("cpu", too_many)
