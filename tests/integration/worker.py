"""Several runs inside one launch: ``accelerate launch ... -m tests.integration.worker LIST.json``.

Starting two processes costs ten times a tiny training step, so the matrix launches once per strategy and loops over
its runs here. Each run goes through ``run_rank`` exactly as ``python -m vfun_cli.training`` calls it, in one process
group; only what accelerate takes from the environment of a launch (the launch file's class names, the DeepSpeed
file) is set per run.
"""

import gc
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.computed_types import noted
from tests.integration.matrix import BROKEN, BROKEN_ROW, CUT_OFF
from vfun_cli import families
from vfun_cli.modeling.inputs import MediaFile
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.__main__ import run_rank
from vfun_cli.training.blocks import find_blocks
from vfun_cli.training.ending import end_with
from vfun_cli.training.state.checkpointer import Checkpointer
from vfun_cli.training.state.live import TrainedState
from vfun_cli.training.waiting import patient_group


def main(list_file: str) -> int:
    for run_json in json.loads(Path(list_file).read_text(encoding="utf-8")):
        described = json.loads(Path(run_json).read_text(encoding="utf-8"))
        take_launch_file(RunDir(Path(described["run_dir"])).launch() / "accelerate.yaml")
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        run = RunDir(Path(described["run_dir"]))
        strategy, blocks = described["config"]["strategy"], families.find(described["family"]).model.block_classes
        with training_noted(run, strategy, blocks), saving_noted(run), samples_noted(run):
            failed = run_rank(Path(run_json))
        if bool(failed) != (run.root.name == BROKEN):
            print(f"FAILED {run_json}" if failed else f"{run_json} should have failed", file=sys.stderr)
            return 1
    return 0


@contextmanager
def training_noted(run: RunDir, strategy: str, block_classes: Collection[str]) -> Iterator[None]:
    """Leave in the run's logs, of this rank: a digest of its frozen weights before and after training; its gathers;
    the types that its modules compute in; what it read of the transformer's files and what it keeps of that.
    """
    from vfun_cli.training.trainer import Trainer

    train, read = Trainer.train, Read()

    def noted_train(self: Trainer, *given: Any) -> int:
        if run.root.name == BROKEN:
            break_gradients(self)
        before = frozen_weights(self.state.model)
        named = {f"FSDP{name}" for name in block_classes}
        sharded = [each for each in [self.state.model, *find_blocks(self.state.model, named)]
                   if isinstance(each, FSDPModule)]  # fmt: skip
        compiled = self.config.compile  # for which each hook is a graph more
        types = {} if compiled else noted(unwrapped(self.state.model))
        with (
            gathers_counted([] if compiled else sharded) as gathers,
            reductions_counted() as reductions,
            accumulation_noted(self.state.model) as accumulated,
            held_noted(self.state) as held,
            left_by_looks() as left,
        ):
            reason = train(self, *given)
        content = {"before": before, "after": frozen_weights(self.state.model), "gathers": gathers}
        content |= {
            "reductions": reductions,
            "accumulated": sorted(accumulated),
            "left": left,
            "kept": kept_bytes(self.state.model),
            "held": held,
            "read": vars(read),
            "types": {name: [sorted(map(str, each)) for each in calls[0]] for name, calls in types.items()},
        }
        (run.logs / f"noted-rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(content))
        return reason

    Trainer.train = noted_train  # type: ignore[method-assign]
    try:
        with reads_noted(read, lets_go=strategy.startswith("zero3")):
            yield
    finally:
        Trainer.train = train  # type: ignore[method-assign]


@contextmanager
def samples_noted(run: RunDir) -> Iterator[None]:
    """Leave in the run's logs, of this rank: a digest of the pixels of each video that it makes, by its path in the
    run. One row is followed by a file that is cut off.
    """
    from vfun_cli.training import samples, session

    rows_to_sample, write_shown, digests = session.rows_to_sample, samples.write_shown, dict[str, str]()

    def with_a_broken_row(*given: Any) -> list[Any]:
        rows = rows_to_sample(*given)
        request: Any = rows[BROKEN_ROW].request
        cut_off = replace(request.control, media=MediaFile(str(CUT_OFF)))
        rows[BROKEN_ROW] = replace(rows[BROKEN_ROW], request=replace(request, control=cut_off))
        return rows

    def noted(film: Any, stem: Path, *given: Any) -> Path:
        digests[str(stem.relative_to(run.root))] = hashlib.sha256(film.pixels.numpy().tobytes()).hexdigest()
        return write_shown(film, stem, *given)

    session.rows_to_sample, samples.write_shown = with_a_broken_row, noted  # type: ignore[attr-defined]
    try:
        yield
        (run.logs / f"samples-rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(digests))
    finally:
        session.rows_to_sample, samples.write_shown = rows_to_sample, write_shown  # type: ignore[attr-defined]


def break_gradients(trainer: Any) -> None:
    """NaN in the gradients of the last rank from the second step on; the losses stay as they are."""
    predict, accelerator = trainer.adapter.predict, trainer.accelerator
    before = iter(range(trainer.config.gradient_accumulation_steps))

    def broken(*given: Any) -> torch.Tensor:
        prediction: torch.Tensor = predict(*given)
        if next(before, None) is None and accelerator.is_last_process:
            prediction.register_hook(lambda gradient: gradient * torch.nan)
        return prediction

    trainer.adapter.predict = broken


WAITS = ("barrier", "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")
"""What ranks wait for each other by that write files."""
SUMS = ("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single")  # the last from torch 2.13 on
GATHERS = ("all_gather", "all_gather_into_tensor", "all_gather_single", "broadcast")


@contextmanager
def collectives_replaced(names: Sequence[str], by: Callable[[str, Callable[..., Any]], Any]) -> Iterator[None]:
    """Wrap these functions of torch, where DeepSpeed has kept them too."""
    places: list[tuple[Any, str]] = [(dist, name) for name in names if hasattr(dist, name)]
    if "deepspeed" in sys.modules and sys.modules["deepspeed"].comm.comm.cdb is not None:
        kept = {"reduce_scatter_tensor": "reduce_scatter_function", "all_gather_into_tensor": "all_gather_function"}
        places += [(sys.modules["deepspeed"].comm.comm.cdb, kept[name]) for name in names if name in kept]
    before = [getattr(*place) for place in places]
    for (owner, name), collective in zip(places, before, strict=True):
        setattr(owner, name, by(name, collective))
    try:
        yield
    finally:
        for (owner, name), collective in zip(places, before, strict=True):
            setattr(owner, name, collective)


@contextmanager
def saving_noted(run: RunDir) -> Iterator[None]:
    """Leave in the run's logs, of this rank: the files that it hashed; its waits for files under an NCCL limit; in
    which order it wrote, waited without one, and took part in collectives of tensors under one.
    """
    hashed, hasty, order = list[str](), list[str](), list[str]()
    digest, write, save = hashlib.file_digest, torch.save, Checkpointer.save

    def note(what: str) -> None:
        if order[-1:] != [what]:
            order.append(what)

    def noted_digest(file: Any, *given: Any) -> Any:
        hashed.append(Path(file.name).name)
        return digest(file, *given)

    def noted_write(*given: Any, **options: Any) -> None:
        write(*given, **options)
        note("wrote")

    def noted_collective(name: str, collective: Callable[..., Any]) -> Any:
        def run(*given: Any, group: Any = None, **options: Any) -> Any:
            patient = group is patient_group()  # any other is NCCL's on a GPU
            if not patient and name in WAITS:
                hasty.append(name)
            note("waited" if patient else "met")
            return collective(*given, group=group, **options)

        return run

    def noted_save(self: Checkpointer, *given: Any, **options: Any) -> Path:
        hashed.clear()
        order.clear()
        try:
            with collectives_replaced((*WAITS, *SUMS, *GATHERS), noted_collective):
                return save(self, *given, **options)
        finally:
            content = {"hashed": sorted(hashed), "hasty": hasty, "order": order}
            (run.logs / f"saved-rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(content))

    hashlib.file_digest = noted_digest  # type: ignore[assignment]
    torch.save = noted_write
    Checkpointer.save = noted_save  # type: ignore[method-assign]
    try:
        yield
    finally:
        hashlib.file_digest = digest
        torch.save = write
        Checkpointer.save = save  # type: ignore[method-assign]


@contextmanager
def gathers_counted(sharded: Sequence[torch.nn.Module]) -> Iterator[list[int]]:
    """How many gathers had begun when each of these modules first ran."""
    begun, counts = 0, list[int]()
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # torch < 2.13

    def counted(_: str, gather: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            nonlocal begun
            begun += 1
            return gather(*given, **options)

        return run

    def note(*_: Any) -> None:
        if len(counts) < len(sharded):
            counts.append(begun)

    hooks = [module.register_forward_pre_hook(note) for module in sharded]
    try:
        with collectives_replaced([name], counted):
            yield counts
    finally:
        for hook in hooks:
            hook.remove()


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """What DDP or DeepSpeed put its own module around."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, torch.nn.Module)
    return inner


@contextmanager
def reductions_counted() -> Iterator[Counter[str]]:
    """How many collectives summed more than a number over the ranks, by the type of what they summed."""
    counts = Counter[str]()

    def counted(name: str, reduce: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            first = next(each for each in (*given, *options.values()) if isinstance(each, torch.Tensor))
            if first.numel() > 1 and first.is_floating_point():
                counts[str(first.dtype)] += 1
            return reduce(*given, **options)

        return run

    with collectives_replaced(SUMS, counted):
        yield counts


@contextmanager
def accumulation_noted(model: Any) -> Iterator[set[str]]:
    """In which types DeepSpeed has the gradients that it summed over the micro-batches of a step."""
    types, optimizer = set[str](), model.optimizer if hasattr(model, "zero_optimization_stage") else None
    if optimizer is None:
        yield types
        return
    step = optimizer.step

    def noted(*given: Any, **options: Any) -> Any:
        shards = getattr(optimizer, "grad_partitions_flat_buffer", None)  # ZeRO-3's, wherever they lie
        sums = [shards] if shards is not None else chain(*optimizer.averaged_gradients.values())
        types.update(str(each.dtype) for each in sums)
        return step(*given, **options)

    optimizer.step = noted
    try:
        yield types
    finally:
        del optimizer.step


@contextmanager
def held_noted(state: TrainedState) -> Iterator[dict[str, int]]:
    """Bytes that this rank holds of each part of ``Kept``: of gradients between a backward pass and its step, of all
    else after the step. What lies in one memory counts once, as that part which comes first.
    """
    engine = state.model if hasattr(state.model, "zero_optimization_stage") else None
    steps: Any = state.optimizer if engine is None else engine.optimizer
    step, held = steps.step, dict[str, int]()

    def noted(*given: Any, **options: Any) -> Any:
        held["gradients"] = stored_bytes(gradients_held(state.model))
        try:
            return step(*given, **options)
        finally:
            weights, masters = weights_held(state.model), masters_held(state.model)
            held["weights"] = stored_bytes(weights)
            held["masters"] = stored_bytes([*weights, *masters]) - held["weights"]
            inner = steps.optimizer
            held["moments"] = stored_bytes(value for of in inner.state.values() for value in of.values())
            held["average"] = stored_bytes(state.average.shadow if state.average is not None else ())

    with mock.patch.object(steps, "step", noted):
        yield held


def stored_bytes(found: Iterable[Any]) -> int:
    """Of the memory that these tensors lie in."""
    local = (each.to_local() if isinstance(each, DTensor) else each for each in found if isinstance(each, torch.Tensor))
    storages = [each.untyped_storage() for each in local]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())


def weights_held(model: Any) -> list[Any]:
    """Those that the model has, and under ZeRO the parts of them that a rank keeps."""
    names = ("bit16_groups_flat", "param_groups_fp16_flat_cpu_memory")
    flat = chain(*(getattr(getattr(model, "optimizer", None), name, ()) for name in names))
    return [*model.parameters(), *(getattr(weight, "ds_tensor", None) for weight in model.parameters()), *flat]


def masters_held(model: Any) -> list[torch.Tensor]:
    """DeepSpeed's; the others train the model's own weights."""
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return [*chain(*(getattr(getattr(model, "optimizer", None), name, ()) for name in names))]


def gradients_held(model: Any) -> list[Any]:
    """Of the model's weights and of the masters, and what ZeRO has summed up."""
    optimizer = getattr(model, "optimizer", None)
    sums = [group for group in getattr(optimizer, "averaged_gradients", {}).values() if group is not None]
    return [
        *(weight.grad for weight in chain(model.parameters(), masters_held(model))),
        *chain(*sums),
        getattr(optimizer, "grad_partitions_flat_buffer", None),
    ]


@contextmanager
def left_by_looks() -> Iterator[list[int]]:
    """How many elements of sharded weights a rank has whole after each computation of the held-out loss."""
    from vfun_cli.training.heldout import HeldOutLoss

    compute, left = HeldOutLoss.compute, list[int]()

    def noted(self: HeldOutLoss) -> Any:
        found = compute(self)
        whole = [
            parameter.numel()  # of what ZeRO-3 has let go there is none
            for parameter in self.state.model.parameters()
            if hasattr(parameter, "ds_tensor")
            or (isinstance(self.state.model, FSDPModule) and not isinstance(parameter, DTensor))
        ]
        left.append(sum(whole))
        return found

    HeldOutLoss.compute = noted  # type: ignore[method-assign]
    try:
        yield left
    finally:
        HeldOutLoss.compute = compute  # type: ignore[method-assign]


@dataclass
class Read:
    """What was read of weights' files, in bytes of the type that it was read in."""

    whole: int = 0
    largest: int = 0
    most_at_once: int = 0
    """Of what is in memory as it was read: not of copies and parts that were made of it."""


@contextmanager
def reads_noted(read: Read, *, lets_go: bool) -> Iterator[None]:
    """Note what is read of the transformer's files, by an engine that ``lets_go`` of each weight before the next."""
    from vfun_cli.modeling import lazy_weights

    reader, in_memory = lazy_weights._read, list[tuple[StorageWeakRef, int]]()

    def held() -> int:
        return sum(size for alive, size in in_memory if not alive.expired())

    def noted(*given: Any) -> torch.Tensor:
        values = reader(*given)
        in_memory.append((StorageWeakRef(values.untyped_storage()), values.nbytes))
        read.whole += values.nbytes
        read.largest = max(read.largest, values.nbytes)
        if lets_go and held() > max(read.largest, read.most_at_once):
            gc.collect()  # small ones that DeepSpeed is done with may wait for it
        read.most_at_once = max(read.most_at_once, held())
        return values

    lazy_weights._read = noted
    try:
        yield
    finally:
        lazy_weights._read = reader


def kept_bytes(model: torch.nn.Module) -> int:
    """What a rank keeps of the weights, those that ZeRO-3 cuts into parts as a whole."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in local)


def frozen_weights(model: torch.nn.Module) -> dict[str, str]:
    """A digest of what lies on this rank of each parameter that is not trained."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            mine: torch.Tensor = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 keeps a part there
            local = mine.to_local() if isinstance(mine, DTensor) else mine
            values = local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = f"{local.numel()} {hashlib.sha256(values).hexdigest()}"
    return found


def take_launch_file(path: Path) -> None:
    """What ``accelerate launch`` would have put into the environment from this file."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "mixed_precision" in content:
        os.environ["ACCELERATE_MIXED_PRECISION"] = content["mixed_precision"]
    if "fsdp_config" in content:
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = content["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    if "deepspeed_config" in content:
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = content["deepspeed_config"]["deepspeed_config_file"]


if __name__ == "__main__":
    end_with(lambda: main(sys.argv[1]))
