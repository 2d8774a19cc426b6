"""The Wan-S2V adapter on a tiny model in the released layout and on small encoded clips."""

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vfun_cli.demo.wan_s2v import build_model
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families.wan_s2v import SPEC
from vfun_cli.families.wan_s2v.adapter import (
    BLACK,
    Decisions,
    WanS2VAdapter,
    control_clip,
    decide,
    history_indices,
    plan_motion,
)
from vfun_cli.training.adapter import AdapterOptions, Sample, SampleRequest
from vfun_cli.training.clips import frame_indices
from vfun_cli.training.encoders.wan_vae import noise_shape
from vfun_cli.training.media import write_video, write_wav
from vfun_cli.training.randomness import SampleKey

FRAMES, SIDE, SOURCE_FRAMES = 8, 64, 120
NTSC = Fraction(30000, 1001)
KEEP_ALL = Decisions(
    drop_text=False,
    drop_control=False,
    drop_audio=False,
    drop_history=False,
    silent_from=None,
    reference=0,
    first_frame_as_history=False,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny model"
    build_model(folder)
    return folder


def options_for(model_dir: Path, **changes: Any) -> AdapterOptions:
    plain = AdapterOptions(model_dir=model_dir, compute_dtype=torch.float32, device=torch.device("cpu"))
    return dataclasses.replace(plain, **changes)


@pytest.fixture(scope="module")
def adapter(model_dir: Path) -> WanS2VAdapter:
    return WanS2VAdapter.from_pretrained(options_for(model_dir))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A clip whose brightness tells the frame, a control of another shape that runs backwards, and a chirp."""
    folder = tmp_path_factory.mktemp("media")
    levels = torch.linspace(-0.9, 0.9, SOURCE_FRAMES).view(-1, 1, 1, 1)
    write_video(folder / "clip.mp4", levels.expand(-1, 3, 64, 96), NTSC)
    write_video(folder / "control.mp4", levels.flip(0).expand(-1, 3, 80, 64), NTSC)
    time = np.arange(int(SOURCE_FRAMES / NTSC * 16000)) / 16000
    write_wav(folder / "sound.wav", (0.5 * np.sin(2 * np.pi * (200 + 150 * time) * time)).astype(np.float32), 16000)
    return {
        "file_path": str(folder / "clip.mp4"),
        "control_file_path": str(folder / "control.mp4"),
        "audio_path": str(folder / "sound.wav"),
        "text": "someone speaks",
    }


def request_for(media: dict[str, str], *, row: int = 0, without: str = "", **changes: Any) -> SampleRequest:
    request = SampleRequest(
        key=SampleKey(seed=7, epoch=0, row=row),
        record={key: value for key, value in media.items() if key != without},
        kind="video",
        frames=FRAMES,
        height=SIDE,
        width=SIDE,
        stride=2,
        total_frames=SOURCE_FRAMES,
        fps=(NTSC.numerator, NTSC.denominator),
    )
    return dataclasses.replace(request, **changes)


def load(media: dict[str, str], **changes: Any) -> Sample:
    return WanS2VAdapter.load(request_for(media, **changes), {"control_ref_image": "random"})


def small_sample(seed: int, *, has_motion: bool) -> Sample:
    """A sample of random pixels, 4 frames of 16 x 16, for tests of the VAE's inputs."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    motion = torch.rand(73, 3, 16, 16, generator=generator) * 2 - 1
    return {
        "pixels": pixels,
        "reference": pixels[:1],
        "control": torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1,
        "motion": motion if has_motion else torch.zeros_like(motion),
        "has_motion": has_motion,
        "audio": torch.randn(int(4 * 16000 / 16), generator=generator),
        "clip_fps": Fraction(16),
        "text": "hello",
    }


def key_where(frames: int = 4, **wanted: Any) -> SampleKey:
    """The first row whose decisions are KEEP_ALL but for what is wanted."""
    target = dataclasses.replace(KEEP_ALL, **wanted)
    keys = (SampleKey(seed=3, epoch=0, row=row) for row in range(2000))
    return next(key for key in keys if decide(key, frames=frames, control_ref_image="first_frame") == target)


def direct(adapter: WanS2VAdapter, key: SampleKey, part: str, *clips: Tensor) -> Tensor:
    """Latents [16, f, h, w] of clips one after another, straight from the VAE with this sample's noise."""
    clip = torch.cat(clips)
    noise = key.normal(f"posterior-{part}", noise_shape(clip))
    return adapter.vae.encode(clip.transpose(0, 1)[None], noise[None])[0]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_loaded_clip_is_a_function_of_its_key(media: dict[str, str]) -> None:
    first, again, other = load(media, row=1), load(media, row=1), load(media, row=2)
    for name in ("pixels", "reference", "control", "motion", "audio"):
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["pixels"], other["pixels"])
    assert first["pixels"].shape == first["control"].shape == (FRAMES, 3, SIDE, SIDE)
    assert first["motion"].shape == (73, 3, SIDE, SIDE) and first["reference"].shape == (1, 3, SIDE, SIDE)
    assert {first[name].dtype for name in ("pixels", "control", "motion", "audio")} == {torch.float32}


def source_frame(pixels: Tensor) -> Tensor:
    """Which source frame each frame is, by its brightness."""
    return (pixels.mean(dim=(1, 2, 3)) + 0.9) / 1.8 * (SOURCE_FRAMES - 1)


def test_history_runs_up_to_the_clip_at_its_stride_and_control_shows_the_same_frames(media: dict[str, str]) -> None:
    sample = load(media, row=1)
    shown = source_frame(sample["pixels"])
    assert (shown.diff() - 2).abs().max() < 0.8
    count = frame_indices(request_for(media, row=1))[0] // 2
    assert sample["has_motion"] and 1 < count < 73
    assert sample["motion"][:-count].abs().max() == 0
    age = torch.arange(count, 0, -1)
    assert (source_frame(sample["motion"][-count:]) - (shown[0] - 2 * age)).abs().max() < 1.5
    assert (source_frame(sample["control"]) - (SOURCE_FRAMES - 1 - shown)).abs().max() < 1.5


@pytest.mark.parametrize(
    ("start", "stride", "expected"),
    [(0, 2, []), (1, 2, []), (2, 2, [0]), (7, 2, [1, 3, 5]), (5, 1, [0, 1, 2, 3, 4])],
)
def test_history_is_what_precedes_the_clip(start: int, stride: int, expected: list[int]) -> None:
    # A clip at start 1 with stride 2 has no frame -1; frame 0 is not one stride before it.
    assert history_indices(start, stride) == expected


def test_history_is_at_most_73_frames_and_ends_one_stride_before_the_clip() -> None:
    indices = history_indices(501, 3)
    assert len(indices) == 73 and indices[-1] == 498 and set(np.diff(indices)) == {3}


def test_a_clip_at_the_start_has_grey_history(media: dict[str, str]) -> None:
    whole = load(media, frames=60, total_frames=119)
    assert not whole["has_motion"] and whole["motion"].abs().max() == 0


@pytest.mark.parametrize(("fps", "stride"), [(NTSC, 2), (Fraction(25), 1), (Fraction(24000, 1001), 1)])
def test_sound_is_exactly_as_long_as_the_clip_and_gives_one_feature_a_frame(
    fps: Fraction, stride: int, media: dict[str, str], adapter: WanS2VAdapter
) -> None:
    sample = load(media, fps=(fps.numerator, fps.denominator), stride=stride, frames=40)
    assert sample["clip_fps"] == fps / stride
    assert len(sample["audio"]) == round(40 * stride / fps * 16000)
    features = adapter.speech.encode(sample["audio"], fps=sample["clip_fps"], frames=40)
    assert features.shape == (40, 25, 32)
    assert features[:-1].abs().amax(dim=(1, 2)).min() > 0


def test_sound_behind_the_last_source_frame_is_silence(media: dict[str, str]) -> None:
    sample = load(media, frames=60, total_frames=119)  # the only start is 0; the clip lasts 120 source frames
    there = round(119 / NTSC * 16000)
    assert len(sample["audio"]) == round(120 / NTSC * 16000) > there
    assert sample["audio"][there:].abs().max() == 0 and sample["audio"][there - 400 : there].abs().max() > 0.1


def test_a_row_without_control_trains_with_a_black_one(media: dict[str, str]) -> None:
    sample = load(media, without="control_file_path")
    assert sample["control"] is None
    control = control_clip(sample, KEEP_ALL)
    assert control.shape == sample["pixels"].shape and (control == BLACK).all()


def test_a_cut_tail_blackens_the_control_from_its_frame_on() -> None:
    sample = small_sample(0, has_motion=False)
    control = control_clip(sample, dataclasses.replace(KEEP_ALL, silent_from=3))
    assert torch.equal(control[:3], sample["control"][:3]) and (control[3:] == BLACK).all()
    assert not (sample["control"] == BLACK).all()
    assert (control_clip(sample, dataclasses.replace(KEEP_ALL, drop_control=True)) == BLACK).all()


def test_drops_happen_at_their_rates_and_independently() -> None:
    keys = [SampleKey(seed=1, epoch=epoch, row=row) for epoch in range(2) for row in range(4000)]
    drawn = [decide(key, frames=80, control_ref_image="random") for key in keys]

    def rate(values: list[bool]) -> float:
        return sum(values) / len(values)

    for name in ("drop_text", "drop_control", "drop_audio", "drop_history"):
        assert rate([getattr(d, name) for d in drawn]) == pytest.approx(0.1, abs=0.015), name
    assert rate([d.silent_from is not None for d in drawn]) == pytest.approx(0.1, abs=0.015)
    assert rate([d.drop_text and d.drop_audio for d in drawn]) == pytest.approx(0.01, abs=0.006)
    assert rate([d.reference == 0 for d in drawn]) == pytest.approx(0.4, abs=0.025)
    assert rate([d.first_frame_as_history for d in drawn if d.reference == 0]) == pytest.approx(0.5, abs=0.04)
    assert not any(d.first_frame_as_history for d in drawn if d.reference > 0)
    others = [d.reference for d in drawn if d.reference > 0]
    assert min(others) == 1 and max(others) == 79 and np.mean(others) == pytest.approx(40, abs=2)
    tails = [d.silent_from for d in drawn if d.silent_from is not None]
    assert min(tails) >= 1 and max(tails) <= 79 and np.mean(tails) == pytest.approx(40, abs=4)


def test_first_frame_mode_always_takes_the_first_frame_and_other_words_are_refused() -> None:
    keys = [SampleKey(seed=1, epoch=0, row=row) for row in range(200)]
    assert {decide(key, frames=80, control_ref_image="first_frame").reference for key in keys} == {0}
    with pytest.raises(ConfigError, match="first_frame, random"):
        decide(keys[0], frames=80, control_ref_image="last")


def test_real_history_is_untouched_encoded_with_the_clip_and_seen(adapter: WanS2VAdapter) -> None:
    # Even where the first frame could stand in for a history: it is for clips that have none.
    key = key_where(first_frame_as_history=True)
    sample = small_sample(1, has_motion=True)
    latents, conditions = adapter.encode([sample], [key])
    together = direct(adapter, key, "clip", sample["motion"], sample["pixels"])
    assert latents.shape == (1, 16, 1, 2, 2) and conditions["motion_latents"].shape == (1, 16, 19, 2, 2)
    close(latents[0], together[:, 19:])
    close(conditions["motion_latents"][0], together[:, :19])
    assert conditions["drop_motion"].tolist() == [False]


def test_a_clip_without_history_can_get_its_first_frame_as_the_end_of_one(adapter: WanS2VAdapter) -> None:
    key = key_where(first_frame_as_history=True)
    sample = small_sample(2, has_motion=False)
    latents, conditions = adapter.encode([sample], [key])
    history = (torch.zeros(67, 3, 16, 16), sample["reference"].expand(6, -1, -1, -1))
    together = direct(adapter, key, "clip", *history, sample["pixels"])
    close(latents[0], together[:, 19:])
    close(conditions["motion_latents"][0], together[:, :19])
    assert conditions["drop_motion"].tolist() == [False]
    assert sample["motion"].abs().max() == 0


@pytest.mark.parametrize("has_motion", [False, True])
def test_otherwise_the_clip_follows_its_reference_and_motion_is_dropped(
    has_motion: bool, adapter: WanS2VAdapter
) -> None:
    # With a real history this is the sample whose history the 10 % drop takes away.
    key = key_where(drop_history=has_motion)
    sample = small_sample(3, has_motion=has_motion)
    latents, conditions = adapter.encode([sample], [key])
    close(latents[0], direct(adapter, key, "clip", sample["reference"], sample["pixels"])[:, 1:])
    close(conditions["motion_latents"][0], direct(adapter, key, "history", torch.zeros(73, 3, 16, 16)))
    assert conditions["drop_motion"].tolist() == [True] and conditions["drop_motion"].device.type == "cpu"


def test_control_and_reference_latents_are_those_of_the_vae(adapter: WanS2VAdapter) -> None:
    key, sample = key_where(), small_sample(4, has_motion=True)
    _, conditions = adapter.encode([sample], [key])
    control = sample["control"]
    close(conditions["control_latents"][0], direct(adapter, key, "control", control[:1], control)[:, 1:])
    close(conditions["ref_latents"][0], direct(adapter, key, "reference", sample["reference"]))
    sample["control"] = None
    _, conditions = adapter.encode([sample], [key])
    black = torch.full((5, 3, 16, 16), -1.0)
    close(conditions["control_latents"][0], direct(adapter, key, "control", black)[:, 1:])


def test_text_is_zero_padded_and_sound_is_transposed_dropped_and_cut(adapter: WanS2VAdapter) -> None:
    sample = small_sample(5, has_motion=False)
    _, conditions = adapter.encode([sample], [key_where()])
    [states] = adapter.text.encode(["hello"])
    close(conditions["text_embeds"][0, : len(states)], states)
    assert conditions["text_embeds"].shape == (1, 64, 32)
    assert conditions["text_embeds"][0, len(states) :].abs().max() == 0
    features = adapter.speech.encode(sample["audio"], fps=Fraction(16), frames=4)
    close(conditions["audio"][0], features.permute(1, 2, 0))
    _, cut = adapter.encode([sample], [key_where(silent_from=2)])
    close(cut["audio"][0, ..., :2], conditions["audio"][0, ..., :2])
    assert cut["audio"][0, ..., 2:].abs().max() == 0 and conditions["audio"][0, ..., 2].abs().max() > 0
    _, silent = adapter.encode([sample], [key_where(drop_audio=True)])
    assert silent["audio"].abs().max() == 0


def test_a_dropped_text_is_empty_and_the_reference_is_the_drawn_frame(media: dict[str, str]) -> None:
    texts = {}
    for row in range(30):
        drawn = decide(SampleKey(seed=7, epoch=0, row=row), frames=FRAMES, control_ref_image="random")
        if drawn.drop_text not in texts:
            sample = load(media, row=row)
            texts[drawn.drop_text] = sample["text"]
            assert torch.equal(sample["reference"][0], sample["pixels"][drawn.reference])
    assert texts == {True: "", False: "someone speaks"}


def test_a_batch_of_two_equals_two_batches_of_one(adapter: WanS2VAdapter, model_dir: Path) -> None:
    samples = [small_sample(6, has_motion=True), small_sample(7, has_motion=False)]
    samples[1]["text"] = "another, longer text"
    keys = [key_where(silent_from=1), key_where()]
    batching = WanS2VAdapter(
        transformer=adapter.transformer,
        vae=type(adapter.vae)(adapter.vae.model, mini_batch=2),
        text=adapter.text,
        speech=adapter.speech,
        options=options_for(model_dir, low_vram=True),
    )
    latents, conditions = batching.encode(samples, keys)
    assert latents.dtype == torch.float32 and latents.shape[0] == 2
    assert conditions["drop_motion"].tolist() == [False, True]
    for index, (sample, key) in enumerate(zip(samples, keys, strict=True)):
        alone, alone_conditions = adapter.encode([sample], [key])
        close(latents[index], alone[0])
        assert set(conditions) == set(alone_conditions) and len(conditions) == 6
        for name, value in conditions.items():
            close(value[index].float(), alone_conditions[name][0].float())


def test_the_transformer_reads_what_the_adapter_makes_of_a_real_clip(
    media: dict[str, str], adapter: WanS2VAdapter
) -> None:
    requests = [request_for(media, row=row) for row in (1, 2)]
    samples = [WanS2VAdapter.load(request, {"control_ref_image": "first_frame"}) for request in requests]
    latents, conditions = adapter.encode(samples, [request.key for request in requests])
    assert latents.shape == (2, 16, 2, 8, 8) and conditions["audio"].shape == (2, 25, 32, FRAMES)
    prediction = adapter.predict(adapter.transformer, latents, torch.tensor([500.0, 20.0]), conditions)
    assert prediction.shape == latents.shape and prediction.isfinite().all() and prediction.requires_grad
    assert not latents.requires_grad and not any(c.requires_grad for c in conditions.values())


def test_bfloat16_encoders_keep_latents_and_sound_in_float32(model_dir: Path) -> None:
    adapter = WanS2VAdapter.from_pretrained(options_for(model_dir, compute_dtype=torch.bfloat16))
    latents, conditions = adapter.encode([small_sample(8, has_motion=False)], [key_where()])
    assert latents.dtype == conditions["audio"].dtype == conditions["control_latents"].dtype == torch.float32
    assert {p.dtype for p in adapter.transformer.parameters()} == {torch.float32}
    assert {p.dtype for p in adapter.speech.parameters()} == {torch.float32}
    assert {p.dtype for p in adapter.vae.parameters()} == {torch.bfloat16}


def test_plan_motion_leaves_its_inputs_alone() -> None:
    sample = small_sample(9, has_motion=False)
    before = sample["motion"].clone()
    chosen = dataclasses.replace(KEEP_ALL, first_frame_as_history=True)
    plan_motion(sample["pixels"], sample["motion"], False, sample["reference"], chosen)
    assert torch.equal(sample["motion"], before)


@pytest.mark.parametrize(
    "gone", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl", "wav2vec2-large-xlsr-53-english"]
)
def test_a_missing_part_is_named_before_anything_is_read(gone: str, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "google").mkdir()
    for name in (path.relative_to(model_dir) for path in model_dir.glob("*")):
        if str(name) not in (gone, "google"):
            (tmp_path / name).symlink_to(model_dir / name)
    if gone != "google/umt5-xxl":
        (tmp_path / "google" / "umt5-xxl").symlink_to(model_dir / "google" / "umt5-xxl")
    with pytest.raises(CheckpointError, match=gone) as caught:
        WanS2VAdapter.from_pretrained(options_for(tmp_path))
    assert caught.value.hint and "diffusion_pytorch_model" in caught.value.hint


def test_export_names_are_the_released_names(adapter: WanS2VAdapter) -> None:
    names = [name for name, _ in adapter.transformer.named_parameters()]
    assert "blocks.0.self_attn.q.weight" in names and [SPEC.export_names["same"](name) for name in names] == names
