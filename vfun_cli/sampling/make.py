"""Videos into files, one after another: what ``vfun generate`` does in each of its processes.

    for path in make(orders, source, None, options, tell): ...

Everything is read before the first model is, and what the encoders gave is kept for the second one, so that a
comparison shows the same noise under the same conditions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vfun_cli.modeling.adapter import ModelAdapter
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.media.montage import beside
from vfun_cli.sampling.films import Film, encoded, film_of, moved, write_film
from vfun_cli.sampling.loop import Sampler
from vfun_cli.sampling.orders import Order, Tell
from vfun_cli.sampling.requests import request_of
from vfun_cli.sampling.schedules import make_schedule
from vfun_cli.sampling.source import Source
from vfun_cli.sampling.weights import LoadOptions, load_model

Encoded = dict[str, dict[str, Output]]
"""What the encoders gave of each video, on the host, by the video's name."""


def make(
    orders: Sequence[Order], source: Source, base: Source | None, options: LoadOptions, tell: Tell
) -> Iterator[Path]:
    """Make the videos and write them; yields each file when it is whole.

    Args:
        base: what the videos are compared with: they then show its on the left and the source's on the right.

    Raises:
        CheckpointError: weights that do not fit.
        MetadataError: media that cannot be decoded.
    """
    kept: Encoded = {}
    shown = {}
    if base is not None:
        shown = {order.name: _bytes(film) for order, film in _films(orders, base, options, kept, tell, "base")}
    for order, film in _films(orders, source, options, kept, tell, ""):
        left = shown.pop(order.name, None)
        both = film if left is None else replace(film, pixels=beside(_pixels(left), film.pixels))
        yield write_film(both, order.stem, order.facts, request_of(order.video).audio)


def _films(
    orders: Sequence[Order], source: Source, options: LoadOptions, kept: Encoded, tell: Tell, whose: str
) -> Iterator[tuple[Order, Film]]:
    """The videos by the weights of a source, which are loaded for it."""
    tell(whose or "weights", 0, 0)
    adapter = load_model(source, options)
    for order in orders:
        yield order, _film(order, source, adapter, options, kept, partial(tell, f"{order.name} {whose}".strip()))


def _film(
    order: Order,
    source: Source,
    adapter: ModelAdapter,
    options: LoadOptions,
    kept: Encoded,
    tell: Callable[[int, int], None],
) -> Film:
    request = request_of(order.video)
    if order.name not in kept:
        kept[order.name] = moved(encoded(adapter, request), torch.device("cpu"))
    frames: list[Tensor] = []
    sampler = Sampler(
        adapter=adapter,
        transformer=adapter.transformer,
        schedule=lambda: make_schedule(source.spec, source.model, order.video.steps),
        dtype=options.compute_dtype,
    )
    total = adapter.segments(request) * order.video.steps
    tell(0, total)
    for after in sampler.steps(moved(kept[order.name], options.device), request, frames):
        tell(after.segment * after.steps + after.step + 1, total)
    return film_of(adapter, request, frames)


def _bytes(film: Film) -> Tensor:
    """Its pixels at a quarter of their memory, uint8 [F, 3, H, W]."""
    return ((film.pixels + 1) * 127.5).round().to(torch.uint8)


def _pixels(stored: Tensor) -> Tensor:
    return stored.float() / 127.5 - 1
