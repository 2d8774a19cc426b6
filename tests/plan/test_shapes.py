"""What a compiled run may meet is known before it: no epoch has a shape that was not foreseen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vfun_cli import families
from vfun_cli.errors import ConfigError
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.schedule import plan_epoch
from vfun_cli.plan.shapes import most_shapes

EPOCHS = 3


def shapes_of(spec: Any, table: ClipTable, options: PlanOptions) -> set[tuple[int, ...]]:
    """(frames, height, width, clips) of all micro-batches of some epochs."""
    found: set[tuple[int, ...]] = set()
    for epoch in range(EPOCHS):
        plan = plan_epoch(spec, spec.model.dims, table, options, epoch)
        columns = np.stack([plan.frames, plan.height, plan.width, np.diff(plan.offset)], axis=1)
        found |= {tuple(row) for row in columns.tolist()}
    return found


@pytest.mark.parametrize("more", [{}, {"random_hw_adapt": True}, {"tokens_per_batch": 20_000}, {"train_batch_size": 2}])
@pytest.mark.parametrize("family", tuple(families.FAMILIES))
def test_no_epoch_has_more_shapes_than_were_foreseen(
    family: str, more: dict[str, Any], mixed: Callable[..., ClipTable]
) -> None:
    spec = families.find(family)
    options = PlanOptions.pick(spec.defaults.train, world_size=2, **more)
    table = mixed(300, images=0.3 if "image" in spec.media_types else 0)
    found = shapes_of(spec, table, options)
    assert 1 < len(found) <= most_shapes(spec, spec.model.dims, options)


@given(size=st.integers(128, 1024), tokens=st.integers(128, 1024), frames=st.integers(5, 161), batch=st.integers(1, 3))
def test_no_sizes_give_more_shapes_than_were_foreseen(
    size: int, tokens: int, frames: int, batch: int, mixed: Callable[..., ClipTable]
) -> None:
    spec = families.find("cogvideox-fun")
    options = PlanOptions.pick(
        spec.defaults.train, video_sample_size=size, image_sample_size=size, token_sample_size=tokens,
        video_sample_n_frames=frames, train_batch_size=batch,
    )  # fmt: skip
    try:
        found = shapes_of(spec, mixed(60), options)
    except ConfigError:  # sizes that cannot be trained are told before any plan
        assume(False)
    assert len(found) <= most_shapes(spec, spec.model.dims, options)
