"""How ranks begin a step: all together, once each has its clips, or not at all.

A rank that waits for clips inside of a step would keep the others in its collectives, where nobody hears a request to
stop and where NCCL ends the job after a while. So they wait before it, and ask each other every second meanwhile. That
goes through the hosts, while the devices still compute the step before.
"""

from collections.abc import Callable
from dataclasses import replace

from vfun_cli.encoding.encode import shared_call_counts
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.training.agreement import all_or_none
from vfun_cli.training.data.loader import LoadedBatch
from vfun_cli.training.signals import CONTINUE, StopFlag
from vfun_cli.training.waiting import most_of_all


def begin_step(
    wait: Callable[[], LoadedBatch | None], count: int, stop: StopFlag, encoders: Encoders
) -> tuple[int, list[LoadedBatch]]:
    """The micro-batches of one step of this rank, as soon as every rank has its own; all ranks call it together.

    Args:
        wait: gives the next micro-batch, or None after about a second without one.
        count: micro-batches of a step.
        encoders: how often those that the ranks share compute is agreed on too.

    Returns:
        Why to stop, the most severe reason of any rank, and then no micro-batches; or ``CONTINUE`` and all of them.

    Raises:
        Exception: what ``wait`` raised on a rank; on all of them.
    """
    taken: list[LoadedBatch] = []
    names = encoders.shared
    failed: Exception | None = None
    while True:
        try:
            while len(taken) < count and (loaded := wait()) is not None:
                taken.append(loaded)
        except Exception as error:
            failed = error
        calls = [calls for loaded in taken for calls in shared_call_counts(encoders, loaded.samples)]
        missing = count - len(taken)
        reason, any_failed, lacking, *most_calls = most_of_all(
            [stop.reason(), failed is not None, missing, *calls, *[0] * (missing * len(names))]
        )
        if any_failed:
            with all_or_none():
                if failed is not None:
                    raise failed
        if reason != CONTINUE:
            return reason, []
        if not lacking:
            of_each = [most_calls[index * len(names) :][: len(names)] for index in range(count)]
            return CONTINUE, [
                replace(loaded, shared_calls=dict(zip(names, calls, strict=True)))
                for loaded, calls in zip(taken, of_each, strict=True)
            ]
