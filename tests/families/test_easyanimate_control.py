"""EasyAnimate Control from tiny released directories: options, encoders, conditioning, prediction."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, Qwen2VLForConditionalGeneration, T5EncoderModel

from vfun_cli.config.options import RunConfig, parse
from vfun_cli.demo.easyanimate_control import build_v5, build_v5_1
from vfun_cli.encoding.encode import encode, load, prepared
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families import detect
from vfun_cli.families.easyanimate_control import V5, V5_1, complete_config
from vfun_cli.families.easyanimate_control.adapter import EasyAnimateControl, EasyAnimateV5, EasyAnimateV51
from vfun_cli.families.easyanimate_control.names import released_name
from vfun_cli.families.easyanimate_control.transformer import build_transformer
from vfun_cli.families.spec import ClipShape
from vfun_cli.modeling.adapter import AdapterOptions, Conditions, SampleRequest
from vfun_cli.modeling.clips import frame_indices
from vfun_cli.modeling.encoders.magvit_vae import MagvitVAE, latent_channels
from vfun_cli.modeling.inputs import Decoded, Value
from vfun_cli.modeling.media.writing import write_png, write_video
from vfun_cli.modeling.pixels import readable
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.weights import read_json
from vfun_cli.training.objectives import make_objective

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = {V5_1.name: (EasyAnimateV51, build_v5_1), V5.name: (EasyAnimateV5, build_v5)}
CPU = torch.device("cpu")
PLAIN = AdapterOptions(model_dir=Path(), compute_dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (_, build) in FAMILIES.items():
        made[name] = tmp_path_factory.mktemp("easyanimate") / name
        build(made[name])
    return made


@pytest.fixture(scope="module")
def adapters(folders: dict[str, Path]) -> dict[str, EasyAnimateControl]:
    return {name: adapter.from_pretrained(options(folders[name])) for name, (adapter, _) in FAMILIES.items()}


def options(folder: Path, **changes: Any) -> AdapterOptions:
    return AdapterOptions(**{"model_dir": folder, "compute_dtype": torch.float32, "device": CPU, **changes})


def clip(frames: int = 5, height: int = 32, width: int = 48, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    pixels, control = (torch.rand(frames, 3, height, width, generator=generator) * 2 - 1 for _ in range(2))
    return {"text": "a red ball", "pixels": pixels, "control": control}


def encoded(
    adapter: EasyAnimateControl, samples: list[dict[str, Any]], keys: list[SampleKey]
) -> tuple[torch.Tensor, Conditions]:
    """The samples as their keys decide."""
    mode = adapter.train_mode(adapter.options.train_mode)
    made = []
    for sample, key in zip(samples, keys, strict=True):
        caption = "" if key.chance("text-drop", 0.1) else sample["text"]
        made.append(adapter.compose(Decoded(sample["pixels"]), Decoded(sample["control"]), caption, train_mode=mode))
    return encode(adapter, [prepared(inputs) for inputs in made], keys)


def key_where(**drops: bool) -> SampleKey:
    """A key whose draws are as asked: ``control=True`` drops the control latents."""
    probabilities = {"control": 0.2, "reference": 0.2, "text": 0.1}
    for row in range(1000):
        key = SampleKey(0, 0, row)
        if all(key.chance(f"{what}-drop", probabilities[what]) == drops.get(what, False) for what in probabilities):
            return key
    raise AssertionError(drops)


# --- options ---


@pytest.mark.parametrize("spec", [V5_1, V5], ids=lambda spec: spec.name)
def test_every_default_is_an_option_with_a_valid_value(spec) -> None:
    values = {**spec.defaults.train, **spec.defaults.demo, **spec.defaults.lora}
    assert len(values) > 30
    for name, value in values.items():
        parse(name, value, spec.name)
    spec.check_options(RunConfig())


@pytest.mark.parametrize(
    ("spec", "given", "message", "hint"),
    [
        (V5_1, {"loss_type": "sigma"}, "V1 to V3", "--loss-type flow"),
        (V5, {"loss_type": "sigma"}, "V1 to V3", "--loss-type ddpm"),
        (V5, {"loss_type": "flow"}, "belongs to easyanimate-v5.1-control", "--loss-type ddpm"),
        (V5_1, {"loss_type": "ddpm"}, "belongs to easyanimate-v5-control", "--loss-type flow"),
        (V5_1, {"loss_type": "huber"}, "no such loss", "--loss-type flow"),
        (V5_1, {"train_mode": "control_camera_ref"}, "pose files", "control_ref, control"),
        (V5_1, {"train_mode": "normal"}, "'normal' is not supported", "control_ref, control"),
        (
            V5,
            {"train_mode": "control_ref"},
            "'control_ref' is not supported by easyanimate-v5-control",
            "one of: control",
        ),
        (V5_1, {"control_ref_image": "random"}, "latent frame 0", "first_frame"),
    ],
)
def test_values_that_cannot_train_the_family_are_refused_with_the_others(spec, given, message, hint) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        spec.check_options(RunConfig(**given))
    assert hint in caught.value.hint


def test_adapter_refuses_a_train_mode_that_the_model_has_no_channels_for(folders) -> None:
    with pytest.raises(ConfigError, match=r"48 channels .noisy, control, reference.*reads 32") as caught:
        EasyAnimateV5.from_pretrained(options(folders[V5.name], train_mode="control_ref"))
    assert caught.value.hint == "Use --train-mode control."


def test_a_directory_of_the_other_version_is_recognised(folders) -> None:
    with pytest.raises(ConfigError, match="looks like easyanimate-v5-control") as caught:
        EasyAnimateV51.from_pretrained(options(folders[V5.name]))
    assert "Train easyanimate-v5-control" in caught.value.hint
    with pytest.raises(ConfigError, match=r"looks like easyanimate-v5\.1-control"):
        EasyAnimateV5.from_pretrained(options(folders[V5_1.name]))


def test_a_folder_without_a_transformer_names_the_file_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformer/config\.json"):
        EasyAnimateV51.from_pretrained(options(tmp_path))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_missing_encoder_folder_is_named(part: str, folders, tmp_path: Path) -> None:
    shutil.copytree(folders[V5.name], tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(CheckpointError, match=f"{part}:"):
        EasyAnimateV5.from_pretrained(options(tmp_path / "model"))


def test_a_vae_without_weights_is_named_before_the_transformer_is_read(folders, tmp_path: Path) -> None:
    shutil.copytree(folders[V5.name], tmp_path / "model")
    for part in ("vae", "transformer"):
        (tmp_path / "model" / part / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights in .*vae"):
        EasyAnimateV5.from_pretrained(options(tmp_path / "model"))


def test_an_encoder_folder_without_its_model_is_named_when_encoders_load(folders, tmp_path: Path) -> None:
    shutil.copytree(folders[V5.name], tmp_path / "model")
    (tmp_path / "model/text_encoder_2/config.json").unlink()
    adapter = EasyAnimateV5.from_pretrained(options(tmp_path / "model"))
    assert not adapter.encoders.loaded
    with pytest.raises(CheckpointError, match=r"text_encoder_2: config\.json"):
        adapter.encoders.load()


# --- encoders ---


def golden_vae(tmp_path: Path, **changes: object) -> MagvitVAE:
    """Of both versions: the original's files and outputs are the same to the byte."""
    source = GOLDEN / "easyanimate_v5.1_control/vae"
    config = json.loads((source / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to((source / "weights.safetensors").resolve())
    return MagvitVAE.from_folder(tmp_path, dtype=torch.float32)


def test_vae_encodes_as_the_original(tmp_path: Path) -> None:
    vae = golden_vae(tmp_path)
    tensors = load_file(GOLDEN / "easyanimate_v5.1_control/vae/io.safetensors")
    for case in ("f1", "f5", "f9", "f13"):
        pixels, mean, logvar = (tensors[f"{case}.{name}"] for name in ("x", "mean", "logvar"))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        assert mean.shape[1] == latent_channels(tmp_path)
        torch.testing.assert_close(vae.encode(pixels), mean * 0.7125, atol=1e-5, rtol=0)
        sampled = (mean + torch.exp(0.5 * logvar) * noise) * 0.7125
        torch.testing.assert_close(vae.encode(pixels, noise), sampled, atol=1e-5, rtol=0)


def test_vae_mini_batches_change_nothing_and_odd_lengths_are_refused(tmp_path: Path) -> None:
    vae = golden_vae(tmp_path)
    pixels = torch.rand(3, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one = vae.encode(pixels)
    assert len(one) == 3
    vae.mini_batch = 2
    torch.testing.assert_close(vae.encode(pixels), one, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="1 \\+ 4k frames, got 4"):
        vae.encode(pixels[:, :, :4])


@pytest.mark.parametrize(
    "setting", [{"mid_block_use_attention": True}, {"cache_mag_vae": False}, {"mini_batch_encoder": 8}]
)
def test_vae_settings_that_encode_differently_are_refused(setting: dict, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        golden_vae(tmp_path, **setting)


def test_qwen_states_are_the_last_but_one_of_the_whole_model(adapters, folders) -> None:
    encoder = adapters[V5_1.name].encoders["encoder_hidden_states"]
    captions = ["a red ball", "", "a very long caption " * 40]
    ids, mask = encoder.tokenize(captions)
    assert ids.shape == mask.shape == (3, 256)
    whole = Qwen2VLForConditionalGeneration.from_pretrained(folders[V5_1.name] / "text_encoder", dtype=torch.float32)
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encoder.encode(captions), expected)
    assert not torch.equal(expected, whole.model(input_ids=ids, attention_mask=mask).last_hidden_state)


def test_qwen_captions_are_chats_padded_right_and_cut_at_the_end(adapters) -> None:
    encoder = adapters[V5_1.name].encoders["encoder_hidden_states"]
    ids, mask = encoder.tokenize(["a red ball", "x" * 1000])
    text = encoder.tokenizer.decode(ids[0][mask[0].bool()])
    assert text.endswith("<|im_start|>user\na red ball<|im_end|>\n<|im_start|>assistant\n")
    assert mask[0].diff().max() == 0  # ones, then zeros
    assert mask[1].all()
    assert encoder.tokenizer.decode(ids[1]).endswith("xxx")


def test_bert_and_t5_get_special_tokens_and_no_mask(adapters, folders) -> None:
    bert, t5 = (adapters[V5.name].encoders[name] for name in ("encoder_hidden_states", "encoder_hidden_states_t5"))
    for encoder, kind, folder in ((bert, BertModel, "text_encoder"), (t5, T5EncoderModel, "text_encoder_2")):
        ids = encoder.tokenize(["a red ball"])
        assert ids.shape == (1, 256)
        whole = kind.from_pretrained(folders[V5.name] / folder, dtype=torch.float32)
        with torch.no_grad():
            bare = whole(input_ids=ids).last_hidden_state
            masked = whole(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        assert torch.equal(encoder.encode(["a red ball"]), bare)
        assert not torch.allclose(bare, masked)
    words = bert.tokenizer.convert_ids_to_tokens(bert.tokenize(["a red ball"])[0])
    assert words[:2] == ["[CLS]", "a"] and words[words.index("[PAD]") - 1] == "[SEP]"
    words = t5.tokenizer.convert_ids_to_tokens(t5.tokenize(["a red ball"])[0])
    assert words[words.index("<pad>") - 1] == "</s>"


def test_a_tokenizer_of_v5_that_takes_fewer_tokens_shortens_its_stream_and_the_plan(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[V5.name], tmp_path / "model")
    path = folder / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    adapter = EasyAnimateV5.from_pretrained(options(folder))
    _, conditions = encoded(adapter, [clip()], [key_where()])
    assert conditions["encoder_hidden_states"].shape[1] == 77
    assert conditions["encoder_hidden_states_t5"].shape[1] == 256
    shape = ClipShape(frames=5, height=64, width=96)
    dims = {name: detect.read_dims(V5, where) for name, where in (("77", folder), ("256", folders[V5.name]))}
    assert {name: V5.model.sequence_tokens(shape, found) for name, found in dims.items()} == {
        "77": 77 + 256 + V5.plan.video_tokens(shape),
        "256": 512 + V5.plan.video_tokens(shape),
    }
    assert V5.model.forward_flops(shape, dims["77"]) < V5.model.forward_flops(shape, dims["256"])
    path.write_text('{"model_max_length": ')
    for read in (lambda: detect.read_dims(V5, folder), lambda: EasyAnimateV5.from_pretrained(options(folder))):
        with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer_config\.json") as caught:
            read()
        assert "again" in caught.value.hint


# --- conditioning ---


def test_v5_1_conditions_are_control_then_the_first_frame_at_latent_frame_0(adapters) -> None:
    adapter, sample, key = adapters[V5_1.name], clip(frames=9), key_where()
    latents, conditions = encoded(adapter, [sample], [key])
    control = conditions["control_latents"]
    assert latents.shape == (1, 16, 3, 4, 6)
    assert control.shape == (1, 32, 3, 4, 6)

    def direct(pixels: torch.Tensor, purpose: str) -> torch.Tensor:
        vae, video = adapter.encoders["vae"], pixels.transpose(0, 1)[None]
        return vae.encode(video, key.normal(purpose, tuple(vae.encode(video).shape[1:]))[None])

    assert torch.equal(latents, direct(sample["pixels"], "vae-clip"))
    assert torch.equal(control[:, :16], direct(sample["control"], "vae-control"))
    assert torch.equal(control[:, 16:, :1], direct(sample["pixels"][:1], "vae-reference"))
    assert not control[:, 16:, 1:].any()


@pytest.mark.parametrize("what", ["control", "reference", "text"])
def test_each_condition_is_dropped_alone(what: str, adapters) -> None:
    adapter, sample = adapters[V5_1.name], clip()
    _, conditions = encoded(adapter, [sample], [key_where(**{what: True})])
    control, reference = conditions["control_latents"].chunk(2, dim=1)
    assert control.any() == (what != "control")
    assert reference.any() == (what != "reference")
    caption = "" if what == "text" else sample["text"]
    expected = adapter.encoders["encoder_hidden_states"].encode([caption])
    assert torch.equal(conditions["encoder_hidden_states"], expected)


def test_one_caption_in_ten_is_left_out_of_every_text_encoder(media: Path) -> None:
    requests = [request(media, "image", row=row) for row in range(300)]
    texts = []
    for asked in requests:
        inputs = EasyAnimateV5.inputs(asked, PLAIN)
        assert inputs["encoder_hidden_states"].lazy == inputs["encoder_hidden_states_t5"].lazy
        texts.append(inputs["encoder_hidden_states"].lazy)
    assert set(texts) == {Value(""), Value("a red ball")}
    assert [asked.key.chance("text-drop", 0.1) for asked in requests] == [text == Value("") for text in texts]


def test_with_variants_starts_repeat_and_the_reference_is_there_before_its_drop(media: Path) -> None:
    keys = [SampleKey(42, 0, 3), *(SampleKey(42, epoch, 3, variants=2) for epoch in range(40))]
    made = [EasyAnimateV51.inputs(request(media, "video", key=key), PLAIN) for key in keys]
    assert len({inputs["clip"].lazy for inputs in made[1:]}) == 2 == len({inputs["reference"] for inputs in made[1:]})
    assert made[0]["clip"] == made[1]["clip"]
    assert {inputs["encoder_hidden_states"].lazy for inputs in made} == {Value(""), Value("a red ball")}
    assert "reference" not in EasyAnimateV51.inputs(request(media, "video"), replace(PLAIN, train_mode="control"))


def test_drops_happen_as_often_as_specified() -> None:
    keys = [SampleKey(0, 0, row) for row in range(4000)]
    for purpose, probability in (("control-drop", 0.2), ("reference-drop", 0.2), ("text-drop", 0.1)):
        share = sum(key.chance(purpose, probability) for key in keys) / len(keys)
        assert share == pytest.approx(probability, abs=0.02)


@pytest.mark.parametrize("dropped", [False, True])
def test_an_image_is_its_own_reference_and_loses_it_as_a_video_does(dropped: bool, adapters, media: Path) -> None:
    key = key_where(reference=dropped)
    latents, conditions = encoded(adapters[V5_1.name], [clip(frames=1)], [key])
    reference = conditions["control_latents"][:, 16:]
    assert latents.shape[2] == 1
    assert reference.any() == (not dropped)
    inputs = EasyAnimateV51.inputs(request(media, "image"), PLAIN)
    assert inputs["reference"].lazy == inputs["clip"].lazy


def test_v5_1_in_mode_control_reads_noisy_and_control_latents_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[V5_1.name], tmp_path / "model")
    config = {**read_json(folder / "transformer/config.json"), "in_channels": 32}
    narrow = build_transformer(complete_config(config))
    (folder / "transformer/config.json").write_text(json.dumps(config))
    state = {released_name(name): value.contiguous() for name, value in narrow.state_dict().items()}
    save_file(state, folder / "transformer/diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match="48 channels"):
        EasyAnimateV51.from_pretrained(options(folder))
    adapter = EasyAnimateV51.from_pretrained(options(folder, train_mode="control"))
    latents, conditions = encoded(adapter, [clip()], [key_where()])
    assert conditions["control_latents"].shape == latents.shape == (1, 16, 2, 4, 6)
    assert adapter.predict(adapter.transformer, latents, torch.tensor([500.0]), conditions).shape == latents.shape


def test_v5_has_control_alone_and_two_text_streams(adapters) -> None:
    _, conditions = encoded(adapters[V5.name], [clip(), clip(seed=1)], [key_where(), key_where(control=True)])
    assert conditions["control_latents"].shape == (2, 16, 2, 4, 6)
    assert conditions["control_latents"][0].any()
    assert not conditions["control_latents"][1].any()
    assert conditions["encoder_hidden_states"].shape == (2, 256, 16)
    assert conditions["encoder_hidden_states_t5"].shape == (2, 256, 24)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_is_encoded_alike_alone_and_in_company(name: str, adapters) -> None:
    adapter, samples, keys = adapters[name], [clip(seed=1), clip(seed=2)], [key_where(), key_where(text=True)]
    latents, conditions = encoded(adapter, samples, keys)
    alone, own = encoded(adapter, samples[1:], keys[1:])
    torch.testing.assert_close(latents[1:], alone, atol=1e-5, rtol=0)
    for condition, value in conditions.items():
        torch.testing.assert_close(value[1:], own[condition], atol=1e-5, rtol=0)
    assert not latents.requires_grad


def test_low_vram_changes_no_number(adapters, folders) -> None:
    low = EasyAnimateV51.from_pretrained(options(folders[V5_1.name], low_vram=True))
    sample, key = clip(), key_where()
    latents, conditions = encoded(low, [sample], [key])
    same, others = encoded(adapters[V5_1.name], [sample], [key])
    assert torch.equal(latents, same)
    assert all(torch.equal(conditions[name], others[name]) for name in others)


# --- media to prediction ---


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames of which frame i is grey of brightness i, a control clip of the inverse, and a picture pair."""
    folder = tmp_path_factory.mktemp("media")
    ramp = torch.linspace(-0.9, 0.9, 20)[:, None, None, None].expand(20, 3, 64, 96)
    write_video(folder / "clip.mp4", ramp, Fraction(16))
    write_video(folder / "control.mp4", -ramp, Fraction(16))
    write_png(folder / "image.png", clip(1, 64, 96)["pixels"])
    write_png(folder / "control.png", clip(1, 64, 96)["control"])
    return folder


def request(folder: Path, kind: str, row: int = 3, **changes: Any) -> SampleRequest:
    names = ("clip.mp4", "control.mp4") if kind == "video" else ("image.png", "control.png")
    record = {"file_path": str(folder / names[0]), "control_file_path": str(folder / names[1]), "text": "a red ball"}
    video = kind == "video"
    given: dict[str, Any] = {"frames": 9 if video else 1, "total_frames": 20 if video else 1, "stride": 1}
    given |= {"key": SampleKey(42, 0, row), **changes}
    return SampleRequest(record=record, kind=kind, height=32, width=48, fps=(16, 1), **given)


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("name", FAMILIES)
def test_media_become_a_prediction_with_gradients(name: str, kind: str, adapters, folders, media: Path) -> None:
    adapter = adapters[name]
    asked = request(media, kind)
    sample = load(type(adapter), asked, PLAIN)
    pixels, control = (readable(sample.values[name]) for name in ("clip", "control"))
    assert pixels.shape == control.shape == (asked.frames, 3, 32, 48)
    if kind == "video":
        torch.testing.assert_close(pixels, -control, atol=0.05, rtol=0)
        assert (pixels.mean(dim=(1, 2, 3)).diff() > 0).all()

    latents, conditions = encode(adapter, [sample], [asked.key])
    objective = make_objective(adapter.spec.model.objective, adapter.spec.model.objective_options, folders[name])
    corrupted = objective.corrupt(latents, [asked.key])
    prediction = adapter.predict(adapter.transformer, corrupted.noisy, corrupted.timesteps, conditions)
    assert prediction.shape == latents.shape
    adapter.transformer.zero_grad()
    objective.loss(prediction, corrupted.target, None).backward()
    assert adapter.transformer.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_encoders_and_inputs_run_without_autocast(name: str, folders) -> None:
    adapter = FAMILIES[name][0].from_pretrained(options(folders[name], compute_dtype=torch.bfloat16))
    latents, conditions = encoded(adapter, [clip()], [key_where()])
    assert latents.dtype == torch.float32
    assert conditions["encoder_hidden_states"].dtype == torch.bfloat16
    assert next(adapter.transformer.parameters()).dtype == torch.float32
    half = adapter.transformer.to(torch.bfloat16)
    prediction = adapter.predict(half, latents.to(torch.bfloat16), torch.tensor([500.0]), conditions)
    assert prediction.dtype == torch.bfloat16


def test_clips_come_from_the_middle_of_the_video(media: Path) -> None:
    starts = {
        frame_indices(request(media, "video", row=row, frames=5, total_frames=200), V5_1.plan.usable_span)[0]
        for row in range(2000)
    }
    assert (min(starts), max(starts)) == (18, 180 - 5)


def test_v5_learns_the_velocity_of_its_directorys_schedule(folders) -> None:
    objective = make_objective(V5.model.objective, V5.model.objective_options, folders[V5.name])
    assert objective.prediction_type == "v_prediction"
    assert objective.alphas_cumprod.shape == (1000,)
    assert objective.alphas_cumprod[-1].item() == pytest.approx(0, abs=1e-7)  # zero terminal SNR


@pytest.mark.parametrize("name", FAMILIES)
def test_exported_names_are_those_of_the_released_file(name: str, adapters, folders) -> None:
    adapter = adapters[name]
    stored = set(load_file(folders[name] / "transformer/diffusion_pytorch_model.safetensors"))
    assert {V5.export.names["same"](parameter) for parameter, _ in adapter.transformer.named_parameters()} == stored
    assert any("attn2.to_q" in parameter for parameter in stored)
    assert released_name("proj_out.weight") == "proj_out.weight"
