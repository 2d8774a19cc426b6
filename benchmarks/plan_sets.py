"""Made-up datasets, for the benchmarks of the plan."""

import numpy as np

from vfun_cli.metadata.table import ClipTable


def uniform_set(num_rows: int) -> ClipTable:
    """Long 720p clips, as a curated set: every size is open to every clip."""
    return ClipTable.from_columns(
        width=[1280] * num_rows, height=[720] * num_rows, frames=[400] * num_rows, fps=(25, 1)
    )


def mixed_set(num_rows: int, *, images: float, seed: int = 0) -> ClipTable:
    """Ten aspects from 1:2.5 to 3.9:1, clips of 3 to 400 frames, four frame rates, a share of images."""
    rng = np.random.default_rng(seed)
    aspects = rng.choice(
        [16 / 9, 9 / 16, 4 / 3, 1.0, 2.39, 0.4, 3.9, 1.1, 0.8, 2.0], num_rows,
        p=[0.4, 0.2, 0.1, 0.1, 0.05, 0.04, 0.02, 0.03, 0.03, 0.03],
    )  # fmt: skip
    height = rng.choice([480, 540, 720, 1080], num_rows)
    rates = np.array([(24, 1), (25, 1), (30000, 1001), (60, 1)])[rng.integers(0, 4, num_rows)]
    return ClipTable(
        row=np.arange(num_rows),
        is_image=rng.random(num_rows) < images,
        width=(height * aspects).astype(np.int64),
        height=height,
        frames=rng.integers(3, 400, num_rows),
        fps_num=rates[:, 0],
        fps_den=rates[:, 1],
        held_out=np.zeros(num_rows, np.bool_),
    )
