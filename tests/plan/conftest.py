"""A small video family whose arithmetic can be checked by hand, and made-up datasets."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from vfun_cli.families.spec import ClipShape, FamilySpec, ModelDims, ModelSpec, PlanSpec, SamplingSpec
from vfun_cli.metadata.table import ClipTable

TEXT_TOKENS = 10


def _tokens(shape: ClipShape, dims: ModelDims) -> int:
    return ((shape.frames - 1) // 4 + 1) * (shape.height // 16) * (shape.width // 16) + TEXT_TOKENS


def _flops(shape: ClipShape, dims: ModelDims) -> float:
    tokens = _tokens(shape, dims)
    return float(dims.num_layers * (24 * tokens * dims.dim**2 + 4 * tokens**2 * dims.dim))


PLAIN = FamilySpec(
    name="plain",
    summary="4k+1 frames, videos and images",
    adapter="",
    fields=(),
    media_types=("video", "image"),
    model=ModelSpec(
        released={},
        read_dims=lambda config: ModelDims(dim=2048, ffn_dim=8192, num_layers=30),
        recognises=lambda config: False,
        encoders={},
        captions=lambda dims: (),
        block_classes=(),
        sequence_tokens=_tokens,
        forward_flops=_flops,
        attention_flops=_flops,
        objective="flow-matching",
        sampler="flow-shifted-once",
        sampler_options={"shift": 1.0},
    ),
    plan=PlanSpec(vae_stride=(4, 8, 8), patch_size=(1, 2, 2)),
    sampling=SamplingSpec(steps=4, guidance=1.0, negative_prompt="", frames=9, size=(64, 64), fps=8),
)

SPEECH = replace(
    PLAIN,
    name="speech",
    summary="4k frames, videos only, as Wan-S2V",
    media_types=("video",),
    plan=replace(
        PLAIN.plan, first_frame_alone=False, reference_frame=True, lowest_video_size=256, strides_to_max_fps=30
    ),
)


@pytest.fixture(scope="session")
def plain() -> FamilySpec:
    return PLAIN


@pytest.fixture(scope="session")
def speech() -> FamilySpec:
    return SPEECH


@pytest.fixture(scope="session")
def mixed() -> Callable[..., ClipTable]:
    """Datasets of many aspects, short clips and images; sizes as in collections from the web."""

    def make(num_rows: int, *, images: float = 0.3, seed: int = 0) -> ClipTable:
        rng = np.random.default_rng(seed)
        height = rng.choice([480, 540, 720, 1080], num_rows)
        width = (height * rng.choice([16 / 9, 9 / 16, 4 / 3, 1.0, 2.39, 0.4, 3.9], num_rows)).astype(int)
        rates = rng.choice([24, 25, 30, 60], num_rows)
        return ClipTable.from_columns(
            width=width, height=height, frames=rng.integers(3, 400, num_rows),
            fps=[(int(rate), 1) for rate in rates], is_image=rng.random(num_rows) < images,
        )  # fmt: skip

    return make
