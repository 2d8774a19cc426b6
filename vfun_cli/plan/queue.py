"""How many micro-batches are decoded ahead, and whether they fit where they wait: in /dev/shm.

Decoding processes hand tensors over in shared memory, which is a file system in memory with a size of its own: half of
the machine's memory by default, 64 MB in a container.
"""

import shutil

from rich.filesize import decimal

from vfun_cli.config.options import RunConfig
from vfun_cli.errors import FitError
from vfun_cli.families.spec import ClipShape
from vfun_cli.plan.clips import KINDS
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.sizes import MOST_ENLARGED, round_frames, size_set
from vfun_cli.run.memory_errors import SHARED_MEMORY_HINT
from vfun_cli.run.ownership import MEMORY

MOST_AHEAD = 2
"""Micro-batches of each decoding process that are ready or in work: while one is waited for, it is at the next."""

SHARE = 0.5
"""Of /dev/shm that may be filled by what could also be decoded later; checkpoints and NCCL use it too."""

IN_USE = 2
"""Steps whose micro-batches a rank holds: the one that begins, and the one whose numbers are still to be read."""


def largest_micro_batch(plan: RunPlan) -> int:
    """Bytes that a micro-batch of the run takes at most, decoded; what comes from a cache is smaller.

    A bucket is only counted where a clip of the table could be enlarged to it.
    """
    spec, dims, options, table = plan.spec, plan.dims, plan.options, plan.table
    tallest, widest = int(table.height.max()) * MOST_ENLARGED, int(table.width.max()) * MOST_ENLARGED
    largest = 0
    for kind in spec.media_types:
        sizes = size_set(kind, options, spec, dims)
        here = table.frames[table.is_image == bool(KINDS.index(kind))]
        for number, size in enumerate(sizes.sizes if len(here) else ()):
            frames = 1 if kind == "image" else round_frames(min(size.frames, int(here.max())), spec, dims)
            buckets = zip(sizes.heights[:, number].tolist(), sizes.widths[:, number].tolist(), strict=True)
            for height, width in set(buckets):
                if height <= tallest and width <= widest:
                    clips = _clips(plan, ClipShape(frames=frames, height=height, width=width))
                    largest = max(largest, clips * 3 * height * width * spec.plan.decoded_frames(frames))
    return largest


def _clips(plan: RunPlan, shape: ClipShape) -> int:
    """In one micro-batch."""
    if plan.options.tokens_per_batch is None:
        return plan.options.train_batch_size
    return max(1, plan.options.tokens_per_batch // plan.spec.model.sequence_tokens(shape, plan.dims))


def bytes_in_flight(config: RunConfig, plan: RunPlan, ahead: int) -> int:
    """What the ranks of a machine have in /dev/shm at most, with so many micro-batches of each decoding process."""
    assert config.num_processes is not None
    if not config.dataloader_num_workers:
        return 0
    micro_batches = config.dataloader_num_workers * ahead + IN_USE * config.gradient_accumulation_steps
    return config.num_processes // config.num_machines * micro_batches * largest_micro_batch(plan)


def micro_batches_ahead(config: RunConfig, plan: RunPlan) -> int:
    """Of each decoding process: one where ``MOST_AHEAD`` would take more than SHARE of this machine's /dev/shm."""
    return MOST_AHEAD if bytes_in_flight(config, plan, MOST_AHEAD) <= SHARE * _room()[0] else 1


def check_shared_memory(config: RunConfig, plan: RunPlan) -> None:
    """Refuse a run whose decoding processes would fill this machine's /dev/shm, however little they work ahead.

    Raises:
        FitError: what they need, and what is there.
    """
    needed = bytes_in_flight(config, plan, 1)
    _, free = _room()
    if needed > free:
        here = (config.num_processes or 1) // config.num_machines
        raise FitError(
            f"{config.dataloader_num_workers} decoding processes of each of {here} ranks put up to "
            f"{decimal(needed)} into {MEMORY}, of which {decimal(free)} are free: a micro-batch takes up to "
            f"{decimal(largest_micro_batch(plan))}.",
            hint=SHARED_MEMORY_HINT,
        )


def _room() -> tuple[int, int]:
    """Bytes of this machine's /dev/shm, and those that are free."""
    if not MEMORY.is_dir():
        return 0, 0
    usage = shutil.disk_usage(MEMORY)
    return usage.total, usage.free
