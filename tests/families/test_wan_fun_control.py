"""The Wan2.1-Fun Control family: tokens, FLOPs and conditions against a live tiny model and real tiny media."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vfun_cli.config.options import parse
from vfun_cli.demo.wan_fun_control import CONFIG, build_model
from vfun_cli.demo.wan_parts import write_clip
from vfun_cli.encoding.encode import encode, load, prepared
from vfun_cli.errors import CheckpointError
from vfun_cli.families.spec import ClipShape
from vfun_cli.families.wan_fun_control import IMAGE_DIM, IMAGE_TOKENS, SPEC, read_dims
from vfun_cli.families.wan_fun_control.adapter import WanFunControlAdapter, choose
from vfun_cli.families.wan_fun_control.names import released_name
from vfun_cli.families.wan_fun_control.transformer import WanFunControlTransformer
from vfun_cli.modeling.adapter import AdapterOptions, Conditions, SampleRequest
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.modeling.encoders.wan_vae import WanVAE
from vfun_cli.modeling.inputs import Decoded, Value
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.weights import read_json, read_safetensors, safetensors_files

CPU = torch.device("cpu")
FIRST = AdapterOptions(model_dir=Path(), compute_dtype=torch.float32, device=CPU)
RANDOM = dataclasses.replace(FIRST, control_ref_image="random")

SHAPES = [
    ClipShape(frames=frames, height=height, width=width)
    for frames in (1, 9)
    for height, width in ((64, 64), (48, 96), (112, 80))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "Wan2.1-Fun-V1.1-Control"
    build_model(folder, seed=0)
    torch.manual_seed(0)
    write_clip(folder, tokens=5)  # instead of 257: hundreds of pictures are encoded below
    return folder


@pytest.fixture(scope="module")
def adapter_with(folder: Path) -> Callable[..., WanFunControlAdapter]:
    """Adapters that share one loaded model and differ in their options."""
    loaded = WanFunControlAdapter.from_pretrained(options(folder))

    def make(**changes: Any) -> WanFunControlAdapter:
        return WanFunControlAdapter(
            transformer=loaded.transformer,
            encoders=encoders_like(loaded.encoders, options(folder, **changes)),
            options=options(folder, **changes),
        )

    return make


def encoders_like(loaded: Encoders, options: AdapterOptions) -> Encoders:
    """The same encoders, their VAE with the options' mini-batch."""
    encoders = Encoders(loaded.sources, options.device)
    encoders.loaded = {**loaded, "vae": WanVAE(loaded["vae"].model, mini_batch=options.vae_mini_batch)}
    return encoders


def options(folder: Path, **changes: Any) -> AdapterOptions:
    given = {
        "train_mode": "control_object",
        "control_ref_image": "random",
        "compute_dtype": torch.float32,
        "vae_mini_batch": 16,
    }
    return AdapterOptions(model_dir=folder, device=CPU, **{**given, **changes})


def keys(count: int) -> list[SampleKey]:
    return [SampleKey(seed=1, epoch=0, row=row) for row in range(count)]


def clip(frames: int = 5, text: str = "a dog", side: int = 32) -> dict[str, Any]:
    pixels = torch.rand(frames, 3, side, side, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    return {"pixels": pixels, "control": -pixels, "text": text}


def encoded(
    adapter: WanFunControlAdapter, samples: list[dict[str, Any]], keys: list[SampleKey]
) -> tuple[torch.Tensor, Conditions]:
    """The samples as their keys decide."""
    captions = ["" if key.chance("text", 0.1) else sample["text"] for sample, key in zip(samples, keys, strict=True)]
    modes = {"train_mode": adapter.options.train_mode, "control_ref_image": adapter.options.control_ref_image}
    inputs = [
        adapter.compose(Decoded(sample["pixels"]), Decoded(sample["control"]), caption, key, **modes)
        for sample, caption, key in zip(samples, captions, keys, strict=True)
    ]
    return encode(adapter, [prepared(each) for each in inputs], keys)


def live_model(*, reference: bool, dim: int = 64) -> WanFunControlTransformer:
    return WanFunControlTransformer(
        has_reference=reference,
        num_attention_heads=4,
        attention_head_dim=dim // 4,
        in_channels=48,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=2 * dim,
        num_layers=2,
        image_dim=IMAGE_DIM,
        added_kv_proj_dim=dim,
    )


def run_live(model: WanFunControlTransformer, shape: ClipShape) -> None:
    frames, height, width = SPEC.plan.latent_shape(shape)
    reference = torch.zeros(1, 16, height, width) if model.has_reference else None
    image = torch.zeros(1, IMAGE_TOKENS, IMAGE_DIM)
    latents = torch.zeros(1, 48, frames, height, width)
    # The counter knows the plain attention of the CPU, not its fused one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(latents, torch.tensor([500.0]), torch.zeros(1, 512, 32), image, reference)


@pytest.mark.parametrize("reference", [False, True], ids=["V1.0", "V1.1"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.frames}x{s.height}x{s.width}")
def test_planned_tokens_and_flops_are_those_of_the_live_model(shape, reference):
    model = live_model(reference=reference)
    lengths = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    with FlopCounterMode(display=False) as counter:
        run_live(model, shape)
    dims = read_dims({**CONFIG, "image_dim": IMAGE_DIM, "add_ref_conv": reference})
    assert lengths == [SPEC.model.sequence_tokens(shape, dims)]
    assert SPEC.model.forward_flops(shape, dims) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_the_documents_clip_has_the_documents_tokens():
    shape = ClipShape(frames=49, height=512, width=512)
    assert SPEC.model.sequence_tokens(shape, SPEC.model.dims) == 13_312
    v11 = read_dims({"in_dim": 48, "dim": 5120, "ffn_dim": 13824, "num_layers": 40, "add_ref_conv": True})
    assert SPEC.model.sequence_tokens(shape, v11) == 13_312 + 1_024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_dim": 36}, "36 channels"),
        ({"in_dim": 32, "add_control_adapter": True}, "Camera"),
        ({"dim": None}, "dim is missing"),
    ],
)
def test_configurations_of_other_models_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        read_dims({**CONFIG, **change})


def test_every_default_is_a_value_its_option_takes():
    layers = [SPEC.defaults.train, SPEC.defaults.lora, SPEC.defaults.demo, *SPEC.defaults.by_strategy.values()]
    values = [parse(name, value, "default") for layer in layers for name, value in layer.items()]
    assert len(values) > 40
    modes = {layer["train_mode"] for layer in layers if "train_mode" in layer}
    assert modes == {"control_object", "inpaint"} <= set(SPEC.train_modes)


def test_the_released_directory_loads_exactly_and_names_go_back(folder):
    adapter = WanFunControlAdapter.from_pretrained(options(folder))
    released = dict(read_safetensors(safetensors_files(folder)))
    live = adapter.transformer.state_dict()
    assert {SPEC.export.names["same"](name) for name in live} == set(released)
    assert {SPEC.export.names["same"](name) for name in live} == set(released)
    assert all(torch.equal(live[name], released[released_name(name)].float()) for name in live)
    assert {tensor.dtype for tensor in live.values()} == {torch.float32}


def test_the_demo_model_is_the_same_bytes_for_the_same_seed(folder, tmp_path):
    build_model(tmp_path / "again", seed=0)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_directory_without_a_part_is_refused_by_its_file_name(tmp_path):
    build_model(tmp_path, seed=0)
    for name in ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "Wan2.1_VAE.pth", "config.json"):
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            WanFunControlAdapter.from_pretrained(options(tmp_path))


def shares(**modes: str) -> dict[str, float]:
    """How often each condition is kept, over many samples of nine frames."""
    given = {"train_mode": "control_object", "control_ref_image": "random", **modes}
    choices = [choose(key, 9, **given) for key in keys(4000)]
    assert not any(choice.start and choice.reference for choice in choices)
    names = ("control", "start", "reference", "image")
    return {name: sum(getattr(choice, name) for choice in choices) / len(choices) for name in names}


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({}, {"control": 0.9, "start": 0.4 * 0.9, "reference": 0.6 * 0.9, "image": 0.9}),
        ({"control_ref_image": "first_frame"}, {"control": 0.9, "start": 0.9, "reference": 0.0, "image": 0.9}),
        ({"train_mode": "control"}, {"control": 0.9, "start": 0.0, "reference": 0.0, "image": 0.0}),
    ],
    ids=["random", "first_frame", "control"],
)
def test_conditions_are_kept_as_often_as_the_released_models_saw_them(modes, expected):
    assert shares(**modes) == pytest.approx(expected, abs=0.025)


def test_images_keep_their_only_picture() -> None:
    keys = [SampleKey(seed=3, epoch=0, row=row) for row in range(200)]
    for mode in ("first_frame", "random"):
        choices = [choose(key, 1, train_mode="inpaint", control_ref_image=mode) for key in keys]
        assert all(choice.start and not choice.reference for choice in choices)


def test_a_random_picture_is_frame_0_or_evenly_a_later_one():
    picked = [choose(key, 5, train_mode="control_ref", control_ref_image="random").picture for key in keys(4000)]
    assert [picked.count(i) / 4000 for i in range(5)] == pytest.approx([0.4, 0.15, 0.15, 0.15, 0.15], abs=0.025)
    assert choose(keys(1)[0], 1, train_mode="control_ref", control_ref_image="random").picture == 0


def test_a_v11_model_that_never_sees_a_reference_says_so(adapter_with, caplog):
    caplog.clear()
    adapter_with(control_ref_image="random")
    assert "zeros only" not in caplog.text
    adapter_with(control_ref_image="first_frame")
    assert "zeros only" in caplog.text


def test_what_a_sample_does_not_keep_is_zeros(adapter_with):
    drawn = {key: choose(key, 5, train_mode="control_object", control_ref_image="random") for key in keys(60)}
    chosen = list({str(choice): key for key, choice in drawn.items()}.values())  # one of each kind
    latents, conditions = encoded(adapter_with(), [clip(side=16)] * len(chosen), chosen)
    control = conditions["control"]
    parts = {
        "control": control[:, :16],
        "start": control[:, 16:, 0],
        "reference": conditions["reference"],
        "image": conditions["image"],
    }
    for name, tensor in parts.items():
        kept = [getattr(drawn[key], name) for key in chosen]
        assert set(kept) == {True, False}, name
        assert tensor.flatten(1).ne(0).any(dim=1).tolist() == kept, name
    assert not control[:, 16:, 1:].any()
    assert latents.shape == (len(chosen), 16, 2, 2, 2)


@pytest.mark.parametrize("mode", ["inpaint", "control_ref"])
def test_the_modes_of_the_documents_and_of_the_script_are_one(adapter_with, mode):
    samples = [clip(), clip()]
    latents, conditions = encoded(adapter_with(train_mode=mode), samples, keys(2))
    expected, expected_conditions = encoded(adapter_with(train_mode="control_object"), samples, keys(2))
    assert torch.equal(latents, expected)
    assert conditions.keys() == expected_conditions.keys()
    assert all(torch.equal(conditions[name], expected_conditions[name]) for name in conditions)


def test_control_and_start_latents_are_those_of_the_control_clip_and_of_frame_0(adapter_with):
    modes = {"train_mode": "control_object", "control_ref_image": "first_frame"}
    adapter, sample = adapter_with(**modes), clip(9)
    drawn = {key: choose(key, 9, **modes) for key in keys(50)}
    key = next(key for key, choice in drawn.items() if choice.control and choice.start)
    _, conditions = encoded(adapter, [sample], [key])

    def direct(pixels, purpose):
        vae, video = adapter.encoders["vae"], pixels.transpose(0, 1)[None]
        return vae.encode(video, key.normal(purpose, tuple(vae.encode(video).shape[1:]))[None])

    assert not torch.equal(sample["control"], sample["pixels"])
    torch.testing.assert_close(conditions["control"][:, :16], direct(sample["control"], "control posterior"))
    torch.testing.assert_close(conditions["control"][:, 16:, :1], direct(sample["pixels"][:1], "picture posterior"))


def test_reference_and_clip_embedding_are_of_the_chosen_frame(adapter_with):
    adapter = adapter_with()
    sample = clip(9)
    drawn = {key: choose(key, 9, train_mode="control_object", control_ref_image="random") for key in keys(50)}
    key, choice = next((k, c) for k, c in drawn.items() if c.reference and c.image)
    index = choice.picture
    _, conditions = encoded(adapter, [sample], [key])
    frame = sample["pixels"][index : index + 1]
    noise = key.normal("picture posterior", (16, 1, 4, 4))[None]
    latent = adapter.encoders["vae"].encode(frame.transpose(0, 1)[None], noise)[:, :, 0]
    torch.testing.assert_close(conditions["reference"], latent)
    torch.testing.assert_close(conditions["image"], adapter.encoders["clip"].encode(frame))


def test_a_sample_is_encoded_alike_whatever_its_neighbours(adapter_with):
    adapter = adapter_with(vae_mini_batch=2)
    batch = [clip(text="a dog"), clip(text="a much longer sentence about cats"), clip(text="")]
    latents, conditions = encoded(adapter, batch, keys(3))
    for row, (sample, key) in enumerate(zip(batch, keys(3), strict=True)):
        alone, alone_conditions = encoded(adapter, [sample], [key])
        torch.testing.assert_close(latents[row : row + 1], alone)
        for name, value in alone_conditions.items():
            torch.testing.assert_close(conditions[name][row : row + 1], value)


def write_video(path: Path, frames: int, height: int = 48, width: int = 64) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(frames):
            level = np.full((height, width, 3), index * 250 // frames, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def request(record: dict[str, Any], *, kind: str, frames: int, row: int = 0, total: int = 30) -> SampleRequest:
    return SampleRequest(
        key=SampleKey(seed=3, epoch=0, row=row),
        record=record,
        kind=kind,
        frames=frames,
        height=48,
        width=64,
        stride=2,
        total_frames=total,
        fps=(24, 1),
    )


@pytest.mark.slow
def test_a_control_clip_shows_the_frames_of_its_video(tmp_path):
    for name in ("clip.mp4", "control.mp4"):
        write_video(tmp_path / name, 30)
    record = {
        "file_path": str(tmp_path / "clip.mp4"),
        "control_file_path": str(tmp_path / "control.mp4"),
        "text": "grey",
    }
    requests = [request(record, kind="video", frames=9, row=row) for row in range(12)]
    samples = [load(WanFunControlAdapter, each, FIRST).values for each in requests]
    for sample in samples:
        assert sample["clip"].shape == (9, 3, 48, 64)
        assert torch.equal(sample["clip"], sample["control"])
    assert len({sample["clip"][0].float().mean().item() for sample in samples}) > 3  # clips start at different frames


def test_a_missing_control_is_black_for_videos_and_images(tmp_path):
    write_video(tmp_path / "clip.mp4", 20)
    Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(tmp_path / "picture.png")
    video = {"file_path": str(tmp_path / "clip.mp4"), "control_file_path": None, "text": "x"}
    image = {"file_path": str(tmp_path / "picture.png"), "text": "x"}
    cases = (request(video, kind="video", frames=5, total=20), request(image, kind="image", frames=1, total=1))
    for case in cases:
        sample = load(WanFunControlAdapter, case, FIRST).values
        assert sample["control"].shape == sample["clip"].shape == (case.frames, 3, 48, 64)
        assert (sample["control"] == -1).all()


def test_texts_are_dropped_one_time_in_ten(tmp_path):
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "picture.png")
    record = {"file_path": str(tmp_path / "picture.png"), "text": "x"}
    texts = [
        load(WanFunControlAdapter, request(record, kind="image", frames=1, row=row), FIRST).values["text"]
        for row in range(300)
    ]
    assert texts.count("") / 300 == pytest.approx(0.1, abs=0.05)


def test_with_variants_only_so_many_clips_and_pictures_are_drawn_and_drops_stay_random():
    record = {"file_path": "clip.mp4", "control_file_path": "control.mp4", "text": "grey"}
    keys = [SampleKey(seed=3, epoch=epoch, row=0, variants=3) for epoch in range(90)]
    requests = [dataclasses.replace(request(record, kind="video", frames=9), key=key) for key in keys]
    drawn = [WanFunControlAdapter.inputs(each, RANDOM) for each in requests]
    for name in ("clip", "control", "picture", "image"):
        assert 1 < len({each[name] for each in drawn}) <= 3, name
    assert {each["text"].lazy for each in drawn} == {Value(""), Value("grey")}
    kept = {choose(key, 9, train_mode="control_object", control_ref_image="random").control for key in keys}
    assert kept == {True, False}


def test_the_picture_that_is_encoded_is_the_one_that_is_chosen():
    record = {"file_path": "clip.mp4", "text": "grey"}
    for row in range(30):
        case = request(record, kind="video", frames=9, row=row)
        inputs = WanFunControlAdapter.inputs(case, RANDOM)
        choice = choose(case.key, 9, train_mode="", control_ref_image="random")
        assert inputs["picture"].lazy == inputs["image"].lazy == inputs["clip"].lazy.take([choice.picture])


def test_a_caption_too_long_is_cut_to_512_tokens_and_keeps_its_end_token(adapter_with):
    encoder = adapter_with().encoders["text"]
    short, long = encoder.tokenize(["a dog", "a dog " * 600])
    assert len(short) < 10 and len(long) == 512
    assert short[-1] == long[-1] == encoder.tokenizer.eos_token_id
    assert encoder.encode(["a dog " * 600])[0].shape == (512, 32)


def test_mode_control_encodes_no_picture_and_trains_with_zeros(adapter_with):
    adapter = adapter_with(train_mode="control")
    del adapter.encoders.loaded["clip"]
    latents, conditions = encoded(adapter, [clip(), clip()], keys(2))
    assert "clip" not in adapter.encoders.loaded
    expected, others = encoded(adapter_with(train_mode="control_object"), [clip(), clip()], keys(2))
    assert torch.equal(latents, expected) and torch.equal(conditions["control"][:, :16], others["control"][:, :16])
    assert not conditions["control"][:, 16:].any()
    assert conditions.keys() == others.keys()
    for name in ("reference", "image"):
        assert not conditions[name].any() and conditions[name].dtype == others[name].dtype
    assert conditions["reference"].shape == others["reference"].shape
    assert conditions["image"].shape == (2, IMAGE_TOKENS, 32)


def test_encoders_are_loaded_when_they_are_first_used(folder):
    adapter = WanFunControlAdapter.from_pretrained(options(folder))
    assert not adapter.encoders.loaded
    adapter.encoders.run("text", ["hello"])
    assert set(adapter.encoders.loaded) == {"text"}


@pytest.mark.parametrize("reference", [True, False], ids=["V1.1", "V1.0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 5])
def test_a_micro_batch_goes_through_the_whole_model(tmp_path, dtype, frames, reference):
    build_model(tmp_path, seed=0, reference=reference)
    assert ("add_ref_conv" in read_json(tmp_path / "config.json")) == reference
    adapter = WanFunControlAdapter.from_pretrained(options(tmp_path, compute_dtype=dtype, low_vram=True))
    adapter.transformer.to(dtype)
    latents, conditions = encoded(adapter, [clip(frames), clip(frames, text="")], keys(2))
    assert latents.dtype == torch.float32
    conditions = {name: tensor.to(dtype) for name, tensor in conditions.items()}
    assert ("reference" in conditions) == reference
    assert conditions["text"].shape == (2, 512, 32) and conditions["image"].shape == (2, 257, 32)
    prediction = adapter.predict(adapter.transformer, latents.to(dtype), torch.tensor([900.0, 12.5]), conditions)
    assert prediction.shape == latents.shape == (2, 16, (frames - 1) // 4 + 1, 4, 4)
    prediction.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.transformer.parameters())
