"""Assembles one rank of a run from its ``run.json`` and trains it to its end."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.encoding.cache import Cache
from vfun_cli.families import adapter_of
from vfun_cli.modeling.adapter import ModelAdapter
from vfun_cli.plan.flops import Costs
from vfun_cli.plan.queue import micro_batches_ahead
from vfun_cli.plan.run_plan import load_plan
from vfun_cli.run.messages import ENDINGS, Outcome
from vfun_cli.run.metrics_file import only_reports
from vfun_cli.run.ownership import delete_samples
from vfun_cli.run.rundir import RunDir
from vfun_cli.sampling.schedules import make_schedule
from vfun_cli.training.agreement import all_or_none, require_one_directory, require_one_job
from vfun_cli.training.data.loader import load_ahead, load_held_out
from vfun_cli.training.data.stream import held_out_requests, micro_batches, row_reader
from vfun_cli.training.heldout import HeldOutLoss
from vfun_cli.training.ledger import EpochLedger
from vfun_cli.training.lora import ADAPTER_FORMAT
from vfun_cli.training.meter import peak_flops, trained_share
from vfun_cli.training.metrics import Metrics
from vfun_cli.training.model import (
    adapter_options,
    choose_weights,
    load_adapter,
    prepare_blocks,
    prepare_state,
    share_encoders,
)
from vfun_cli.training.objectives import make_objective
from vfun_cli.training.precision import compute_dtype
from vfun_cli.training.sampled_rows import RowReader, prompts_to_sample, rows_to_sample
from vfun_cli.training.samples import Samples
from vfun_cli.training.signals import StopFlag
from vfun_cli.training.state.checkpointer import Checkpointer
from vfun_cli.training.strategy import make_accelerator, prepare_environment
from vfun_cli.training.trainer import Trainer
from vfun_cli.training.validation import Validation, held_out_look, samples_look
from vfun_cli.training.variant import variant_of
from vfun_cli.training.waiting import most_of_all, wait_for_all


def train(run: RunDir, described: Mapping[str, Any], stop: StopFlag) -> None:
    """Train the run that ``described`` (the content of run.json) resolves to."""
    config, spec = RunConfig.from_json(described["config"]), families.find(described["family"])
    prepare_environment(config.device)
    accelerator = make_accelerator(config)
    most_of_all([0])  # hosts that do not reach each other end here: the patient group would try that for hours
    if config.num_machines > 1:
        require_one_directory(run)
    require_one_job(described)
    torch.manual_seed(config.seed)  # only layers with their own randomness use it; data and noise have keys
    lora, resume = described["command"] == "lora", described.get("resume")
    with all_or_none():
        plan = load_plan(config, spec, described)
        options = adapter_options(config, spec, accelerator.device)
        adapter, lazy = load_adapter(spec, options)
    share_encoders(config, adapter, accelerator)
    with all_or_none():
        cache = _encoders_or_cache(config, adapter)
        choose_weights(config, plan, adapter.transformer, lazy, lora=lora, fresh=resume is None)
        prepare_blocks(config, plan, adapter.transformer)
    costs = Costs(spec=spec, dims=plan.dims, share=trained_share(adapter.transformer))
    state = prepare_state(config, spec, adapter, accelerator, lazy)
    checkpointer = _checkpointer(run, config, described, options.model_dir / spec.model.config_file)
    first_step = 0 if resume is None else int(checkpointer.load(state, Path(resume))["step"])

    if resume is not None and accelerator.is_main_process:
        with only_reports(f"samples after step {first_step} cannot be deleted"):
            delete_samples(run, after=first_step)
    with all_or_none():
        metrics = Metrics(
            run,
            config,
            costs=costs,
            peak_flops=peak_flops(accelerator.device, config.peak_tflops),
            device=accelerator.device,
            writes=accelerator.is_main_process,
            first_step=first_step,
            total_steps=plan.steps(),
        )
        objective = make_objective(
            spec.model.objective, spec.model.objective_options, options.model_dir, variant_of(config)
        )
        read_row = row_reader(config, spec, stored=described.get("rows"), digest=described["metadata_sha256"])
        held_out = HeldOutLoss(
            accelerator=accelerator,
            adapter=adapter,
            state=state,
            objective=objective,
            dtype=compute_dtype(config),
            requests=held_out_requests(plan, config, read_row),
            load=partial(load_held_out, adapter_of(spec), options=options, cache=cache),
            cache=cache,
            stop=stop,
        )
    stop.announce()
    ledger = EpochLedger(accelerator, first_step)
    looks = [held_out_look(held_out, metrics, run, first_step)] if held_out.requests else []
    prompts = prompts_to_sample(config, spec, plan.dims)
    if plan.samples is not None and (held_out.requests or prompts):
        samples = Samples(
            accelerator=accelerator,
            adapter=adapter,
            state=state,
            schedule=partial(make_schedule, spec, options.model_dir, plan.samples.steps),
            dtype=compute_dtype(config),
            rows=[*rows_to_sample(plan.samples, spec, held_out.requests), *prompts],
            reader=RowReader(adapter=adapter, cache=cache, stop=stop, clips=run.sampled_clips),
            in_step=STRATEGIES[config.strategy].gathers is not None,
            tell=metrics.tell,
        )
        looks.append(samples_look(samples, metrics, run, first_step))
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        adapter=adapter,
        state=state,
        objective=objective,
        checkpointer=checkpointer,
        metrics=metrics,
        ledger=ledger,
        cache=cache,
        stop=stop,
        total_steps=plan.steps(),
        description=_state_of(config, described, accelerator),
        validation=Validation(plan.validations(), looks),
    )
    loaded = load_ahead(
        adapter_of(spec),
        options,
        micro_batches(plan, read_row, rank=accelerator.process_index, first_step=first_step, tell=ledger.plan),
        config.dataloader_num_workers,
        config.on_bad_sample,
        cache,
        prefetch=micro_batches_ahead(config, plan),
    )
    reason = trainer.train(loaded, first_step)
    metrics.close()
    if accelerator.is_local_main_process:
        Outcome(ending=ENDINGS[reason], step=trainer.saved_step or 0).write(run, config.machine_rank)
    wait_for_all()  # trackers may take a while to say the last of it


def _checkpointer(run: RunDir, config: RunConfig, described: Mapping[str, Any], config_file: Path) -> Checkpointer:
    return Checkpointer(
        run,
        config.strategy,
        keep=config.checkpoints_total_limit,
        config_files={config_file.name: config_file},
        format=ADAPTER_FORMAT if described["command"] == "lora" else None,
        staging=Path(described["staging"]) if described.get("staging") else None,
    )


def _encoders_or_cache(config: RunConfig, adapter: ModelAdapter) -> Cache | None:
    """The run's cache, whose entries need no encoder; without one, all encoders are loaded."""
    if config.cache is not None:
        return Cache.for_encoders(config.cache, adapter.encoders)
    adapter.encoders.load()
    return None


def _state_of(config: RunConfig, described: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """What ``state.json`` says of the run beside the step."""
    return {
        "run_id": described.get("id"),
        "strategy": config.strategy,
        "world_size": accelerator.num_processes,
        "family": described["family"],
        "kind": described["command"],
        "layouts": described.get("layouts", []),
        "contents": described.get("contents", {}),
        "allowed": described.get("allowed", []),
        "run_config": config.to_json(),
    }
