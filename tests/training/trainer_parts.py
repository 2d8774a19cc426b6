"""A trainer over any model, adapter and objective, in one process."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from torch import nn

from vfun_cli.config.options import RunConfig
from vfun_cli.encoding.cache import Cache
from vfun_cli.encoding.encode import Sample
from vfun_cli.families.spec import ClipShape
from vfun_cli.modeling.adapter import SampleRequest
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.plan.flops import Costs
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.data.loader import LoadedBatch, MicroBatch
from vfun_cli.training.meter import trained_share
from vfun_cli.training.metrics import Metrics
from vfun_cli.training.optim import make_optimizer, trainable
from vfun_cli.training.signals import CONTINUE
from vfun_cli.training.state.ema import WeightAverage
from vfun_cli.training.state.live import TrainedState, master_weights
from vfun_cli.training.trainer import Trainer
from vfun_cli.training.validation import Validation


def batch(step: int, shape: ClipShape) -> LoadedBatch:
    request = SampleRequest(
        key=SampleKey(seed=1, epoch=0, row=step), record={}, kind="video", frames=shape.frames, height=shape.height,
        width=shape.width, stride=1, total_frames=40, fps=(16, 1),
    )  # fmt: skip
    return loaded(step, [request], [Sample(inputs={}, values={})])


def loaded(step: int, requests: Sequence[SampleRequest], samples: Sequence[Sample]) -> LoadedBatch:
    """The only micro-batch of a step."""
    return LoadedBatch(batch=MicroBatch(epoch=0, step=step, index=0, requests=tuple(requests)), samples=list(samples))


class Saves:
    """Notes which steps were saved."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.steps: list[int] = []

    def require_space(self, state: Any) -> None: ...
    def raise_background_error(self) -> None: ...
    def wait(self) -> None: ...

    def save(self, state: Any, progress: dict[str, Any], *, background: bool) -> Path:
        self.steps.append(progress["step"])
        return Path()


class Parts:
    """A trainer over any model, adapter and objective, in one process."""

    def __init__(
        self, folder: Path, model: nn.Module, live: Any, adapter: Any, objective: Any, *, cache: Cache | None = None,
        mixed_precision: str = "no", first_step: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        device = next(model.parameters()).device
        self.config = RunConfig(
            mixed_precision=mixed_precision, lr_scheduler="constant", **{"report_to": "none", **options}
        )  # fmt: skip
        accelerator: Any = Accelerator(cpu=True, gradient_accumulation_steps=self.config.gradient_accumulation_steps)
        accelerator.device_placement = False
        run = RunDir(folder)
        self.metrics_file = run.metrics
        self.saves, self.stop = Saves(run), SimpleNamespace(reason=lambda: CONTINUE)
        costs = Costs(spec=live.spec, dims=live.dims, share=trained_share(model))
        optimizer = make_optimizer(trainable(model), self.config, device)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.state.device = device
        checkpointer: Any = self.saves
        state = TrainedState(accelerator=accelerator, model=model, optimizer=optimizer)
        if self.config.use_ema:
            state.average = WeightAverage(master_weights(state), self.config.ema_decay)
        ledger: Any = SimpleNamespace(step=lambda batches: None, close=lambda: None)
        stop: Any = self.stop
        self.accelerator = accelerator
        self.trainer = Trainer(
            config=self.config, accelerator=accelerator, adapter=adapter,
            state=state, objective=objective, checkpointer=checkpointer, ledger=ledger, cache=cache, stop=stop,
            total_steps=6,
            description={}, validation=Validation(iter(()), []),
            metrics=Metrics(
                run, self.config, costs=costs, peak_flops=None, device=device, writes=True, first_step=first_step,
                total_steps=6,
            ),
        )  # fmt: skip

    def lines(self) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.metrics_file.read_text().splitlines()]
        return [line for line in found if "event" not in line]
