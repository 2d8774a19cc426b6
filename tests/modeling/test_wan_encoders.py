"""The encoders of the Wan models against reference outputs and against their own files."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fake_cuda import made_up_cuda
from vfun_cli.demo.wan_parts import vae_state
from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.encoders.clip_vision import ClipImageEncoder, load_clip_vision
from vfun_cli.modeling.encoders.placement import encoding_on, freeze
from vfun_cli.modeling.encoders.umt5 import UMT5TextEncoder, load_umt5, pad_text
from vfun_cli.modeling.encoders.wan_vae import WanVAE, load_wan_vae
from vfun_cli.modeling.encoders.wav2vec2 import SpeechEncoder, align_to_frames

GOLDEN = Path(__file__).parents[1] / "golden" / "encoders"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def speech() -> SpeechEncoder:
    return SpeechEncoder.from_folder(GOLDEN / "wan_audio" / "wav2vec2")


@pytest.fixture(scope="module")
def sounds() -> dict[str, Tensor]:
    return load_file(GOLDEN / "wan_audio" / "io.safetensors")


def test_umt5_matches_the_reference_on_every_real_token() -> None:
    state = load_file(GOLDEN / "wan_umt5" / "weights.safetensors")
    io = load_file(GOLDEN / "wan_umt5" / "io.safetensors")
    encoder = UMT5TextEncoder(load_umt5(state, dtype=torch.float32, where="golden"), tokenizer=None)
    lengths = io["attention_mask"].sum(1).tolist()
    rows = encoder.encode_ids([ids[:n] for ids, n in zip(io["input_ids"], lengths, strict=True)])
    assert len(rows) == 2 and encoder.dim == 64
    for row, expected, length in zip(rows, io["output"], lengths, strict=True):
        torch.testing.assert_close(row, expected[:length], atol=1e-4, rtol=0)


def test_umt5_stores_its_shared_embedding_once() -> None:
    model = load_umt5(load_file(GOLDEN / "wan_umt5" / "weights.safetensors"), dtype=torch.bfloat16, where="golden")
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


@pytest.mark.parametrize(
    ("lost", "added", "named"),
    [
        ("blocks.1.ffn.fc1.weight", None, "wi_1"),
        ("token_embedding.weight", None, "token_embedding"),
        (None, "blocks.0.x.weight", "x"),
    ],
)
def test_umt5_refuses_tensors_that_do_not_fit(lost: str | None, added: str | None, named: str) -> None:
    state = load_file(GOLDEN / "wan_umt5" / "weights.safetensors")
    if lost:
        del state[lost]
    if added:
        state[added] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=named):
        load_umt5(state, dtype=torch.float32, where="golden")


def test_padding_a_text_adds_zero_rows_and_refuses_too_long_ones() -> None:
    padded = pad_text([torch.ones(2, 3), torch.ones(4, 3)], 4)
    assert padded.shape == (2, 4, 3)
    assert padded.sum(dim=(1, 2)).tolist() == [6, 12] and padded[0, 2:].abs().max() == 0
    with pytest.raises(ValueError, match="5 tokens"):
        pad_text([torch.ones(5, 3)], 4)


def test_a_model_folder_without_text_encoder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"models_t5_umt5-xxl-enc-bf16\.pth"):
        UMT5TextEncoder.from_files(tmp_path, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth"):
        WanVAE.from_file(tmp_path / "Wan2.1_VAE.pth", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="Wav2Vec2ForCTC"):
        SpeechEncoder.from_folder(tmp_path / "wav2vec2")


@pytest.mark.parametrize("case", "abcd")
def test_speech_features_match_the_reference_at_30_hz_and_per_frame(
    case: str, speech: SpeechEncoder, sounds: dict[str, Tensor]
) -> None:
    features = speech.features_30hz(sounds[f"{case}.wav"])
    torch.testing.assert_close(features, sounds[f"{case}.features_30hz"], atol=1e-4, rtol=0)
    fps, frames = sounds[f"{case}.fps_n"].tolist()
    per_frame = speech.encode(sounds[f"{case}.wav"], fps=Fraction(fps), frames=frames)
    torch.testing.assert_close(per_frame, sounds[f"{case}.per_frame"], atol=1e-4, rtol=0)


def test_the_last_speech_layer_is_the_normalised_one(speech: SpeechEncoder, sounds: dict[str, Tensor]) -> None:
    last = speech.hidden_states(sounds["d.wav"])[-1]
    norm = speech.model.wav2vec2.encoder.layer_norm
    undone = (last - norm.bias) / norm.weight
    torch.testing.assert_close(undone.mean(-1), torch.zeros(len(last)), atol=1e-4, rtol=0)
    torch.testing.assert_close(undone.var(-1, unbiased=False), torch.ones(len(last)), atol=1e-2, rtol=0)


@pytest.mark.parametrize("fps", [Fraction(30000, 1001) / 2, Fraction(25), Fraction(25, 2), Fraction(24000, 1001) / 2])
def test_every_frame_takes_the_sound_of_its_own_time(fps: Fraction) -> None:
    frames = 80
    length = math.floor(frames / fps * 30)
    ramp = torch.arange(length, dtype=torch.float32).view(1, length, 1)
    shared = align_to_frames(ramp, fps=fps, frames=frames).flatten()
    exact = torch.tensor([float(30 * k / fps) for k in range(frames)], dtype=torch.float64)
    assert len(shared) == frames
    assert (shared.double() - exact).abs().max() <= 0.5 + 1e-9


def test_sound_longer_than_its_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="do not belong"):
        align_to_frames(torch.zeros(25, 200, 4), fps=Fraction(16), frames=80)


def test_a_speech_folder_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    source = GOLDEN / "wan_audio" / "wav2vec2"
    for file in source.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["wav2vec2.encoder.layers.3.attention.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="k_proj"):
        SpeechEncoder.from_folder(tmp_path)


def test_clip_image_encoder_matches_the_reference() -> None:
    folder = GOLDEN / "wan_clip_visual"
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "weights.safetensors")
    io = load_file(folder / "io.safetensors")
    model = load_clip_vision(state, dtype=torch.float32, where="golden", heads=config["num_heads"])
    encoder = ClipImageEncoder(model)
    assert (encoder.tokens, encoder.dim) == (17, 64)
    torch.testing.assert_close(encoder.encode_pixel_values(io["pixel_values"]), io["output"], atol=1e-4, rtol=0)


def test_clip_reads_the_visual_tower_of_the_whole_file_and_is_strict_about_it(tmp_path: Path) -> None:
    state = load_file(GOLDEN / "wan_clip_visual" / "weights.safetensors")
    path = tmp_path / "clip.pth"
    whole = {f"visual.{name}": tensor for name, tensor in state.items()}
    torch.save(whole | {"log_scale": torch.zeros(()), "textual.a": torch.zeros(1)}, path)
    encoder = ClipImageEncoder.from_file(path, dtype=torch.float32, heads=4)
    assert encoder.encode(torch.zeros(1, 3, 40, 60)).shape == (1, 17, 64)
    clips = [torch.full((1, 3, 40, 60), 0.5), torch.zeros(1, 3, 32, 32)]
    for clip, output in zip(clips, encoder.outputs(clips), strict=True):
        assert output.keys() == {"states"} and torch.equal(output["states"], encoder.encode(clip)[0])
    del whole["visual.transformer.2.mlp.0.bias"]
    torch.save(whole, path)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.fc1\.bias"):
        ClipImageEncoder.from_file(path, dtype=torch.float32, heads=4)


def test_clip_pictures_are_truncated_to_8_bits_and_squashed_to_a_square() -> None:
    state = load_file(GOLDEN / "wan_clip_visual" / "weights.safetensors")
    encoder = ClipImageEncoder(load_clip_vision(state, dtype=torch.float32, where="golden", heads=4))
    level = 100.9 / 255 * 2 - 1
    picture = encoder.preprocess(torch.full((1, 3, 30, 90), level))
    assert picture.shape == (1, 3, 56, 56)
    expected = (100 / 255 - encoder.mean) / encoder.std
    torch.testing.assert_close(picture.mean(dim=(2, 3), keepdim=True), expected, atol=1e-5, rtol=0)


def test_clip_pictures_shrink_by_bicubic_interpolation_without_antialiasing() -> None:
    state = load_file(GOLDEN / "wan_clip_visual" / "weights.safetensors")
    encoder = ClipImageEncoder(load_clip_vision(state, dtype=torch.float32, where="golden", heads=4))
    levels = torch.randint(0, 256, (1, 3, 130, 170), generator=torch.Generator().manual_seed(0)) / 255
    shrunk = torch.nn.functional.interpolate(levels * 2 - 1, (56, 56), mode="bicubic", align_corners=False)
    expected = (shrunk * 0.5 + 0.5 - encoder.mean) / encoder.std
    torch.testing.assert_close(encoder.preprocess(levels * 2 - 1 + 1e-4), expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return WanVAE(load_wan_vae(vae_state(), dtype=torch.float32, where="test"), mini_batch=1)


def test_vae_sizes_come_from_the_tensors_and_the_statistics_from_diffusers() -> None:
    model = load_wan_vae(vae_state(base_dim=8), dtype=torch.float32, where="test")
    assert model.config.base_dim == 8 and model.config.dim_mult == [1, 2, 4, 4]
    assert model.config.temperal_downsample == [False, True, True]
    assert model.config.latents_mean == AutoencoderKLWan(base_dim=4).config.latents_mean


def test_vae_noise_is_added_after_normalising(vae: WanVAE) -> None:
    pixels = torch.rand(2, 3, 5, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = torch.randn(2, 16, 2, 2, 3, generator=torch.Generator().manual_seed(2))
    posterior = vae.model.encode(pixels).latent_dist
    mean = torch.tensor(vae.model.config.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(vae.model.config.latents_std).view(1, 16, 1, 1, 1)
    mode = (posterior.mean - mean) / std
    torch.testing.assert_close(vae.encode(pixels), mode, atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.encode(pixels, noise), mode + posterior.std * noise, atol=1e-5, rtol=0)


def test_vae_mini_batches_change_nothing(vae: WanVAE) -> None:
    pixels = torch.rand(3, 3, 5, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    together = WanVAE(vae.model, mini_batch=3).encode(pixels)
    torch.testing.assert_close(vae.encode(pixels), together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [2, 4, 8, 80])
def test_vae_refuses_frames_that_it_would_drop(frames: int, vae: WanVAE) -> None:
    with pytest.raises(ValueError, match=f"1 \\+ 4k frames, got {frames}"):
        vae.encode(torch.zeros(1, 3, frames, 8, 8))


def test_vae_refuses_an_incomplete_file() -> None:
    state = vae_state()
    del state["encoder.downsamples.4.residual.6.weight"]
    with pytest.raises(CheckpointError, match=r"down_blocks\.4\.conv2\.weight"):
        load_wan_vae(state, dtype=torch.float32, where="test")


def test_encoders_run_without_autocast_and_without_gradients() -> None:
    layer = torch.nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), encoding_on(layer, CPU, low_vram=True):
        output = layer(torch.ones(1, 2))
    assert output.dtype == torch.float32 and not output.requires_grad


class _TiedWords(torch.nn.Module):
    """Words whose table is also the output layer, as T5 has it, and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(5, 4)
        self.output = torch.nn.Linear(4, 5, bias=False)
        self.output.weight = self.words.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)


def tensors_of(encoder: torch.nn.Module) -> dict[str, Tensor]:
    return dict([*encoder.named_parameters(), *encoder.named_buffers()])


def test_with_low_vram_weights_stay_in_pinned_memory_of_the_host_and_copies_of_them_work() -> None:
    """The made-up device refuses whatever comes back, and copies from memory that is not pinned."""
    encoder = freeze(_TiedWords())
    before, pinned = tensors_of(encoder), []
    with made_up_cuda() as device:
        words = torch.zeros(2, dtype=torch.long, device=device)
        for _ in range(2):
            with pytest.raises(InterruptedError), encoding_on(encoder, device, low_vram=True):
                assert {each.device for each in tensors_of(encoder).values()} == {device}
                assert encoder.words.weight is encoder.output.weight, "tied weights are copied once"
                made = encoder.output(encoder.words(words)) * encoder.scale
                assert made.device == device and not made.requires_grad
                raise InterruptedError
            after = tensors_of(encoder)
            assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
            assert all(each.is_pinned() for each in after.values())
            pinned.append([each.data_ptr() for each in after.values()])
    assert pinned[0] == pinned[1], "pinned once"
    assert encoder.words.weight is encoder.output.weight and "scale" not in encoder.state_dict()
