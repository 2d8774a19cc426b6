"""The HunyuanVideo families end to end on tiny models in the released layout: plan, conditioning, prediction."""

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vfun_cli.demo.hunyuanvideo import build_i2v, build_t2v
from vfun_cli.encoding.encode import encode, outputs_of, prepared
from vfun_cli.encoding.encode import load as load_clip
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families.hunyuanvideo import I2V, T2V
from vfun_cli.families.hunyuanvideo.adapter import (
    HunyuanVideoAdapter,
    ImageToVideoAdapter,
    TextToVideoAdapter,
)
from vfun_cli.families.spec import ClipShape, FamilySpec, ModelDims
from vfun_cli.modeling.adapter import AdapterOptions, Conditions, SampleRequest, VideoRequest
from vfun_cli.modeling.encoders.hunyuan_vae import HunyuanVAE
from vfun_cli.modeling.inputs import Decoded, TupleInput, Value
from vfun_cli.modeling.media.writing import write_png, write_video
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.training.objectives import make_objective

SPECS = {"t2v": T2V, "i2v": I2V}
KINDS: Mapping[str, type[HunyuanVideoAdapter]] = {"t2v": TextToVideoAdapter, "i2v": ImageToVideoAdapter}
BUILDERS: Mapping[str, Callable[..., None]] = {"t2v": build_t2v, "i2v": build_i2v}
SHAPES = [
    ClipShape(frames=frames, height=height, width=width)
    for frames, height, width in [(1, 64, 64), (1, 96, 64), (1, 64, 112), (5, 64, 64), (9, 48, 80), (21, 80, 48)]
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, build in BUILDERS.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        build(made[name])
    return made


@pytest.fixture(scope="module")
def adapters(folders: dict[str, Path]) -> dict[str, HunyuanVideoAdapter]:
    return {name: load(name, folders[name]) for name in KINDS}


PARTS = ["transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "image_processor"]


def load(name: str, folder: Path, **options: Any) -> HunyuanVideoAdapter:
    given: dict[str, Any] = {"compute_dtype": torch.float32, "device": torch.device("cpu"), **options}
    return KINDS[name].from_pretrained(AdapterOptions(model_dir=folder, **given))


def key(row: int) -> SampleKey:
    return SampleKey(seed=1, epoch=0, row=row)


def is_dropped(key: SampleKey) -> bool:
    return key.chance("text-drop", 0.1)


KEPT = [row for row in range(40) if not is_dropped(key(row))]
DROPPED = [row for row in range(40) if is_dropped(key(row))]


def sample(shape: ClipShape, row: int = 0, text: str = "a red balloon rises over the hills") -> dict[str, Any]:
    pixels = key(row).normal("test-pixels", (shape.frames, 3, shape.height, shape.width)).clamp(-1, 1)
    return {"pixels": pixels, "text": text}


def encoded(
    adapter: HunyuanVideoAdapter, samples: list[dict[str, Any]], keys: list[SampleKey]
) -> tuple[Tensor, Conditions]:
    """The samples as their keys decide."""
    captions = ["" if is_dropped(key) else sample["text"] for sample, key in zip(samples, keys, strict=True)]
    given = [
        prepared(adapter.compose(Decoded(sample["pixels"]), Value(caption)))
        for sample, caption in zip(samples, captions, strict=True)
    ]
    return encode(adapter, given, keys)


def run(adapter: HunyuanVideoAdapter, shape: ClipShape, rows: list[int]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    latents, conditions = encoded(adapter, [sample(shape, row) for row in rows], [key(row) for row in rows])
    timesteps = torch.linspace(900.0, 100.0, len(rows))
    return adapter.predict(adapter.transformer, latents, timesteps, conditions), latents, conditions


def dims_of(spec: FamilySpec, folder: Path) -> ModelDims:
    return spec.model.read_dims(json.loads((folder / spec.model.config_file).read_text()))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planned_tokens_are_the_live_joint_sequence(
    name: str, shape: ClipShape, adapters: dict[str, HunyuanVideoAdapter], folders: dict[str, Path]
) -> None:
    adapter, spec = adapters[name], SPECS[name]
    lengths = []
    block = adapter.transformer.single_transformer_blocks[0]
    hook = block.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1] + given[1].shape[1]))
    with torch.no_grad():
        _, latents, _ = run(adapter, shape, [0])
    hook.remove()
    assert lengths == [spec.model.sequence_tokens(shape, dims_of(spec, folders[name]))]
    assert spec.plan.latent_shape(shape) == tuple(latents.shape[2:])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4]], ids=str)
def test_planned_flops_are_what_torch_counts(
    name: str, shape: ClipShape, adapters: dict[str, HunyuanVideoAdapter], folders: dict[str, Path]
) -> None:
    adapter, spec = adapters[name], SPECS[name]
    latents, conditions = encoded(adapter, [sample(shape)], [key(0)])
    # The counter does not know the fused CPU attention, it does know the matrix products of the plain one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        adapter.predict(adapter.transformer, latents, torch.tensor([500.0]), conditions)
    assert spec.model.forward_flops(shape, dims_of(spec, folders[name])) == counter.get_total_flops()


def test_a_clip_of_the_documents_is_13312_tokens_and_the_text() -> None:
    shape = ClipShape(frames=49, height=512, width=512)
    assert T2V.plan.video_tokens(shape) == 13312
    assert T2V.model.sequence_tokens(shape, T2V.model.dims) == 13312 + 256
    assert I2V.model.sequence_tokens(shape, I2V.model.dims) == 13312 + 144 + 252


@pytest.mark.parametrize("name", SPECS)
def test_block_classes_are_the_classes_of_the_model(name: str, adapters: dict[str, HunyuanVideoAdapter]) -> None:
    transformer = adapters[name].transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    assert {type(block).__name__ for block in blocks} == set(SPECS[name].model.block_classes)


def test_lora_targets_name_modules(adapters: dict[str, HunyuanVideoAdapter]) -> None:
    modules = adapters["t2v"].transformer.named_modules()
    names = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    for target in T2V.defaults.lora["target_name"]:  # type: ignore[attr-defined]
        assert any(name.endswith(f".{target}") for name in names), target


def test_every_latent_frame_of_text_to_video_counts(adapters: dict[str, HunyuanVideoAdapter]) -> None:
    for shape in (SHAPES[0], SHAPES[4]):
        prediction, latents, conditions = run(adapters["t2v"], shape, [0, 1])
        assert prediction.shape == latents.shape == (2, 16, *T2V.plan.latent_shape(shape))
        assert "loss_mask" not in conditions


def test_image_to_video_leaves_out_the_given_frame_only(adapters: dict[str, HunyuanVideoAdapter]) -> None:
    _, latents, conditions = run(adapters["i2v"], SHAPES[4], [0, 1])
    assert conditions["loss_mask"].shape == (2, 1, latents.shape[2], 1, 1)
    assert conditions["loss_mask"][:, 0, :, 0, 0].tolist() == [[0, 1, 1], [0, 1, 1]]


def test_the_condition_latent_is_the_mode_of_the_image_alone(
    adapters: dict[str, HunyuanVideoAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapters["i2v"]
    torch.manual_seed(0)  # with random weights a latent depends on its neighbours, as in a trained VAE
    drawn = HunyuanVAE(AutoencoderKLHunyuanVideo.from_config(adapter.encoders["vae"].model.config))
    monkeypatch.setitem(adapter.encoders.loaded, "vae", drawn)
    clip = sample(SHAPES[4])
    _, conditions = encoded(adapter, [clip], [key(0)])
    image = clip["pixels"][None, :1].transpose(1, 2)
    with torch.no_grad():
        mode = adapter.encoders["vae"].model.encode(image).latent_dist.mode() * 0.476986
        of_clip = (
            adapter.encoders["vae"].model.encode(clip["pixels"][None].transpose(1, 2)).latent_dist.mode() * 0.476986
        )
    assert torch.allclose(conditions["first_latent"], mode, atol=1e-6)
    assert (of_clip[:, :, :1] - mode).abs().max() > 1e-2  # the window's normalisation makes them differ


def test_latents_are_a_scaled_posterior_sample_drawn_by_the_key(adapters: dict[str, HunyuanVideoAdapter]) -> None:
    adapter, shape = adapters["t2v"], SHAPES[4]
    latents, _ = encoded(adapter, [sample(shape)], [key(0)])
    again, _ = encoded(adapter, [sample(shape)], [SampleKey(seed=1, epoch=1, row=0)])
    with torch.no_grad():
        posterior = adapter.encoders["vae"].model.encode(sample(shape)["pixels"][None].transpose(1, 2)).latent_dist
    deviation = (latents / 0.476986 - posterior.mean) / posterior.std
    assert abs(deviation.mean()) < 0.1 and deviation.std() == pytest.approx(1, abs=0.1)
    assert latents.dtype == torch.float32
    assert not torch.equal(latents, again)


@pytest.mark.parametrize("name", SPECS)
def test_a_sample_does_not_depend_on_its_neighbours(name: str, adapters: dict[str, HunyuanVideoAdapter]) -> None:
    adapter = adapters[name]
    alone, latents, _ = run(adapter, SHAPES[3], [KEPT[0]])
    samples = [sample(SHAPES[3], KEPT[0]), sample(SHAPES[3], KEPT[1], text="a much longer caption " * 60)]
    both_latents, both = encoded(adapter, samples, [key(KEPT[0]), key(KEPT[1])])
    together = adapter.predict(adapter.transformer, both_latents, torch.tensor([900.0, 100.0]), both)
    assert torch.equal(latents[0], both_latents[0])
    assert torch.allclose(alone[0], together[0], atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_one_caption_in_ten_is_left_out_of_both_encoders(name: str, adapters: dict[str, HunyuanVideoAdapter]) -> None:
    share = sum(is_dropped(key(row)) for row in range(2000)) / 2000
    assert share == pytest.approx(0.1, abs=0.02)
    adapter, shape = adapters[name], SHAPES[3]
    _, dropped = encoded(adapter, [sample(shape)], [key(DROPPED[0])])
    _, empty = encoded(adapter, [sample(shape, text="")], [key(KEPT[0])])
    _, kept = encoded(adapter, [sample(shape)], [key(KEPT[0])])
    for what in ("text", "text_mask", "pooled"):
        assert torch.equal(dropped[what], empty[what])
        assert not torch.equal(dropped[what], kept[what])


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_clip_goes_from_its_file_to_gradients(
    name: str, precision: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, torch.linspace(-1, 1, 30).view(30, 1, 1, 1).expand(30, 3, 72, 96), Fraction(24))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    adapter = load(name, folders[name], compute_dtype=dtype, low_vram=True)
    if precision == "bf16":
        adapter.transformer.to(torch.bfloat16)
    request = SampleRequest(
        key=key(0), record={"file_path": str(path), "text": "a light goes on"}, kind="video", frames=9, height=64,
        width=80, stride=2, total_frames=30, fps=(24, 1),
    )  # fmt: skip
    loaded = load_clip(KINDS[name], request, adapter.options)
    assert loaded.values["clip"].shape == (9, 3, 64, 80) and loaded.values["pooled"] == "a light goes on"

    latents, conditions = encode(adapter, [loaded], [request.key])
    objective = make_objective(SPECS[name].model.objective, SPECS[name].model.objective_options, folders[name])
    corrupted = objective.corrupt(latents, [request.key])
    prediction = adapter.predict(adapter.transformer, corrupted.noisy, corrupted.timesteps, conditions)
    loss = objective.loss(prediction, corrupted.target, conditions.get("loss_mask"))
    loss.backward()
    assert torch.isfinite(loss) and latents.dtype == torch.float32
    assert SPECS[name].model.modules_without_gradient(SPECS[name].model.dims) == ()
    for parameter, tensor in adapter.transformer.named_parameters():
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all(), parameter
    assert not any(p.requires_grad for part in adapter.encoders.values() for p in part.parameters())


def test_a_picture_is_a_clip_of_one_frame(adapters: dict[str, HunyuanVideoAdapter], tmp_path: Path) -> None:
    write_png(tmp_path / "picture.png", torch.linspace(-1, 1, 96).expand(3, 72, 96))
    request = SampleRequest(
        key=key(0), record={"file_path": str(tmp_path / "picture.png")}, kind="image", frames=1, height=64, width=64,
        stride=1, total_frames=1, fps=(0, 1),
    )  # fmt: skip
    loaded = load_clip(KINDS["t2v"], request, adapters["t2v"].options)
    latents, conditions = encode(adapters["t2v"], [loaded, loaded], [key(0), key(1)])
    assert latents.shape == (2, 16, 1, 8, 8)
    prediction = adapters["t2v"].predict(adapters["t2v"].transformer, latents, torch.tensor([5.0, 9.0]), conditions)
    assert prediction.shape == latents.shape
    assert "image" not in I2V.media_types  # its one latent frame would be the given one


def test_guidance_is_six_thousand_in_the_compute_dtype(folders: dict[str, Path], adapters: dict[str, Any]) -> None:
    bf16 = load("t2v", folders["t2v"], compute_dtype=torch.bfloat16)
    for adapter, value in ((adapters["t2v"], 6000.0), (bf16, 6016.0)):
        _, conditions = encoded(adapter, [sample(SHAPES[0])], [key(0)])
        assert conditions["guidance"].tolist() == [value]


@pytest.mark.parametrize("name", KINDS)
def test_training_is_told_the_guidance_that_was_asked_for_and_samples_are_made_at_six(
    name: str, folders: dict[str, Path], adapters: dict[str, Any]
) -> None:
    asked, plain = load(name, folders[name], guidance_scale=4.5), adapters[name]
    found = [encoded(adapter, [sample(SHAPES[0])], [key(0)])[1] for adapter in (asked, plain)]
    assert [conditions["guidance"].item() for conditions in found] == [4500.0, 6000.0]
    assert all(torch.equal(found[0][each], found[1][each]) for each in found[0] if each != "guidance")
    request = VideoRequest(
        key=key(0), prompt="a red balloon", negative_prompt="", frames=5, height=64, width=64, fps=Fraction(16),
        guidance=1.0, image=Decoded(torch.zeros(1, 3, 64, 64)),
    )  # fmt: skip
    (outputs,) = outputs_of(asked.encoders, [prepared(asked.inputs_to_sample(request, asked.options))])
    assert asked.branches(outputs, request, 0, None).conditional["guidance"].item() == 6000.0


def test_the_schedule_is_the_released_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    sigmas = make_objective(T2V.model.objective, T2V.model.objective_options, folders["t2v"]).sigmas()  # type: ignore[attr-defined]
    timesteps = [round(1000 * float(sigmas[index]), 3) for index in (0, 1, 998, 999)]
    assert timesteps == [1000.0, 999.857, 13.834, 6.958]
    assert float(sigmas[500]) == pytest.approx(0.875, abs=1e-3)

    for entry in folders["t2v"].iterdir():
        if entry.name != "scheduler":
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"shift": 3.0}')
    with pytest.raises(CheckpointError, match=r"shift 3\.0"):
        load("t2v", tmp_path)


def test_the_demo_model_is_the_same_bytes_every_time(folders: dict[str, Path], tmp_path: Path) -> None:
    build_i2v(tmp_path)
    made = {file.relative_to(tmp_path): file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    assert len(made) > 10
    for name, content in made.items():
        assert (folders["i2v"] / name).read_bytes() == content, name


def test_encoders_are_loaded_when_they_are_first_used(folders: dict[str, Path]) -> None:
    adapter = load("i2v", folders["i2v"])
    assert not adapter.encoders.loaded
    adapter.encoders.run("pooled", ["hello"])
    assert set(adapter.encoders.loaded) == {"pooled"}
    adapter.encoders.load()
    assert set(adapter.encoders.loaded) == {"vae", "prompt", "pooled"}


def test_with_variants_only_so_many_starts_are_drawn_and_captions_stay_random() -> None:
    keys = [SampleKey(seed=1, epoch=epoch, row=0, variants=2) for epoch in range(60)]
    plain = AdapterOptions(model_dir=Path(), compute_dtype=torch.float32, device=torch.device("cpu"))
    drawn = []
    for each in keys:
        request = SampleRequest(
            key=each, record={"file_path": "clip.mp4", "text": "a light"}, kind="video", frames=9, height=64,
            width=80, stride=2, total_frames=300, fps=(24, 1),
        )  # fmt: skip
        drawn.append(ImageToVideoAdapter.inputs(request, plain))
    assert len({inputs["clip"] for inputs in drawn}) == 2 == len({inputs["image"] for inputs in drawn})
    assert {inputs["pooled"].lazy for inputs in drawn} == {Value(""), Value("a light")}
    for inputs in drawn:
        assert inputs["image"].lazy == inputs["clip"].lazy.take([0])  # type: ignore[attr-defined]
        assert inputs["prompt"].lazy == TupleInput((inputs["pooled"].lazy, inputs["image"].lazy))


def test_a_directory_of_the_other_family_is_said_to_be_its(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        load("i2v", folders["t2v"])
    assert "hunyuanvideo-t2v" in str(caught.value.hint)


@pytest.mark.parametrize("part", PARTS)
def test_an_incomplete_directory_is_named(part: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for entry in folders["i2v"].iterdir():
        if entry.name != part:
            (tmp_path / entry.name).symlink_to(entry)
    with pytest.raises(CheckpointError, match=part):
        load("i2v", tmp_path)
