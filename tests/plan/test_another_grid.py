"""A family with other strides than any there is: the plan takes all that it needs to know from its SPEC."""

from typing import Any

import numpy as np
import pytest
from rich.console import Console

from vfun_cli.errors import ConfigError
from vfun_cli.families.spec import ClipShape, FamilySpec, ModelDims, ModelSpec, PlanSpec, SamplingSpec
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.balance import independent_balance, mean_over_max
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.preview import preview
from vfun_cli.plan.report import plan_json, size_table
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.sizes import check_options

TEXT_TOKENS = 128


def sequence_tokens(shape: ClipShape, dims: ModelDims) -> int:
    return SPEC.plan.video_tokens(shape) + TEXT_TOKENS


def attention_flops(shape: ClipShape, dims: ModelDims) -> float:
    return 4.0 * dims.num_layers * dims.dim * sequence_tokens(shape, dims) ** 2


def forward_flops(shape: ClipShape, dims: ModelDims) -> float:
    weights = dims.num_layers * (4 * dims.dim**2 + 2 * dims.dim * dims.ffn_dim)
    return attention_flops(shape, dims) + 2.0 * weights * sequence_tokens(shape, dims)


def read_dims(config: Any) -> ModelDims:
    return ModelDims(dim=2048, ffn_dim=8192, num_layers=28)


SPEC = FamilySpec(
    name="deep-latents",
    summary="a VAE of (8, 32, 32) and one latent a token",
    adapter="",
    fields=(MetadataField(name="file_path", media="visual"),),
    media_types=("video", "image"),
    model=ModelSpec(
        released={},
        read_dims=read_dims,
        recognises=lambda config: config.get("_class_name") == "DeepLatents",
        encoders={},
        captions=lambda dims: (),
        block_classes=("Block",),
        sequence_tokens=sequence_tokens,
        forward_flops=forward_flops,
        attention_flops=attention_flops,
        objective="flow-matching",
        sampler="flow-shifted-once",
        sampler_options={"shift": 1.0},
    ),
    plan=PlanSpec(vae_stride=(8, 32, 32), patch_size=(1, 1, 1)),
    sampling=SamplingSpec(steps=4, guidance=1.0, negative_prompt="", frames=17, size=(64, 64), fps=8),
)
OPTIONS = PlanOptions(
    video_sample_size=256, image_sample_size=1024, token_sample_size=512, video_sample_n_frames=97,
    video_sample_stride=1, random_hw_adapt=True, training_with_video_token_length=True, random_frame_crop=True,
    world_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    rng = np.random.default_rng(0)
    height = rng.choice([480, 540, 720, 1080], 2000)
    width = (height * rng.choice([16 / 9, 9 / 16, 4 / 3, 1.0, 2.39, 0.4, 3.9], 2000)).astype(int)
    table = ClipTable.from_columns(
        width=width, height=height, frames=rng.integers(3, 400, 2000), fps=(25, 1), is_image=rng.random(2000) < 0.3
    )
    return RunPlan(spec=SPEC, dims=SPEC.model.dims, options=OPTIONS, table=table, num_epochs=2)


def test_its_clips_fill_whole_latents_and_tokens(plan: RunPlan) -> None:
    epochs = list(plan.epochs())
    for epoch in epochs:
        assert epoch.num_steps > 50 and len(epoch.buckets) > 100
        assert not (epoch.height % 32).any() and not (epoch.width % 32).any()
        assert set(np.unique(epoch.frames).tolist()) == {1, *range(9, 98, 8)}
        latents = np.where(epoch.kind == 1, 1, (epoch.frames - 1) // 8 + 1)
        assert (epoch.tokens == latents * (epoch.height // 32) * (epoch.width // 32) + TEXT_TOKENS).all()
        assert mean_over_max(epoch) > 0.95 > independent_balance(epoch)
        ledger = epoch.ledger
        assert ledger.used + sum(ledger.dropped.values()) == ledger.rows == 2000
        assert ledger.trained == ledger.samples + ledger.carried_in - ledger.carried_out
    assert sum(epoch.num_steps for epoch in epochs) == plan.steps()
    short = ~plan.table.is_image & (plan.table.frames < 9)
    assert epochs[0].ledger.dropped["too-short"] == np.count_nonzero(short) > 0


def test_its_sizes_keep_the_token_budget() -> None:
    rows = {row.size: row for row in size_table(OPTIONS, SPEC, SPEC.model.dims) if row.kind == "video"}
    assert {size: row.frames for size, row in rows.items()} == {
        256: 97, 384: 97, 512: 97, 640: 57, 768: 41, 896: 25, 1024: 17,
    }  # fmt: skip
    assert (rows[512].latents, rows[512].tokens) == ((13, 16, 16), 3328)
    assert (rows[1024].latents, rows[1024].tokens) == ((3, 32, 32), 3072)


def test_its_plan_is_shown_and_reported(plan: RunPlan) -> None:
    epochs = list(plan.epochs())
    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: PTH123
    console.print(preview(plan, epochs))
    assert "deep-latents" in console.export_text()
    content = plan_json(plan, epochs, assignment=True)
    assert sum(bucket["clips"] for bucket in content["buckets"]) == content["ledger"]["samples"]
    assert all(bucket["height"] % 32 == bucket["width"] % 32 == 0 for bucket in content["buckets"])
    assert content["steps_per_epoch"] == len(content["epochs"][0]["assignment"]) / 8


def test_what_it_needs_is_said_in_its_own_numbers() -> None:
    needs = SPEC.plan.clip_needs(stride=1)
    assert (needs.min_frames, needs.shortest_video(1)) == (9, 9)
    with pytest.raises(ConfigError, match=r"is 8, but deep-latents trains on clips of 8k\+1 frames and at least 9"):
        check_options(PlanOptions.pick(vars(OPTIONS), video_sample_n_frames=8), SPEC, SPEC.model.dims)
    with pytest.raises(ConfigError, match="--image-sample-size is 24; it must be 32 or more"):
        check_options(PlanOptions.pick(vars(OPTIONS), image_sample_size=24), SPEC, SPEC.model.dims)
