"""Owns time: the one loop that trains every family, full or LoRA, under every strategy."""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vfun_cli.config import RunConfig
from vfun_cli.errors import RunError
from vfun_cli.training.adapter import ModelAdapter
from vfun_cli.training.cache import Cache
from vfun_cli.training.checkpointer import Checkpointer
from vfun_cli.training.data import LoadedBatch, batch_keys
from vfun_cli.training.encoding import encode
from vfun_cli.training.ledger import EpochLedger
from vfun_cli.training.metrics import Metrics
from vfun_cli.training.objectives import Objective
from vfun_cli.training.optim import learning_rate, set_learning_rate
from vfun_cli.training.signals import INTERRUPTED, PREEMPTED, StopFlag
from vfun_cli.training.state import TrainedState

CONTINUE = 0
OUTCOMES = {CONTINUE: "completed", INTERRUPTED: "interrupted", PREEMPTED: "preempted"}
"""Why training ends; all ranks act on the largest reason any of them saw."""


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
        self.dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.saved_step: int | None = None

    def train(self, batches: Iterator[LoadedBatch], first_step: int) -> int:
        """Train from ``first_step`` (from 0) to the end; returns why it ended (``CONTINUE``: it is complete)."""
        step, epoch = first_step, 0
        self.checkpointer.require_space(self.state)
        reason = self.stop_reason()  # asked for while the model was loading
        while step < self.total_steps and reason == CONTINUE:
            micro_batches = [self.metrics.wait(batches) for _ in range(self.config.gradient_accumulation_steps)]
            if step == first_step and first_step == 0:
                self.metrics.show_first_batch(micro_batches[0])
            epoch = micro_batches[0].batch.epoch
            reason = self.train_step(step, micro_batches)
            self.metrics.event(self.ledger.step(micro_batches))
            self.checkpointer.check()
            step += 1
            if step % self.config.checkpointing_steps == 0:
                self.save(step, epoch, background=self.config.async_checkpoint and step < self.total_steps)
                reason = max(reason, self.stop_reason())  # asked for while saving
        self.metrics.event(self.ledger.close())
        if self.saved_step != step:
            self.save(step, epoch)
        self.checkpointer.wait()
        return reason if step < self.total_steps else CONTINUE

    def stop_reason(self) -> int:
        """The gravest stop reason of any rank."""
        reasons = torch.tensor([self.stop.reason()], device=self.accelerator.device)
        return int(self.accelerator.gather(reasons).max())

    def train_step(self, step: int, micro_batches: list[LoadedBatch]) -> int:
        """One optimizer step; returns the stop reason that all ranks agree on."""
        started = time.perf_counter()
        model, optimizer, accelerator = self.state.model, self.state.optimizer, self.accelerator
        rate = learning_rate(step, self.config, self.total_steps)
        set_learning_rate(optimizer, rate)
        total, norm = torch.zeros((), device=accelerator.device), None
        for loaded in micro_batches:
            with accelerator.accumulate(model):
                loss = self.loss(model, loaded)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.trained_parameters(), self.config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach().float()
        if self.state.average is not None:
            self.state.average.update(accelerator.unwrap_model(model))
        mean, reason = self.agree(total / len(micro_batches), sum(each.weight for each in micro_batches))
        self.metrics.step(
            step + 1,
            micro_batches,
            loss=mean,
            rate=rate,
            grad_norm=_number(norm),
            seconds=time.perf_counter() - started,
        )
        if not math.isfinite(mean):
            rows = [key.row for loaded in micro_batches for key in batch_keys(loaded.batch.requests)]
            raise RunError(
                f"the loss of step {step + 1} is {mean}; rank {accelerator.process_index} trained on rows {rows}.",
                hint="Resume from the last checkpoint with a lower --learning-rate, or look at those rows.",
            )
        return reason

    def loss(self, model: nn.Module, loaded: LoadedBatch) -> Tensor:
        """The loss of one micro-batch. Encoding, noise and error are float32; the model sees the compute dtype."""
        keys = batch_keys(loaded.batch.requests)
        with torch.no_grad():
            latents, conditions = encode(self.adapter, loaded.samples, keys, self.cache)
            corrupted = self.objective.corrupt(latents, keys)
        if self.config.lora_dropout:  # torch's dropout has no key of its own: without this, resuming draws anew
            torch.manual_seed(keys[0].entropy("dropout") % 2**63)
        mask = conditions.pop("loss_mask", None)
        prediction = self.adapter.predict(
            model, corrupted.noisy.to(self.dtype), corrupted.timesteps, _cast(conditions, self.dtype)
        )
        return self.objective.loss(prediction, corrupted.target, mask) * loaded.weight

    def trained_parameters(self) -> list[nn.Parameter]:
        """All parameters of the model, as accelerate's FSDP clipping expects them; frozen ones have no gradient."""
        return list(self.state.model.parameters())

    def agree(self, loss: Tensor, weight: float) -> tuple[float, int]:
        """Mean loss over what was trained on all ranks and the gravest stop reason, in one collective.

        ``weight`` is the sum over this rank's micro-batches; it is less than their number where samples were skipped.
        """
        share = weight / self.config.gradient_accumulation_steps
        reasons = torch.tensor([loss.item(), share, float(self.stop.reason())], dtype=torch.float64)
        gathered = self.accelerator.gather(reasons.to(self.accelerator.device).unsqueeze(0)).cpu()
        trained = float(gathered[:, 1].sum())
        return float(gathered[:, 0].sum()) / trained if trained else 0.0, int(gathered[:, 2].max())

    def save(self, step: int, epoch: int, *, background: bool = False) -> Path:
        """A checkpoint after ``step`` optimizer steps."""
        progress = {**self.description, "step": step, "epoch": epoch}
        with self.metrics.saving(step):
            path = self.checkpointer.save(self.state, progress, background=background)
        self.saved_step = step
        return path


def _cast(conditions: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating tensors in the compute dtype: DeepSpeed does not autocast."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in conditions.items()
    }


def _number(norm: Any) -> float | None:
    if norm is None:
        return None
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(whole)
