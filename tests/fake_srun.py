"""``srun`` of the tests: starts one command for each task of each machine, and sets what SLURM sets.

fake_srun.py TASKS_A_MACHINE PORT FOLDER... -- COMMAND...
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.started import Place, step


def main(tasks: str, port: str, *others: str) -> int:
    """The highest code of all tasks."""
    folders, command = others[: others.index("--")], others[others.index("--") + 1 :]
    started = []
    for machine, folder in enumerate(folders):
        for task in range(int(tasks)):
            at = Place(
                machines=len(folders), machine=machine, each=1, address="127.0.0.2", port=int(port), local_rank=task
            )
            environ = os.environ | {**step(at, int(tasks)), "SLURM_STEP_NODELIST": f"127.0.0.[2-{1 + len(folders)}]"}
            environ.pop("SLURM_GPUS_ON_NODE")
            started.append(subprocess.Popen(command, cwd=folder, env=environ))
    return max(process.wait() for process in started)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
