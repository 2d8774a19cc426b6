"""Owns time: the one loop that trains every family, full or LoRA, under every strategy."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vfun_cli.config.options import RunConfig
from vfun_cli.encoding.cache import Cache
from vfun_cli.encoding.encode import Add, encode
from vfun_cli.errors import RunError
from vfun_cli.modeling.adapter import ModelAdapter
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.transfer import Download, SideStream, upload
from vfun_cli.run.locate import way_on
from vfun_cli.run.metrics_file import only_reports
from vfun_cli.run.rundir import write_atomically
from vfun_cli.training.data.loader import LoadedBatch, batch_keys
from vfun_cli.training.forward import error_of
from vfun_cli.training.ledger import EpochLedger
from vfun_cli.training.metrics import Measured, Metrics
from vfun_cli.training.objectives import Objective
from vfun_cli.training.optim import learning_rate, set_learning_rate
from vfun_cli.training.own_gradient import OwnGradient
from vfun_cli.training.precision import compute_dtype
from vfun_cli.training.signals import CONTINUE, StopFlag
from vfun_cli.training.state.checkpointer import Checkpointer
from vfun_cli.training.state.live import TrainedState, fingerprint, master_weights
from vfun_cli.training.strategy import sum_over_groups
from vfun_cli.training.turns import begin_step
from vfun_cli.training.validation import Validation
from vfun_cli.training.waiting import gather_all, wait_for_all

VISIBLE_RATE = 1e-6
"""A step at a smaller learning rate may round away in float32 weights of size 8."""

NAMED_RANKS = 8
"""How many ranks an error names with their rows; a line each. The rows of more are in a file."""


@dataclass(frozen=True, kw_only=True)
class PendingStep:
    """A step that was handed to the device. What came of it is read after the next one was handed over too, so that
    the device never runs out of work because the host reads a number.
    """

    step: int
    """From 0."""
    micro_batches: list[LoadedBatch]
    rate: float
    ranks: Tensor
    """[ranks, numbers] float64 on the device: loss, gradient norm, masked tokens, whether its own gradient was seen to
    be no number, weight, then the fields of ``Measured``."""
    began: Any
    ended: Any
    entries: dict[str, dict[str, Download]]
    """What the cache lacked, by its keys."""


class Trainer:
    """Runs optimizer steps until the plan, the step limit or a stop request ends them."""

    def __init__(
        self,
        *,
        config: RunConfig,
        accelerator: Accelerator,
        adapter: ModelAdapter,
        state: TrainedState,
        objective: Objective,
        checkpointer: Checkpointer,
        metrics: Metrics,
        ledger: EpochLedger,
        cache: Cache | None,
        stop: StopFlag,
        total_steps: int,
        description: Mapping[str, Any],
        validation: Validation,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.adapter = adapter
        self.state = state
        self.objective = objective
        self.checkpointer = checkpointer
        self.metrics = metrics
        self.ledger = ledger
        self.cache = cache
        self.stop = stop
        self.total_steps = total_steps
        self.description = description
        self.validation = validation
        self.dtype = compute_dtype(config)
        self.own_gradient = OwnGradient(accelerator.device)
        if not config.compile:  # no hook can be inside of a compiled block: then it stays unknown whose gradient it was
            self.own_gradient.watch(state.model)
        self.side_stream = SideStream(accelerator.device, used=not config.low_vram)
        self.saved_step: int | None = None
        self.moved = False
        """Whether the weights were seen to change in this launch."""
        self.unread: tuple[PendingStep, Download] | None = None
        """The newest step, and its numbers on their way to the host."""

    def train(self, batches: Iterator[LoadedBatch | None], first_step: int) -> int:
        """Train from ``first_step`` (from 0) to the end; returns why it ended (``CONTINUE``: it is complete).

        Args:
            batches: None stands for one that is not there yet.
        """
        step, epoch = first_step, 0
        self.checkpointer.require_space(self.state)
        reason = self.validate(step)
        while reason == CONTINUE and step < self.total_steps:
            reason, micro_batches = begin_step(
                lambda: self.next_micro_batch(batches), self.config.gradient_accumulation_steps, self.stop,
                self.adapter.encoders,
            )  # fmt: skip
            if reason != CONTINUE:
                break
            if step == first_step and first_step == 0:
                self.metrics.show_first_batch(micro_batches[0])
                wait_for_all()  # rank 0 has written videos
            epoch = micro_batches[0].batch.epoch
            looks = not self.moved and learning_rate(step, self.config, self.total_steps) >= VISIBLE_RATE
            before = fingerprint(self.state) if looks else None
            pending = self.enqueue(step, micro_batches)
            self.read()
            self.unread = pending, Download(pending.ranks)
            if before is not None:
                self.read()  # DeepSpeed leaves out a bad step, which then changes nothing
                self.look_for_change(before, micro_batches)
            epoch_record = self.ledger.step(micro_batches)
            step += 1
            # At the end, too, before it is looked at: that may take minutes, in which a kill should cost no step.
            saves = step % self.config.checkpointing_steps == 0 or step == self.total_steps
            if saves or epoch_record is not None:
                self.read()  # no checkpoint of a state that a bad step has spoilt
                self.metrics.event(epoch_record)
            if saves:
                self.save(step, epoch, background=self.config.async_checkpoint and step < self.total_steps)
            reason = self.validate(step)
        self.read()
        self.metrics.event(self.ledger.close())
        if self.saved_step != step:
            self.save(step, epoch)
        self.checkpointer.wait()
        return reason

    def validate(self, step: int) -> int:
        """Look at the run from outside, if that is due after ``step``; returns why to stop, or ``CONTINUE``."""
        if not self.validation.due(step):
            return CONTINUE
        self.read()  # nothing is said of a state that a bad step has spoilt
        with self.metrics.looking(), self.adapter.encoders.for_now():
            reason = self.validation.run(step)
        if (
            self.accelerator.device.type == "cuda"
        ):  # a video takes more than a step, and what torch keeps NCCL cannot have
            torch.cuda.empty_cache()
        return reason

    def next_micro_batch(self, batches: Iterator[LoadedBatch | None]) -> LoadedBatch | None:
        """The next one of this rank, None if it is not there yet.

        Raises:
            VfunError: a clip cannot be decoded, or a checkpoint could not be written in the background.
        """
        self.checkpointer.raise_background_error()
        return self.metrics.wait(batches)

    def enqueue(self, step: int, micro_batches: list[LoadedBatch]) -> PendingStep:
        """Hand one optimizer step to the device. Nothing in it waits for the device."""
        model, optimizer, accelerator = self.state.model, self.state.optimizer, self.accelerator
        began = self.metrics.clock.mark()
        rate = learning_rate(step, self.config, self.total_steps)
        set_learning_rate(optimizer, rate)
        total, norm = torch.zeros((), device=accelerator.device), None
        masked = torch.zeros((), device=accelerator.device)
        entries: dict[str, dict[str, Download]] = {}

        def add(key: str, output: Output) -> None:
            entries[key] = {name: Download(values) for name, values in output.items()}

        for left, loaded in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            sum_over_groups(self.config, model, last=not left)
            with accelerator.accumulate(model):
                loss, masked_tokens = self.loss(model, loaded, None if self.cache is None else add)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.trained_parameters(), self.config.max_grad_norm or math.inf)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach().float()
            masked += masked_tokens
        if not accelerator.sync_gradients:
            raise RunError(
                f"{len(micro_batches)} micro-batches made no optimizer step.",
                hint="This is a fault of vfun or of accelerate; please report it.",
            )
        if self.state.average is not None:
            self.state.average.update(master_weights(self.state), step)
        ranks = self.gather(
            (total / len(micro_batches), _on_device(norm, accelerator.device), masked, self.own_gradient.take()),
            (
                sum(each.weight for each in micro_batches) / self.config.gradient_accumulation_steps,
                *self.metrics.measure(micro_batches),
            ),
        )
        return PendingStep(
            step=step,
            micro_batches=micro_batches,
            rate=rate,
            ranks=ranks,
            began=began,
            ended=self.metrics.clock.mark(),
            entries=entries,
        )

    def look_for_change(self, before: Tensor, micro_batches: list[LoadedBatch]) -> None:
        """Make sure, once a launch, that training trains; this waits for the device.

        Raises:
            RunError: no weight has changed, on any rank.
        """
        changed = (fingerprint(self.state) != before).any().double()
        weight = torch.full_like(changed, sum(each.weight for each in micro_batches))
        ranks = self.accelerator.gather(torch.stack([changed, weight]).unsqueeze(0))
        changed_ranks, trained = ranks.sum(dim=0).tolist()
        self.moved = bool(changed_ranks)
        if trained and not self.moved:  # where all samples were skipped, the next step tells
            raise RunError(
                "an optimizer step changed none of the weights.",
                hint="Check --max-grad-norm and the options of the optimizer: nothing would be trained.",
            )

    def gather(self, on_device: tuple[Tensor, ...], on_host: tuple[float, ...]) -> Tensor:
        """[ranks, numbers] float64 on the device: a step's numbers of all ranks, in one collective."""
        device = self.accelerator.device
        known = upload(torch.tensor(on_host, dtype=torch.float64), device)
        mine = torch.cat([torch.stack([value.detach().double() for value in on_device]), known])
        ranks: Tensor = self.accelerator.gather(mine.unsqueeze(0))
        return ranks

    def read(self) -> None:
        """What came of the newest step, if that was not read yet: record it, and add to the cache what that lacked.

        Raises:
            EnvironmentFault: the cache cannot take it.
            RunError: its loss or its gradient norm is not a number; on all ranks alike, before anything is saved.
        """
        if self.unread is None:
            return
        (pending, download), self.unread = self.unread, None
        ranks = download.numbers()
        if self.cache is not None:
            for key, entry in pending.entries.items():
                self.cache.write(key, {name: arriving.tensor() for name, arriving in entry.items()})
        # A rank that skipped samples trained on less; each counts by its weight.
        losses, norms, masked, broken, weights = (
            list(column) for column in zip(*(row[:5] for row in ranks), strict=True)
        )
        mean = sum(losses) / sum(weights) if sum(weights) else 0.0
        self.metrics.step(
            pending.step + 1,
            pending.micro_batches,
            loss=mean,
            rate=pending.rate,
            grad_norm=norms[0] if math.isfinite(norms[0]) else None,
            masked_tokens=sum(masked),
            ranks=[Measured(*row[5:]) for row in ranks],
            began=pending.began,
            ended=pending.ended,
        )
        if not math.isfinite(mean):
            self.refuse(pending, "loss", mean, [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)])
        if not math.isfinite(norms[0]):  # of all ranks together
            seen = [rank for rank, own in enumerate(broken) if own]
            self.refuse(pending, "gradient norm", norms[0], seen or range(len(norms)))

    def refuse(self, pending: PendingStep, what: str, value: float, ranks: Sequence[int]) -> NoReturn:
        """Stop, on all ranks together, at a step that has spoilt the weights.

        Args:
            ranks: those of which it may have come.

        Raises:
            RunError: with the rows that these trained on.
        """
        self.checkpointer.wait()  # whether there is one to go on from
        rows = gather_all([key.row for loaded in pending.micro_batches for key in batch_keys(loaded.batch.requests)])
        named = [f"rank {rank} trained on rows {rows[rank]}" for rank in ranks[:NAMED_RANKS]]
        if len(ranks) > NAMED_RANKS:
            file = self.checkpointer.run.bad_step
            if self.accelerator.is_main_process:
                with only_reports(f"{file} cannot be written"):
                    content = {"step": pending.step + 1, "rows": {rank: rows[rank] for rank in ranks}}
                    write_atomically(file, json.dumps(content))
            named.append(f"the rows of all {len(ranks)} such ranks are in {file}")
        raise RunError(
            f"the {what} of step {pending.step + 1} is {value}; {'; '.join(named)}.",
            hint="Look at those rows, or try a lower learning rate. "
            + way_on(self.checkpointer.run, learning_rate=f"{self.config.learning_rate / 10:g}"),
        )

    def loss(self, model: nn.Module, loaded: LoadedBatch, add: Add | None = None) -> tuple[Tensor, Tensor | int]:
        """The loss of one micro-batch, and how many of its tokens are masked. ``add``: see ``encode``."""
        keys = batch_keys(loaded.batch.requests)
        with torch.no_grad(), self.side_stream.context():
            latents, conditions = encode(self.adapter, loaded.samples, keys, add, loaded.shared_calls)
            corrupted = self.objective.corrupt(latents, keys)
        self.side_stream.hand_over([*vars(corrupted).values(), *conditions.values()])
        if self.config.lora_dropout:  # torch's dropout has no key of its own: without this, resuming draws anew
            torch.manual_seed(keys[0].entropy("dropout") % 2**63)
        error = error_of(self.adapter, self.objective, model, corrupted, conditions, self.dtype)
        seen = conditions.get("text_mask")
        return error * loaded.weight, 0 if seen is None else (seen == 0).sum()

    def trained_parameters(self) -> list[nn.Parameter]:
        """All parameters of the model, as accelerate's FSDP clipping expects them; frozen ones have no gradient."""
        return list(self.state.model.parameters())

    def save(self, step: int, epoch: int, *, background: bool = False) -> Path:
        """A checkpoint after ``step`` optimizer steps."""
        run_state = {**self.description, "step": step, "epoch": epoch}
        with self.metrics.saving(step):
            path = self.checkpointer.save(self.state, run_state, background=background)
        self.saved_step = step
        return path


def _on_device(norm: Any, device: torch.device) -> Tensor:
    """The gradient norm as every strategy has it: a tensor, one in parts, or a number.

    DeepSpeed leaves out a step whose norm is not finite, and says that it is infinite.
    """
    if isinstance(norm, Tensor):
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole.to(device)
    return torch.full((), float(norm), device=device)
