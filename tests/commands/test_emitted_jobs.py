"""Files of ``--emit`` in a scheduler's hands: started, preempted, started again, and at the end the same weights."""

import shutil
from pathlib import Path

import pytest

from tests.commands.conftest import QUICK, Vfun
from tests.jobs import last_step, losses, vfun_process, wait_for_step
from tests.machines import free_port, hosts
from tests.schedulers import SCHEDULERS, without_image
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.lora_files import ADAPTER_FILE
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

STEPS = 16
JOB = (
    "lora", "cogvideox-fun", "--demo", *QUICK, "--device=cpu", "--ddp", "--num-processes=2",
    f"--max-train-steps={STEPS}", "--checkpointing-steps=1000", "--report-to=none",
)  # fmt: skip
FILLED_IN = {
    "<IMAGE>": "registry.example.com/vfun:1", "<MOUNTS>": "/shared:/shared", "<CLAIM>": "shared", "<MOUNT>": "/shared",
    "<VOLUME>": "shared",
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The same job in one command on one machine."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        run = RunDir(folder / "run")
        vfun_process(*JOB, "--output-dir", run.root, code=0)
    return run


@pytest.mark.parametrize("engine", SCHEDULERS)
def test_a_job_that_is_preempted_is_started_again_and_ends_with_the_same_weights(
    engine: str, vfun: Vfun, place: Path, uninterrupted: RunDir
) -> None:
    run, port = RunDir(place / "a shared disk" / "it's a run"), free_port()
    said = vfun(*JOB, "--emit", engine, "--nodes=2", f"--main-process-port={port}", "--output-dir", str(run.root))
    assert said.code == 0, said.err
    text = without_image(said.out)
    for placeholder, value in FILLED_IN.items():
        text = text.replace(placeholder, value)
    (place / "submitted").mkdir()
    scheduler = SCHEDULERS[engine](text, hosts(2, place / "machines"), place / "submitted", port)
    try:
        wait_for_step(run, 2, scheduler.start())
        scheduler.warn()
        assert scheduler.finish() == 0
    finally:
        scheduler.end()
    assert scheduler.starts == 2
    saved = [step for step, _ in manifest.numbered(run.root)]
    assert len(saved) == 2 and 2 <= saved[0] < saved[1] == STEPS, "where it was preempted, and at the end"
    assert last_step(run) == STEPS and losses(run) == losses(uninterrupted)
    weights = [each.checkpoint(STEPS) / "model" / ADAPTER_FILE for each in (run, uninterrupted)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
