"""CogVideoX-Fun from a tiny released directory: options, sizes, masks, encoders, conditioning, prediction."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5EncoderModel

from vfun_cli.config.options import parse
from vfun_cli.demo.cogvideox_fun import PAIRED, ROTARY, TRANSFORMER, build_model
from vfun_cli.encoding.encode import encode, load, prepared
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families.cogvideox_fun import SPEC, read_dims
from vfun_cli.families.cogvideox_fun.adapter import CogVideoXFunAdapter, add_noise, compose, join
from vfun_cli.families.cogvideox_fun.masks import IMAGE_MODES, VIDEO_MODES, Draw, draw_mask
from vfun_cli.families.spec import ModelDims
from vfun_cli.modeling.adapter import AdapterOptions, Conditions, Inputs, SampleRequest
from vfun_cli.modeling.encoders.cogvideox_vae import CogVideoXVAE, read_scale
from vfun_cli.modeling.inputs import Decoded, Value, describe, load_inputs
from vfun_cli.modeling.media.writing import write_png, write_video
from vfun_cli.modeling.pixels import readable
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.sizes import check_options, frames_at
from vfun_cli.training.objectives import make_objective

GOLDEN = Path(__file__).parents[1] / "golden/cogvideox_fun"
CPU = torch.device("cpu")
PLAIN = AdapterOptions(model_dir=Path(), compute_dtype=torch.float32, device=CPU)
MODELS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": dict(ROTARY),
    "V1.5": dict(PAIRED),
    "normal": {"in_channels": 16},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("cogvideox") / name for name in MODELS}
    for name, folder in made.items():
        build_model(folder, **MODELS[name])
    return made


@pytest.fixture(scope="module")
def adapters(folders: dict[str, Path]) -> dict[str, CogVideoXFunAdapter]:
    modes = {name: "normal" if name == "normal" else "" for name in MODELS}
    return {name: CogVideoXFunAdapter.from_pretrained(options(folders[name], mode)) for name, mode in modes.items()}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 12 frames that get brighter, and a picture."""
    folder = tmp_path_factory.mktemp("media")
    frames = torch.linspace(-0.9, 0.9, 12).view(-1, 1, 1, 1).expand(-1, 3, 64, 96)
    write_video(folder / "clip.mp4", frames, Fraction(8))
    write_png(folder / "picture.png", frames[6])
    return folder


def options(folder: Path, train_mode: str = "", **changes: Any) -> AdapterOptions:
    settings = {"model_dir": folder, "compute_dtype": torch.float32, "device": CPU, "train_mode": train_mode}
    return AdapterOptions(**settings | changes)


def request(media: Path, kind: str = "video", *, frames: int = 5, row: int = 0) -> SampleRequest:
    name = "clip.mp4" if kind == "video" else "picture.png"
    return SampleRequest(
        key=SampleKey(0, 0, row),
        record={"file_path": media / name, "text": "a red ball"},
        kind=kind,
        frames=frames if kind == "video" else 1,
        height=32,
        width=48,
        stride=1,
        total_frames=12 if kind == "video" else 1,
        fps=(8, 1),
    )


def clip(mask: Tensor, seed: int = 0, noise: SampleKey | None = None) -> Inputs:
    """A clip of noise with a mask [F, 1, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(len(mask), 3, *mask.shape[2:], generator=generator) * 2 - 1
    return compose(Decoded(pixels), "a red ball", Decoded(mask), noise=noise)


def encoded(adapter: CogVideoXFunAdapter, samples: list[Inputs], keys: list[SampleKey]) -> tuple[Tensor, Conditions]:
    return encode(adapter, [prepared(inputs) for inputs in samples], keys)


def first_frame_known(frames: int = 5) -> Tensor:
    mask = torch.ones(frames, 1, 32, 48, dtype=torch.bool)
    mask[0] = False
    return mask


def settings(name: str) -> dict[str, Any]:
    """The spec's ``input_settings`` of a model."""
    config = {**TRANSFORMER, **MODELS[name]}
    return {key: config[key] for key in SPEC.model.input_settings}


def dims(name: str) -> ModelDims:
    return read_dims({**TRANSFORMER, **MODELS[name]})


# --- options and sizes ---


def test_every_default_is_an_option_with_a_valid_value() -> None:
    values = {**SPEC.defaults.train, **SPEC.defaults.demo, **SPEC.defaults.lora}
    assert len(values) > 30
    for name, value in values.items():
        parse(name, value, SPEC.name)
    assert SPEC.defaults.train["train_mode"] in SPEC.train_modes


def test_lora_targets_are_layers_of_the_model(adapters: dict[str, CogVideoXFunAdapter]) -> None:
    names = [name for name, _ in adapters["2b"].transformer.named_modules()]
    hits = Counter(target for target in SPEC.defaults.lora["target_name"] for name in names if name.endswith(target))
    assert hits == dict.fromkeys(("to_q", "to_k", "to_v", "ff.net.0.proj", "ff.net.2"), 2)


@pytest.mark.parametrize(
    ("name", "token", "frames"),
    [
        ("2b", 512, {256: 49, 512: 49, 640: 29, 768: 21, 896: 13, 1024: 9}),
        ("V1.5", 512, {512: 45, 640: 29, 768: 21, 896: 13, 1024: 5}),
    ],
)
def test_sizes_and_frames_follow_the_documents_and_the_parity_of_v15(
    name: str, token: int, frames: dict[int, int]
) -> None:
    asked = PlanOptions.pick(SPEC.defaults.train, token_sample_size=token)
    assert {size: frames_at(size, asked, SPEC, dims(name)) for size in frames} == frames


@pytest.mark.parametrize(("frames", "adjusted"), [(81, 77), (49, 45), (17, 13), (13, 13), (9, 5), (5, 5), (1, 1)])
def test_v15_takes_an_even_number_of_latent_frames(frames: int, adjusted: int) -> None:
    assert SPEC.plan.adjust_frames is not None
    assert SPEC.plan.adjust_frames(frames, dims("V1.5")) == adjusted
    assert SPEC.plan.adjust_frames(frames, dims("5b")) == frames


def test_2b_refuses_more_frames_than_it_has_positions_for() -> None:
    asked = PlanOptions.pick(SPEC.defaults.train, video_sample_n_frames=53)
    check_options(asked, SPEC, dims("5b"))
    with pytest.raises(ConfigError, match="positions for 49 frames") as caught:
        check_options(asked, SPEC, dims("2b"))
    assert "--video-sample-n-frames 49" in str(caught.value.hint)


def test_normal_mode_on_an_inp_model_says_why_not(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"16 channels .*reads 33: an InP model is trained to inpaint") as caught:
        CogVideoXFunAdapter.from_pretrained(options(folders["2b"], "normal"))
    assert caught.value.hint == "Use --train-mode inpaint."
    with pytest.raises(ConfigError, match=r"33 channels .*reads 16\.$") as caught:
        CogVideoXFunAdapter.from_pretrained(options(folders["normal"], "inpaint"))
    assert caught.value.hint == "Use --train-mode normal."


def test_a_folder_without_a_transformer_names_the_file_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformer/config\.json"):
        CogVideoXFunAdapter.from_pretrained(options(tmp_path))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_missing_encoder_folder_is_named_before_the_transformer_is_read(
    part: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["2b"], tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    (tmp_path / "model/transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"model/{part}:"):
        CogVideoXFunAdapter.from_pretrained(options(tmp_path / "model"))


def test_the_demo_model_is_the_same_every_time(folders: dict[str, Path], tmp_path: Path) -> None:
    build_model(tmp_path / "again")
    files = [path.relative_to(folders["2b"]) for path in sorted(folders["2b"].rglob("*")) if path.is_file()]
    assert len(files) >= 10
    for file in files:
        assert (folders["2b"] / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


# --- masks ---


def paint(draw: Draw, row: int = 0, frames: int = 13, height: int = 32, width: int = 48) -> np.ndarray:
    mask = np.zeros((frames, height, width), dtype=np.bool_)
    draw(SampleKey(0, 0, row).numpy("mask"), mask)
    return mask


def mode_of(name: str) -> Draw:
    return next(draw for draw, _ in VIDEO_MODES if draw.__name__ == name)


def test_ten_modes_have_the_released_probabilities() -> None:
    assert [chance for _, chance in VIDEO_MODES] == [0.05, 0.2, 0.2, 0.2, 0.05, 0.05, 0.05, 0.1, 0.05, 0.05]
    assert sum(chance for _, chance in VIDEO_MODES) == pytest.approx(1)
    assert [VIDEO_MODES.index(next(m for m in VIDEO_MODES if m[0] is draw)) for draw, _ in IMAGE_MODES] == [0, 1, 7, 8]
    assert [chance for _, chance in IMAGE_MODES] == [0.2, 0.7, 0.05, 0.05]


def kind_of(mask: np.ndarray) -> str:
    """What can be told of a mask from outside."""
    whole, empty = mask.all((1, 2)), ~mask.any((1, 2))
    if whole.all():
        return "everything"
    first, last = int(np.argmin(empty)), len(mask) - int(np.argmin(empty[::-1]))
    if whole[first:last].all() and (whole | empty).all() and 1 <= first <= 4:
        if last == len(mask):
            return "first known"
        if len(mask) - last == first:
            return "first and last known"
    return "frame 0 alone" if not mask[1:].any() and mask[0].any() else "other"


def test_masks_are_as_frequent_as_in_the_original() -> None:
    drawn = Counter(kind_of(draw_mask(SampleKey(0, 0, row).numpy("mask"), 49, 16, 16)) for row in range(3000))
    measured = {"everything": 0.203, "first known": 0.19, "first and last known": 0.199, "frame 0 alone": 0.154}
    for kind, share in measured.items():
        assert drawn[kind] / 3000 == pytest.approx(share, abs=0.03), kind
    pictures = [draw_mask(SampleKey(0, 0, row).numpy("mask"), 1, 16, 16) for row in range(1000)]
    assert sum(mask.all() for mask in pictures) / 1000 == pytest.approx(0.7, abs=0.05)


def test_masks_depend_on_the_key_alone() -> None:
    one, again, other = (draw_mask(SampleKey(0, 0, row).numpy("mask"), 9, 32, 48) for row in (2, 2, 5))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_rectangles_are_a_quarter_to_three_quarters_wide() -> None:
    mask = paint(mode_of("rectangle"))
    assert mask.any() and (mask == mask[0]).all()
    heights = {int(paint(mode_of("rectangle"), row, 1).any(2).sum()) for row in range(300)}
    assert heights <= set(range(4, 23)) and {4, 22} <= heights  # of 32; 8 // 2 is left of one at the border
    late = paint(mode_of("rectangle_for_a_while"))
    shown = np.flatnonzero(late.any((1, 2)))
    assert 0 <= shown[0] < 6 and shown[-1] < 13 and (np.diff(shown) == 1).all() and len(shown) < 13


def test_known_frames_are_the_first_or_the_first_and_last_one_to_four() -> None:
    firsts = {int(np.argmax(paint(mode_of("after_first_frames"), row).any((1, 2)))) for row in range(50)}
    assert firsts == {1, 2, 3, 4}
    for row in range(20):
        frames = paint(mode_of("between_first_and_last_frames"), row).all((1, 2))
        known = int(np.argmax(frames))
        assert 1 <= known <= 4 and frames[known : 13 - known].all() and not frames[13 - known :].any()
    short = {int(paint(mode_of("between_first_and_last_frames"), row, 5).any((1, 2)).sum()) for row in range(50)}
    assert short == {0, 1, 3}  # three or four known frames at each end of five leave nothing to generate


def test_pixels_blocks_and_frames_are_scattered() -> None:
    assert paint(mode_of("scattered_pixels")).mean() == pytest.approx(0.5, abs=0.02)
    for row in range(20):
        blocks = paint(mode_of("blocks_in_some_frames"), row)
        assert 1 <= blocks.any((1, 2)).sum() <= 6
        assert blocks.any(2).sum(1).max() <= 8 and blocks.any(1).sum(1).max() <= 12
    frames = np.concatenate([paint(mode_of("whole_frames"), row).mean((1, 2)) for row in range(50)])
    assert set(frames) == {0.0, 1.0} and frames.mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", ["ellipse", "circle"])
def test_ellipses_and_circles_are_on_frame_0_alone(name: str) -> None:
    areas = []
    for row in range(50):
        mask = paint(mode_of(name), row, 5, 64, 64)
        assert mask[0].any() and not mask[1:].any()
        areas.append(mask[0].sum())
    assert max(areas) <= np.pi * 16**2


# --- encoders ---


def golden_vae(folder: Path) -> CogVideoXVAE:
    (folder / "config.json").symlink_to((GOLDEN / "vae/config.json").resolve())
    (folder / "diffusion_pytorch_model.safetensors").symlink_to((GOLDEN / "vae/weights.safetensors").resolve())
    return CogVideoXVAE.from_folder(folder, dtype=torch.float32)


def test_vae_encodes_as_the_original(tmp_path: Path) -> None:
    vae = golden_vae(tmp_path)
    tensors = load_file(GOLDEN / "vae/io.safetensors")
    for frames in (1, 5, 9, 13, 17, 49):
        given = torch.rand(1, 3, frames, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
        pixels = tensors.get(f"f{frames}.x", given)
        mean, logvar = tensors[f"f{frames}.mean"], tensors[f"f{frames}.logvar"]
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        assert vae.scale == read_scale(tmp_path) == 1.15258426
        torch.testing.assert_close(vae.encode(pixels), mean * 1.15258426, atol=1e-5, rtol=0)
        if frames <= 13:
            sampled = (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise) * 1.15258426
            torch.testing.assert_close(vae.encode(pixels, noise), sampled, atol=1e-5, rtol=0)


def test_vae_mini_batches_change_nothing_and_odd_lengths_are_refused(tmp_path: Path) -> None:
    vae = golden_vae(tmp_path)
    pixels = torch.rand(3, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one = vae.encode(pixels)
    vae.mini_batch = 2
    torch.testing.assert_close(vae.encode(pixels), one, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"1 \+ 4k frames, got 7"):
        vae.encode(pixels[:, :, [0, 1, 2, 3, 4, 4, 4]])


def test_captions_fill_226_tokens_and_the_encoder_sees_the_padding(
    adapters: dict[str, CogVideoXFunAdapter], folders: dict[str, Path]
) -> None:
    encoder = adapters["2b"].encoders["text"]
    ids = encoder.tokenize(["a red ball", "a very long caption " * 90])
    assert ids.shape == (2, 226)
    whole = T5EncoderModel.from_pretrained(folders["2b"] / "text_encoder", dtype=torch.float32)
    with torch.no_grad():
        bare = whole(input_ids=ids[:1]).last_hidden_state
        masked = whole(input_ids=ids[:1], attention_mask=(ids[:1] != 0).long()).last_hidden_state
    torch.testing.assert_close(encoder.encode(["a red ball"]), bare)
    assert not torch.allclose(bare, masked)


# --- conditioning ---


def test_inpaint_condition_is_the_originals_from_pixels_and_mask(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "inpaint_chain/io.safetensors")
    vae = golden_vae(tmp_path)
    pixels = tensors["pixel_values"]  # [B, F, 3, H, W]
    mask = tensors["mask"].bool()
    known = pixels.masked_fill(mask, -1.0)
    assert torch.equal(known, tensors["mask_pixel_values"])
    latents = vae.encode(known.transpose(1, 2))
    torch.testing.assert_close(latents / vae.scale, tensors["masked_mean_unscaled"], atol=1e-5, rtol=0)
    inpaint = join(latents, mask.transpose(1, 2), vae.scale)
    torch.testing.assert_close(inpaint[:, :1] / vae.scale, tensors["mask_resized"], atol=1e-6, rtol=0)
    torch.testing.assert_close(inpaint.transpose(1, 2), tensors["inpaint_latents"], atol=1e-5, rtol=0)


def test_known_pixels_get_a_little_noise_and_black_ones_none() -> None:
    known = torch.zeros(3, 5, 32, 48)
    known[:, 1:] = -1.0
    noisy = [add_noise(known, SampleKey(0, 0, row)) for row in range(400)]
    assert all(torch.equal(clip[:, 1:], known[:, 1:]) for clip in noisy)
    logs = torch.stack([clip[:, 0].std().log() for clip in noisy])
    assert logs.mean().item() == pytest.approx(-3.0, abs=0.1)
    assert logs.std().item() == pytest.approx(0.5, abs=0.06)


def test_only_models_that_want_it_get_noise_on_known_pixels(
    adapters: dict[str, CogVideoXFunAdapter], media: Path
) -> None:
    asked, adapter = request(media), adapters["5b"]  # one model, so that its weights make no difference
    samples = [load(CogVideoXFunAdapter, asked, replace(PLAIN, model_settings=settings(name))) for name in ("2b", "5b")]
    quiet, noisy = (encode(adapter, [sample], [asked.key])[1]["inpaint"] for sample in samples)
    assert torch.equal(quiet[:, 0], noisy[:, 0])
    assert (quiet[:, 1:] - noisy[:, 1:]).abs().max() > 1e-4


@pytest.mark.slow
def test_clips_without_known_pixels_mostly_have_no_condition(adapters: dict[str, CogVideoXFunAdapter]) -> None:
    everything = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    part = everything.clone()
    part[..., :8] = False
    keys = [SampleKey(0, 0, row) for row in range(60)]
    _, conditions = encoded(adapters["2b"], [clip(everything)] * 60 + [clip(part)] * 20, keys + keys[:20])
    given = conditions["inpaint"].flatten(1).any(1)
    assert 0 < given[:60].sum() <= 14
    assert given[60:].all()


@pytest.mark.slow
def test_where_nothing_is_left_out_clips_without_known_pixels_have_no_condition_as_in_inference(
    adapters: dict[str, CogVideoXFunAdapter],
) -> None:
    everything = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    part = everything.clone()
    part[..., :8] = False
    keys = [SampleKey(0, 0, row, drops=False) for row in range(20)]
    _, conditions = encoded(adapters["2b"], [clip(everything)] * 20 + [clip(part)] * 20, keys * 2)
    given = conditions["inpaint"].flatten(1).any(1)
    assert not given[:20].any() and given[20:].all()


def test_one_caption_in_ten_is_left_out(media: Path) -> None:
    normal = replace(PLAIN, train_mode="normal")
    made = [CogVideoXFunAdapter.inputs(request(media, "image", row=row), normal) for row in range(300)]
    texts = [inputs["text"].lazy for inputs in made]
    assert set(texts) == {Value(""), Value("a red ball")}
    assert texts.count(Value("")) / 300 == pytest.approx(0.1, abs=0.05)


def test_masks_and_their_noise_are_drawn_and_described_by_what_decides_them(media: Path) -> None:
    def seen(epoch: int, noisy: bool, variants: int = 0) -> tuple[dict[str, Tensor], list[str]]:
        asked = replace(request(media, "image"), key=SampleKey(0, epoch, 1, variants=variants))
        inputs = CogVideoXFunAdapter.inputs(asked, replace(PLAIN, model_settings={"add_noise_in_inpaint_model": noisy}))
        drawn = {name: inputs[name].lazy for name in ("mask", "known")}
        assert inputs["mask"].encoder is None
        return load_inputs(drawn), [describe(each, str) for each in drawn.values()]

    drawn = draw_mask(SampleKey(0, 2, 1).numpy("mask"), 1, 32, 48)
    assert not drawn.all()
    plain, texts = seen(2, noisy=False)
    assert np.array_equal(plain["mask"][:, 0].numpy(), drawn)
    noisy, noisy_texts = seen(2, noisy=True)
    expected = add_noise(plain["known"].transpose(0, 1), SampleKey(0, 2, 1)).transpose(0, 1)
    assert torch.equal(noisy["known"], expected) and not torch.equal(expected, plain["known"])
    assert noisy_texts[0] == texts[0] and noisy_texts[1] != texts[1]
    assert seen(5, True, variants=3)[1] == noisy_texts == seen(2, True, variants=4)[1]
    assert torch.equal(seen(5, True, variants=3)[0]["known"], noisy["known"])
    assert not set(seen(5, True)[1]) & set(noisy_texts)


def test_target_and_known_latents_have_noise_of_their_own(adapters: dict[str, CogVideoXFunAdapter]) -> None:
    sample = clip(torch.zeros(5, 1, 32, 48, dtype=torch.bool))
    values = prepared(sample).values
    assert torch.equal(values["known"], values["clip"])
    latents, conditions = encoded(adapters["2b"], [sample], [SampleKey(0, 0, 0)])
    assert not torch.equal(latents, conditions["inpaint"][:, 1:])


# --- the whole step ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_row_becomes_a_loss_with_gradients(
    kind: str, name: str, adapters: dict[str, CogVideoXFunAdapter], folders: dict[str, Path], media: Path
) -> None:
    adapter, asked = adapters[name], request(media, kind)
    mode = "normal" if name == "normal" else None
    sample = load(type(adapter), asked, replace(PLAIN, train_mode=mode, model_settings=settings(name)))
    seen = {name: readable(value) for name, value in sample.values.items()}
    assert seen["clip"].shape == (asked.frames, 3, 32, 48)
    assert ("mask" in seen) == ("known" in seen) == (name != "normal")
    if name != "normal":
        assert seen["mask"].shape == (asked.frames, 1, 32, 48)
        quiet = load(type(adapter), asked, replace(PLAIN, model_settings={"add_noise_in_inpaint_model": False})).values[
            "known"
        ]
        assert torch.equal(quiet, seen["clip"].masked_fill(seen["mask"], -1.0))
        assert torch.equal(seen["known"], quiet) == (name == "2b" or bool(seen["mask"].all()))

    latents, conditions = encode(adapter, [sample], [asked.key])
    assert latents.shape == (1, 16, 2 if kind == "video" else 1, 4, 6)
    objective = make_objective(SPEC.model.objective, SPEC.model.objective_options, folders[name])
    corrupted = objective.corrupt(latents, [asked.key])
    prediction = adapter.predict(adapter.transformer, corrupted.noisy, corrupted.timesteps, conditions)
    assert prediction.shape == latents.shape
    adapter.transformer.zero_grad()
    objective.loss(prediction, corrupted.target, None).backward()
    assert adapter.transformer.proj_out.weight.grad.abs().sum() > 0


def test_mask_enters_between_noise_and_known_latents(adapters: dict[str, CogVideoXFunAdapter]) -> None:
    adapter = adapters["2b"]
    latents, conditions = encoded(adapter, [clip(first_frame_known())], [SampleKey(0, 0, 0)])
    seen: list[Tensor] = []
    hook = adapter.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    adapter.predict(adapter.transformer, latents, torch.tensor([500]), conditions)
    hook.remove()
    assert torch.equal(seen[0][:, :, :16], latents.transpose(1, 2))
    scale = adapter.encoders["vae"].scale
    assert scale == adapter.scale
    assert torch.equal(seen[0][0, :, 16], torch.tensor([scale, 0.0]).view(2, 1, 1).expand(2, 4, 6))
    assert torch.equal(seen[0][:, :, 17:], conditions["inpaint"][:, 1:].transpose(1, 2))


def test_bf16_encoders_and_inputs_run_without_autocast(folders: dict[str, Path]) -> None:
    adapter = CogVideoXFunAdapter.from_pretrained(options(folders["5b"], compute_dtype=torch.bfloat16))
    latents, conditions = encoded(adapter, [clip(first_frame_known())], [SampleKey(0, 0, 0)])
    assert latents.dtype == conditions["inpaint"].dtype == torch.float32
    assert conditions["text"].dtype == torch.bfloat16
    half = adapter.transformer.to(torch.bfloat16)
    prediction = adapter.predict(half, latents.to(torch.bfloat16), torch.tensor([500]), conditions)
    assert prediction.dtype == torch.bfloat16


def test_learns_the_velocity_of_its_directorys_schedule(folders: dict[str, Path]) -> None:
    schedule = make_objective(SPEC.model.objective, SPEC.model.objective_options, folders["2b"])
    assert schedule.prediction_type == "v_prediction"
    # Zero terminal SNR, and without the sampler's shift: training reads the file as DDPM.
    expected = {0: 0.99915, 100: 0.88676, 500: 0.24102, 900: 0.00296, 999: 0.0}
    assert {t: schedule.alphas_cumprod[t].item() for t in expected} == pytest.approx(expected, abs=1e-4)


def test_exported_names_are_those_of_the_released_file(
    adapters: dict[str, CogVideoXFunAdapter], folders: dict[str, Path]
) -> None:
    stored = set(load_file(folders["2b"] / "transformer/diffusion_pytorch_model.safetensors"))
    adapter = adapters["2b"]
    assert {SPEC.export.names["same"](name) for name, _ in adapter.transformer.named_parameters()} == stored
    assert json.loads((folders["5b"] / "transformer/config.json").read_text())["add_noise_in_inpaint_model"] is True
