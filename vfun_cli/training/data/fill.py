"""Fills the cache ahead of a run: the ranks share the clips of the plan and encode what is missing of theirs."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from accelerate.utils import gather_object

from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.encoding.cache import Cache
from vfun_cli.encoding.encode import outputs_of
from vfun_cli.families import adapter_of
from vfun_cli.modeling.adapter import AdapterOptions, ModelAdapter, SampleRequest
from vfun_cli.plan.queue import micro_batches_ahead
from vfun_cli.plan.run_plan import RunPlan, load_plan
from vfun_cli.run.cachedir import prune
from vfun_cli.run.messages import ENDINGS, FillReport, Outcome
from vfun_cli.run.metrics_file import MetricsFile
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.agreement import all_or_none, require_one_job
from vfun_cli.training.data.loader import MicroBatch, load_ahead
from vfun_cli.training.data.stream import ReadRow, held_out_requests, micro_batches, row_reader
from vfun_cli.training.model import adapter_options
from vfun_cli.training.signals import CONTINUE, StopFlag
from vfun_cli.training.strategy import make_accelerator, prepare_environment


def fill_cache(run: RunDir, described: Mapping[str, Any], stop: StopFlag) -> None:
    """Encode what the cache does not have of the run that ``described`` resolves to.

    Entries are independent of each other: stopped or killed at any time, the next call goes on from there.
    """
    config = RunConfig.from_json(described["config"])
    spec = families.find(described["family"])
    assert config.cache is not None and config.num_processes is not None
    prepare_environment(config.device)
    accelerator = make_accelerator(replace(config, gradient_accumulation_steps=1))
    require_one_job(described)
    adapter, rank = adapter_of(spec), accelerator.process_index
    with all_or_none():
        options = adapter_options(config, spec, accelerator.device)
        encoders = adapter.encoders_of(options)
        cache = Cache.for_encoders(config.cache, encoders)
        needed = MissingEntries(adapter, options, cache)
        plan = load_plan(config, spec, described)
        read_row = row_reader(config, spec, stored=described.get("rows"), digest=described["metadata_sha256"])
        held_out = held_out_requests(plan, config, read_row)
        work = list(needed.missing(plan, read_row, rank, accelerator.num_processes, held_out))
    if described.get("prune"):
        everyone: list[set[str]] = gather_object([needed.keys])
        if accelerator.is_main_process:
            prune(config.cache, set().union(*everyone))
    progress = FillMetrics(run, len(work), shows=accelerator.is_main_process)
    stop.announce()
    stop.reads_file = True  # on every rank: they do not ask each other
    reason = CONTINUE
    ahead = micro_batches_ahead(config, plan)
    for loaded in load_ahead(
        adapter, options, iter(work), config.dataloader_num_workers, config.on_bad_sample, cache, prefetch=ahead
    ):
        if loaded is not None:
            outputs_of(encoders, loaded.samples, cache.write)
            progress.step()
        reason = stop.reason()
        if reason != CONTINUE:
            break
    # No collective at the end: a rank with less work would wait for the others longer than a collective may take.
    FillReport(rank=rank, ending=ENDINGS[reason], encoded=progress.done, needed=len(needed.keys)).write(run)
    write_outcome(run, config.machine_rank, ranks=config.num_processes // config.num_machines)


def write_outcome(run: RunDir, machine_rank: int, *, ranks: int) -> None:
    """Of the ranks of this machine together, by the last of them to be done; each machine has a folder of its own."""
    reports = FillReport.read_all(run)
    if len(reports) == ranks:
        worst = max((report.ending for report in reports), key=ENDINGS.index)
        Outcome(ending=worst, step=sum(report.encoded for report in reports)).write(run, machine_rank)


class MissingEntries:
    """The entries that a run will ask for of one rank's share of its clips."""

    def __init__(self, adapter: type[ModelAdapter], options: AdapterOptions, cache: Cache) -> None:
        self.adapter = adapter
        self.options = options
        self.cache = cache
        self.keys: set[str] = set()

    def missing(
        self, plan: RunPlan, read_row: ReadRow, rank: int, world_size: int, held_out: Sequence[SampleRequest]
    ) -> Iterator[MicroBatch]:
        """One micro-batch for each clip of which an entry is not there yet, each entry once; the held-out ones last.

        All epochs of a clip are one rank's: training has it on any rank, and each of them would encode it.
        """
        trained = self._trained(plan, read_row, rank, world_size)
        for number, request in enumerate(chain(trained, held_out[rank::world_size])):
            inputs = self.adapter.inputs(request, self.options).values()
            keys = {self.cache.key(each) for each in inputs if each.encoder is not None} - self.keys
            self.keys |= keys
            if not all(self.cache.has(key) for key in keys):
                yield MicroBatch(epoch=request.key.epoch, step=number, index=0, requests=(request,))

    def _trained(self, plan: RunPlan, read_row: ReadRow, rank: int, world_size: int) -> Iterator[SampleRequest]:
        # One process that accumulates takes the steps of all.
        alone = replace(plan.options, world_size=1, gradient_accumulation_steps=plan.options.slots)
        owners: dict[int, int] = {}
        for batch in micro_batches(replace(plan, options=alone), read_row, rank=0, first_step=0):
            for request in batch.requests:
                if owners.setdefault(request.key.row, len(owners) % world_size) == rank:
                    yield request


class FillMetrics:
    """What the launching command shows of one rank, in the run's metrics file."""

    def __init__(self, run: RunDir, total: int, *, shows: bool) -> None:
        self.file = MetricsFile(run.metrics) if shows else None
        self.total = total
        self.done = 0
        self.began = time.monotonic()

    def step(self) -> None:
        """One more clip is encoded."""
        self.done += 1
        if self.file is None:
            return
        left = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        self.file.write({"step": self.done, "total_steps": self.total, "seconds_left": round(left, 1)})
