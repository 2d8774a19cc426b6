"""Two ranks, as two machines of one process each: what one meets or has otherwise, both raise in the same words."""

import json
import sys
from collections.abc import Callable
from itertools import count, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

from tests.run.small_run import CONFIG, DESCRIBED
from vfun_cli.errors import FitError, MetadataError, RunError, VfunError
from vfun_cli.modeling.adapter import Inputs, SampleRequest
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.run.contents import Contents, write_contents
from vfun_cli.run.rundir import RunDir
from vfun_cli.training import agreement, looking
from vfun_cli.training.agreement import all_or_none, require_one_directory, require_one_job
from vfun_cli.training.data.loader import MicroBatch, load_ahead
from vfun_cli.training.ending import end_with
from vfun_cli.training.looking import Stopped, asking, heeding
from vfun_cli.training.signals import CONTINUE, PREEMPTED
from vfun_cli.training.state.checkpointer import Checkpointer
from vfun_cli.training.state.live import TrainedState
from vfun_cli.training.trainer import Trainer
from vfun_cli.training.turns import begin_step

folder = Path(sys.argv[1])
agreement.SEEN_WITHIN, looking.ASKED_EVERY = 0.3, 0
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
said: dict[str, Any] = {}
GOES_ON: Any = SimpleNamespace(reason=lambda: CONTINUE)
NO_ENCODERS = Encoders({}, torch.device("cpu"))


def noted(name: str, work: Callable[[], object]) -> None:
    try:
        said[name] = work()
    except VfunError as error:
        said[name] = [type(error).__name__, error.message, error.rank]
    except ZeroDivisionError:
        said[name] = "its own"
    except Stopped as stopped:
        said[name] = ["stopped", stopped.reason]


def fails_on(*ranks: int, error: Exception) -> None:
    with all_or_none():
        if rank in ranks:
            raise error


def job(**changed: object) -> dict[str, Any]:
    return {
        **DESCRIBED,
        "plan_digest": "a",
        "config": {**CONFIG, "machine_rank": rank, "learning_rate": 1e-4},
        **changed,
    }


def one(path: Path) -> RunDir:
    path.mkdir(exist_ok=True)
    (path / "logs").mkdir(exist_ok=True)
    return RunDir(path)


def two_models() -> object:
    """Of which a file differs between the machines, as their launch folders tell."""
    run = one(folder / "run")
    contents = {"pretrained_model_name_or_path": Contents(pieces={"config.json": "0", "vae/weights.bin": str(rank)})}
    write_contents(run.contents(rank), contents)
    accelerator.wait_for_everyone()
    digests = {name: each.digest for name, each in contents.items()}
    return require_one_job(job(contents=digests, run_dir=str(run.root)))


def full_memory() -> object:
    """A save in the background for which the second machine's memory is too small."""
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    state = TrainedState(accelerator=accelerator, model=model, optimizer=optimizer)
    staging = folder / f"memory-{rank}" / "of-this-launch"
    staging.parent.mkdir()
    saver = Checkpointer(one(folder / "run"), "ddp", keep=None, config_files={}, staging=staging)
    if rank == 1:
        saver._require_memory = refuse  # type: ignore[method-assign]
    return str(saver.save(state, {"step": 1}, background=True))


class BadClip:
    """A model whose row 7 cannot be decoded."""

    @staticmethod
    def inputs(request: SampleRequest, options: object) -> Inputs:
        if request.key.row == 7:
            raise MetadataError("the file ends.")
        return {}


def begun(*, late: bool) -> object:
    """The first step of two ranks, of which the second has row 7; the first one's clips come in time or never."""
    request = SampleRequest(
        key=SampleKey(seed=1, epoch=0, row=[3, 7][rank]), record={}, kind="video", frames=1, height=16, width=16,
        stride=1, total_frames=1, fps=(1, 1),
    )  # fmt: skip
    batches = iter([MicroBatch(epoch=0, step=0, index=0, requests=(request,))])
    loaded = load_ahead(BadClip, {}, batches, 0)  # type: ignore[arg-type]
    never = late and rank == 0
    return begin_step(lambda: None if never else next(loaded), 1, GOES_ON, NO_ENCODERS)


def lost_checkpoint() -> object:
    """A checkpoint that the first rank could not write in the background, while the second one waits for clips."""
    saver = Checkpointer(one(folder / "run"), "ddp", keep=None, config_files={})
    if rank == 0:
        saver.background.start(no_room)
    trainer: Any = SimpleNamespace(checkpointer=saver, metrics=SimpleNamespace(wait=next))
    return begin_step(lambda: Trainer.next_micro_batch(trainer, repeat(None)), 1, GOES_ON, NO_ENCODERS)


def at_work(*, wished_at: int) -> object:
    """The second rank works for as long as a hundred questions; the first one, which waits for it, is asked to stop."""
    questions = count()
    wish: Any = SimpleNamespace(reason=lambda: PREEMPTED if rank == 0 and next(questions) >= wished_at else CONTINUE)
    ask = asking(wish, torch.device("cpu"))

    def work() -> str:
        for _ in range(100 * rank):
            ask()
        return "done"

    return heeding(wish, work)


def no_room() -> None:
    raise RunError("no room.")


def refuse(*_: object) -> None:
    raise FitError("no memory.")


def main() -> int:
    noted("nobody fails", lambda: fails_on(error=FitError("x.")))
    noted("one fails", lambda: fails_on(1, error=FitError("no memory.")))
    noted("both fail", lambda: fails_on(0, 1, error=FitError(f"of {rank}.")))
    noted("a foreign error", lambda: fails_on(1, error=ZeroDivisionError("by zero")))
    noted("one directory", lambda: require_one_directory(one(folder / "run")))
    noted("two directories", lambda: require_one_directory(one(folder / f"run-{rank}")))
    noted("one job", lambda: require_one_job(job()))
    noted("two plans", lambda: require_one_job(job(plan_digest=f"plan {rank}")))
    noted("two models", two_models)
    noted("full memory", full_memory)
    noted("a bad clip", lambda: begun(late=False))
    noted("a bad clip while others wait", lambda: begun(late=True))
    noted("a lost checkpoint", lost_checkpoint)
    noted("work of one rank", lambda: at_work(wished_at=1000))
    noted("work of one rank, stopped", lambda: at_work(wished_at=50))
    noted("work that fails", lambda: heeding(GOES_ON, lambda: 1 // (1 - rank)))
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    return 0


end_with(main)  # a thread still waits for a clip that never comes
