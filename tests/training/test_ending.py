"""How training processes end."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit
from vfun_cli.training.ending import end_with

class Torn:
    def __del__(self):
        print("taken apart")

torn = Torn()

def work():
    atexit.register(print, "exit handler")
    {end}

end_with(work)
"""


@pytest.mark.parametrize(("end", "code", "said"), [("return 3", 3, ""), ("raise ValueError('why')", 1, "why")])
def test_a_process_ends_with_the_code_of_its_work_before_it_is_taken_apart(end: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "exit handler\n")
    assert said in done.stderr
