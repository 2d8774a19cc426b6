"""Videos into files, one after another: what ``vfun generate`` does in each of its processes.

    for event in make(orders, source, None, options): ...

What a video is made from is read and encoded before the transformer is: so what cannot be decoded is told first, the
encoders never share the device with the transformer, and but for the VAE they are gone when it comes.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from vfun_cli.disks.abilities import fault
from vfun_cli.errors import FitError, MetadataError, VfunError
from vfun_cli.families.releases import downloads_named
from vfun_cli.modeling.adapter import ModelAdapter
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.media.montage import beside
from vfun_cli.modeling.media.writing import byte_pixels
from vfun_cli.modeling.pixels import float_pixels
from vfun_cli.run.memory_errors import memory_error
from vfun_cli.sampling.events import MADE, SMALLER, Event
from vfun_cli.sampling.films import Film, encoded, film_of, moved, write_film
from vfun_cli.sampling.loop import Sampler
from vfun_cli.sampling.orders import Order
from vfun_cli.sampling.requests import request_of
from vfun_cli.sampling.schedules import make_schedule
from vfun_cli.sampling.source import Source
from vfun_cli.sampling.weights import LoadOptions, open_model

COMPARED_AT_ONCE = 8
"""Videos whose base is kept while the tuned weights are loaded: 0.2 GB each, of 81 frames at 720p."""
HOST = torch.device("cpu")


def make(orders: Sequence[Order], source: Source, base: Source | None, options: LoadOptions) -> Iterator[Event]:
    """Make the videos and write them; what cannot be made is told and keeps no other from being made.

    Args:
        base: what the videos are compared with: they then show its on the left and the source's on the right.

    Raises:
        CheckpointError: weights that do not fit.
        FitError: the model alone is more than the memory.
    """
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    with _fitting(), downloads_named(source.spec, source.model):
        if base is None:
            yield from _films(orders, source, options, _write)
            return
        for first in range(0, len(orders), COMPARED_AT_ONCE):
            yield from _compared(orders[first : first + COMPARED_AT_ONCE], source, base, options)


def _compared(orders: Sequence[Order], source: Source, base: Source, options: LoadOptions) -> Iterator[Event]:
    kept: dict[str, Tensor] = {}  # uint8, a quarter of the memory

    def keep(order: Order, film: Film) -> None:
        kept[order.name] = byte_pixels(film.pixels)

    def write(order: Order, film: Film) -> None:
        left = float_pixels(kept.pop(order.name))
        _write(order, replace(film, pixels=beside(left, film.pixels)))

    for event in _films(orders, base, options, keep):
        if event.exit_code != MADE:
            yield replace(event, of_base=True)
    yield from _films([order for order in orders if order.name in kept], source, options, write)


def _films(
    orders: Sequence[Order], source: Source, options: LoadOptions, take: Callable[[Order, Film], None]
) -> Iterator[Event]:
    """Make the videos by the weights of one source."""
    adapter, place = open_model(source, options)
    inputs: dict[str, dict[str, Output]] = {}
    for number, order in enumerate(orders):
        yield Event(doing="reading what they are made from", done=number, total=len(orders))
        try:
            inputs[order.name] = moved(encoded(adapter, request_of(order.video)), HOST)
        except Exception as error:
            yield _unmade(order, error)
    adapter.encoders.unload()
    if not inputs:
        return
    yield Event(doing="loading the weights")
    place()
    for order in orders:
        if order.name not in inputs:
            continue
        try:
            film = yield from _film(order, source, adapter, moved(inputs.pop(order.name), options.device), options)
            take(order, film)
        except Exception as error:
            yield _unmade(order, error)
        else:
            yield Event(video=order.name, exit_code=MADE)


def _film(
    order: Order, source: Source, adapter: ModelAdapter, inputs: dict[str, Output], options: LoadOptions
) -> Generator[Event, None, Film]:
    request, frames = request_of(order.video), list[Tensor]()
    sampler = Sampler(
        adapter=adapter,
        transformer=adapter.transformer,
        schedule=lambda: make_schedule(source.spec, source.model, order.video.steps),
        dtype=options.compute_dtype,
    )
    total = adapter.segments(request) * order.video.steps_made
    yield Event(video=order.name, total=total)
    for after in sampler.steps(inputs, request, frames):
        yield Event(video=order.name, done=after.segment * after.steps + after.step, total=total)
    return film_of(adapter, request, frames)


def _write(order: Order, film: Film) -> None:
    write_film(film, order.stem, order.facts, request_of(order.video).audio)


def _unmade(order: Order, error: Exception) -> Event:
    """The video cannot be made, but others may.

    Raises:
        Exception: it is of all of them.
    """
    known = _of_one_video(error)
    if known is None:
        raise error
    return Event(video=order.name, exit_code=known.exit_code, message=known.message, hint=known.hint)


def _of_one_video(error: Exception) -> VfunError | None:
    """What it was made from, its size, or the disk that it goes to."""
    if isinstance(error, MetadataError):
        return error
    if (too_large := memory_error(error)) is not None:
        return FitError(too_large.message, hint=SMALLER)
    return fault(error) if isinstance(error, OSError) else None


@contextmanager
def _fitting() -> Iterator[None]:
    """Memory that runs out inside is told with what helps."""
    try:
        yield
    except Exception as error:
        if (too_large := memory_error(error)) is not None:
            raise FitError(too_large.message, hint=SMALLER) from error
        raise
