"""The Wan-S2V adapter on a tiny model in the released layout and on small encoded clips."""

import dataclasses
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.click_sounds import KINDS, write_kind
from vfun_cli.config.datasets import parse_data_sets
from vfun_cli.config.options import RunConfig
from vfun_cli.demo.wan_s2v import build_model
from vfun_cli.encoding.encode import encode, prepared
from vfun_cli.errors import CheckpointError
from vfun_cli.families.wan_s2v import SPEC
from vfun_cli.families.wan_s2v.adapter import (
    BLACK,
    Decisions,
    TalkingClip,
    WanS2VAdapter,
    compose,
    control_clip,
    decide,
    history_indices,
    talking_clip,
)
from vfun_cli.modeling.adapter import AdapterOptions, Conditions, SampleRequest
from vfun_cli.modeling.clips import frame_indices
from vfun_cli.modeling.inputs import Decoded, Value, describe, load_inputs
from vfun_cli.modeling.media.sound import read_audio
from vfun_cli.modeling.media.writing import write_video, write_wav
from vfun_cli.modeling.pixels import readable
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.training.data.stream import row_reader

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


PLAIN = AdapterOptions(model_dir=Path(), compute_dtype=torch.float32, device=torch.device("cpu"))
RANDOM = dataclasses.replace(PLAIN, control_ref_image="random")


def options_for(model_dir: Path, **changes: Any) -> AdapterOptions:
    return dataclasses.replace(PLAIN, model_dir=model_dir, **changes)


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


def load(media: dict[str, str], **changes: Any) -> dict[str, Any]:
    """What belongs to a clip, decoded, before any decision about it."""
    source = talking_clip(request_for(media, **changes))
    clips = {name: getattr(source, name) for name in ("pixels", "history", "control", "audio")}
    decoded = load_inputs({name: lazy for name, lazy in clips.items() if lazy is not None})
    return {"history": None, "control": None, **_readable(decoded), "fps": source.fps}


def read(media: dict[str, str], row: int) -> dict[str, Any]:
    """What the encoders read."""
    inputs = WanS2VAdapter.inputs(request_for(media, row=row), RANDOM)
    return _readable(prepared(inputs).values)


def _readable(values: dict[str, Any]) -> dict[str, Any]:
    return {name: readable(value) for name, value in values.items()}


def small_source(seed: int, *, history: int, text: str = "hello") -> TalkingClip:
    """Random pixels, 4 frames of 16 x 16, for tests of the VAE's inputs."""
    generator = torch.Generator().manual_seed(seed)
    pixels, past, control = (torch.rand(frames, 3, 16, 16, generator=generator) * 2 - 1 for frames in (4, history, 4))
    return TalkingClip(
        pixels=Decoded(pixels),
        history=Decoded(past) if history else None,
        control=Decoded(control),
        audio=Decoded(torch.randn(int(4 * 16000 / 16), generator=generator)),
        fps=Fraction(16),
        text=text,
        frames=4,
        size=(16, 16),
    )


def pixels_of(clip: Any) -> Tensor:
    """A clip of a small source, decoded."""
    return readable(load_inputs({"clip": clip})["clip"])


def encoded(adapter: WanS2VAdapter, sources: list[TalkingClip], keys: list[SampleKey]) -> tuple[Tensor, Conditions]:
    """The sources as their keys decide."""
    decisions = [decide(key, frames=4, options=PLAIN) for key in keys]
    samples = [prepared(compose(source, each)) for source, each in zip(sources, decisions, strict=True)]
    return encode(adapter, samples, keys)


def test_a_row_without_audio_path_hears_its_video(tmp_path: Path) -> None:
    film = next(kind for kind in KINDS if kind.name == "late.mkv")
    write_kind(tmp_path, film)
    row = {"file_path": film.name, "text": "someone speaks", "type": "video"}
    meta = tmp_path / "metadata.json"
    meta.write_text(json.dumps([row, {**row, "audio_path": film.name}]))
    read_row = row_reader(RunConfig(train_data_meta=parse_data_sets(meta, "meta"), train_data_dir=tmp_path), SPEC)
    borrowed, own = (request_for(read_row(number).record, total_frames=100, fps=(25, 1)) for number in (0, 1))
    assert borrowed.record["audio_path"] == str(tmp_path / film.name)
    sounds = [WanS2VAdapter.inputs(request, PLAIN)["audio"].lazy for request in (borrowed, own)]
    assert describe(sounds[0], str) == describe(sounds[1], str)
    samples, _, _ = load_inputs({"audio": sounds[0]})["audio"]
    start = Fraction(frame_indices(borrowed)[0], 25)
    np.testing.assert_array_equal(samples, read_audio(tmp_path / film.name, start, Fraction(FRAMES * 2, 25)))
    assert samples.abs().max() > 0.3


def key_where(frames: int = 4, **wanted: Any) -> SampleKey:
    """The first row whose decisions are KEEP_ALL but for what is wanted."""
    target = dataclasses.replace(KEEP_ALL, **wanted)
    keys = (SampleKey(seed=3, epoch=0, row=row) for row in range(2000))
    return next(key for key in keys if decide(key, frames=frames, options=PLAIN) == target)


def direct(adapter: WanS2VAdapter, key: SampleKey, part: str, *clips: Tensor) -> Tensor:
    """Latents [16, f, h, w] of clips one after another, straight from the VAE with this sample's noise."""
    clip = torch.cat(clips).transpose(0, 1)[None]
    vae = adapter.encoders["vae"]
    noise = key.normal(f"posterior-{part}", tuple(vae.encode(clip)[0].shape))
    return vae.encode(clip, noise[None])[0]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_loaded_clip_is_a_function_of_its_key(media: dict[str, str]) -> None:
    first, again, other = load(media, row=1), load(media, row=1), load(media, row=2)
    for name in ("pixels", "control", "history", "audio"):
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["pixels"], other["pixels"])
    assert first["pixels"].shape == first["control"].shape == (FRAMES, 3, SIDE, SIDE)
    assert {first[name].dtype for name in ("pixels", "control", "history", "audio")} == {torch.float32}


def source_frame(pixels: Tensor) -> Tensor:
    """Which source frame each frame is, by its brightness."""
    return (pixels.mean(dim=(1, 2, 3)) + 0.9) / 1.8 * (SOURCE_FRAMES - 1)


def test_history_runs_up_to_the_clip_at_its_stride_and_control_shows_the_same_frames(media: dict[str, str]) -> None:
    sample = load(media, row=1)
    shown = source_frame(sample["pixels"])
    assert (shown.diff() - 2).abs().max() < 0.8
    count = frame_indices(request_for(media, row=1))[0] // 2
    assert 1 < count < 73 and len(sample["history"]) == count
    age = torch.arange(count, 0, -1)
    assert (source_frame(sample["history"]) - (shown[0] - 2 * age)).abs().max() < 1.5
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


def test_a_clip_at_the_start_has_no_history(media: dict[str, str]) -> None:
    assert load(media, frames=60, total_frames=119)["history"] is None


def test_a_short_history_is_filled_up_with_grey(media: dict[str, str]) -> None:
    rows = (row for row in range(100) if load(media, row=row)["history"] is not None)
    row = next(row for row in rows if len(read(media, row)["clip"]) == 73 + FRAMES)
    history, clip = load(media, row=row)["history"], read(media, row)["clip"]
    assert torch.equal(clip[73 - len(history) : 73], history) and clip[: 73 - len(history)].abs().max() == 0


@pytest.mark.parametrize(("fps", "stride"), [(NTSC, 2), (Fraction(25), 1), (Fraction(24000, 1001), 1)])
def test_sound_is_exactly_as_long_as_the_clip_and_gives_one_feature_a_frame(
    fps: Fraction, stride: int, media: dict[str, str], adapter: WanS2VAdapter
) -> None:
    sample = load(media, fps=(fps.numerator, fps.denominator), stride=stride, frames=40)
    assert sample["fps"] == fps / stride
    assert len(sample["audio"]) == round(40 * stride / fps * 16000)
    features = adapter.encoders["speech"].encode(sample["audio"], fps=sample["fps"], frames=40)
    assert features.shape == (40, 25, 32)
    assert features[:-1].abs().amax(dim=(1, 2)).min() > 0


def test_sound_behind_the_last_source_frame_is_silence(media: dict[str, str]) -> None:
    sample = load(media, frames=60, total_frames=119)  # the only start is 0; the clip lasts 120 source frames
    there = round(119 / NTSC * 16000)
    assert len(sample["audio"]) == round(120 / NTSC * 16000) > there
    assert sample["audio"][there:].abs().max() == 0 and sample["audio"][there - 400 : there].abs().max() > 0.1


def test_a_row_without_control_has_none_encoded(media: dict[str, str]) -> None:
    source = talking_clip(request_for(media, without="control_file_path"))
    assert source.control is None
    assert "control" not in compose(source, KEEP_ALL)


def test_a_cut_tail_blackens_the_control_from_its_frame_on() -> None:
    source = small_source(0, history=0)
    assert source.control is not None

    def shown(**changed: Any) -> Tensor:
        return pixels_of(control_clip(source.control, dataclasses.replace(KEEP_ALL, **changed), source.size))

    control, whole = shown(silent_from=3), shown()
    assert len(control) == 4 and torch.equal(control[:3], whole[:3]) and (control[3:] == BLACK).all()
    assert not (whole == BLACK).all()
    assert (shown(drop_control=True) == BLACK).all()


@pytest.mark.slow
def test_drops_happen_at_their_rates_and_independently() -> None:
    keys = [SampleKey(seed=1, epoch=epoch, row=row) for epoch in range(2) for row in range(4000)]
    drawn = [decide(key, frames=80, options=RANDOM) for key in keys]

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


def test_first_frame_mode_always_takes_the_first_frame() -> None:
    keys = [SampleKey(seed=1, epoch=0, row=row) for row in range(200)]
    assert {decide(key, frames=80, options=PLAIN).reference for key in keys} == {0}


@pytest.mark.slow
def test_real_history_is_untouched_encoded_with_the_clip_and_seen(adapter: WanS2VAdapter) -> None:
    # Even where the first frame could stand in for a history: it is for clips that have none.
    key = key_where(first_frame_as_history=True)
    source = small_source(1, history=73)
    latents, conditions = encoded(adapter, [source], [key])
    together = direct(adapter, key, "clip", pixels_of(source.history), pixels_of(source.pixels))
    assert latents.shape == (1, 16, 1, 2, 2) and conditions["motion_latents"].shape == (1, 16, 19, 2, 2)
    close(latents[0], together[:, 19:])
    close(conditions["motion_latents"][0], together[:, :19])
    assert conditions["drop_motion"] == (False,)


def test_a_clip_without_history_can_get_its_first_frame_as_the_end_of_one(adapter: WanS2VAdapter) -> None:
    key = key_where(first_frame_as_history=True)
    source = small_source(2, history=0)
    latents, conditions = encoded(adapter, [source], [key])
    pixels = pixels_of(source.pixels)
    history = (torch.zeros(67, 3, 16, 16), pixels[:1].expand(6, -1, -1, -1))
    together = direct(adapter, key, "clip", *history, pixels)
    close(latents[0], together[:, 19:])
    close(conditions["motion_latents"][0], together[:, :19])
    assert conditions["drop_motion"] == (False,)


@pytest.mark.parametrize("history", [0, 73])
def test_otherwise_the_clip_follows_its_reference_and_motion_is_dropped(history: int, adapter: WanS2VAdapter) -> None:
    # With a real history this is the sample whose history the 10 % drop takes away.
    key = key_where(drop_history=history > 0)
    source = small_source(3, history=history)
    latents, conditions = encoded(adapter, [source], [key])
    pixels = pixels_of(source.pixels)
    close(latents[0], direct(adapter, key, "clip", pixels[:1], pixels)[:, 1:])
    close(conditions["motion_latents"][0], direct(adapter, key, "history", torch.zeros(73, 3, 16, 16)))
    assert conditions["drop_motion"] == (True,)


def test_control_and_reference_latents_are_those_of_the_vae(adapter: WanS2VAdapter) -> None:
    key, source = key_where(), small_source(4, history=73)
    _, conditions = encoded(adapter, [source], [key])
    control, pixels = pixels_of(source.control), pixels_of(source.pixels)
    close(conditions["control_latents"][0], direct(adapter, key, "control", control[:1], control)[:, 1:])
    close(conditions["ref_latents"][0], direct(adapter, key, "reference", pixels[:1]))
    latents, conditions = encoded(adapter, [dataclasses.replace(source, control=None)], [key])
    assert torch.equal(conditions["control_latents"], torch.zeros_like(latents))  # as a video is made without one


@pytest.mark.slow
def test_text_is_zero_padded_and_sound_is_transposed_dropped_and_cut(adapter: WanS2VAdapter) -> None:
    source = small_source(5, history=0)
    _, conditions = encoded(adapter, [source], [key_where()])
    [states] = adapter.encoders["text"].encode(["hello"])
    close(conditions["text_embeds"][0, : len(states)], states)
    assert conditions["text_embeds"].shape == (1, 128, 32)
    assert conditions["text_embeds"][0, len(states) :].abs().max() == 0
    features = adapter.encoders["speech"].encode(pixels_of(source.audio), fps=Fraction(16), frames=4)
    close(conditions["audio"][0], features.permute(1, 2, 0))
    _, cut = encoded(adapter, [source], [key_where(silent_from=2)])
    close(cut["audio"][0, ..., :2], conditions["audio"][0, ..., :2])
    assert cut["audio"][0, ..., 2:].abs().max() == 0 and conditions["audio"][0, ..., 2].abs().max() > 0
    _, silent = encoded(adapter, [source], [key_where(drop_audio=True)])
    assert silent["audio"].abs().max() == 0


@pytest.mark.slow
def test_a_dropped_text_is_empty_and_the_reference_is_the_drawn_frame(media: dict[str, str]) -> None:
    texts = {}
    for row in range(30):
        drawn = decide(SampleKey(seed=7, epoch=0, row=row), frames=FRAMES, options=RANDOM)
        if drawn.drop_text not in texts:
            seen = read(media, row)
            texts[drawn.drop_text] = seen["text"]
            assert torch.equal(seen["reference"][0], load(media, row=row)["pixels"][drawn.reference])
    assert texts == {True: "", False: "someone speaks"}


def test_with_variants_only_so_many_starts_are_drawn_and_drops_stay_random(media: dict[str, str]) -> None:
    keys = [SampleKey(seed=7, epoch=epoch, row=3, variants=2) for epoch in range(60)]
    drawn = [WanS2VAdapter.inputs(request_for(media, key=key), RANDOM) for key in keys]
    assert len({each["audio"] for each in drawn}) == 2 == len({each["reference"] for each in drawn})
    assert len({decide(key, frames=FRAMES, options=RANDOM).silent_from for key in keys} - {None}) <= 2
    assert {each["text"].lazy for each in drawn} == {Value(""), Value("someone speaks")}


@pytest.mark.slow
def test_a_batch_of_two_equals_two_batches_of_one(adapter: WanS2VAdapter, model_dir: Path) -> None:
    sources = [small_source(6, history=73), small_source(7, history=0, text="another, longer text")]
    keys = [key_where(silent_from=1), key_where()]
    batching = WanS2VAdapter.from_pretrained(options_for(model_dir, low_vram=True, vae_mini_batch=2))
    latents, conditions = encoded(batching, sources, keys)
    assert latents.dtype == torch.float32 and latents.shape[0] == 2
    assert conditions["drop_motion"] == (False, True)
    for index, (source, key) in enumerate(zip(sources, keys, strict=True)):
        alone, alone_conditions = encoded(adapter, [source], [key])
        close(latents[index], alone[0])
        assert set(conditions) == set(alone_conditions) and len(conditions) == 6
        for name, value in conditions.items():
            close(torch.as_tensor(value[index]).float(), torch.as_tensor(alone_conditions[name][0]).float())


@pytest.mark.slow
def test_the_transformer_reads_what_the_adapter_makes_of_a_real_clip(
    media: dict[str, str], adapter: WanS2VAdapter
) -> None:
    requests = [request_for(media, row=row) for row in (1, 2)]
    samples = [prepared(WanS2VAdapter.inputs(request, PLAIN)) for request in requests]
    latents, conditions = encode(adapter, samples, [request.key for request in requests])
    assert latents.shape == (2, 16, 2, 8, 8) and conditions["audio"].shape == (2, 25, 32, FRAMES)
    prediction = adapter.predict(adapter.transformer, latents, torch.tensor([500.0, 20.0]), conditions)
    assert prediction.shape == latents.shape and prediction.isfinite().all() and prediction.requires_grad
    assert not latents.requires_grad and not any(c.requires_grad for c in conditions.values() if torch.is_tensor(c))


@pytest.mark.slow
def test_bfloat16_encoders_keep_latents_and_sound_in_float32(model_dir: Path) -> None:
    adapter = WanS2VAdapter.from_pretrained(options_for(model_dir, compute_dtype=torch.bfloat16))
    latents, conditions = encoded(adapter, [small_source(8, history=0)], [key_where()])
    assert latents.dtype == conditions["audio"].dtype == conditions["control_latents"].dtype == torch.float32
    assert {p.dtype for p in adapter.transformer.parameters()} == {torch.float32}
    assert {p.dtype for p in adapter.encoders["speech"].parameters()} == {torch.float32}
    assert {p.dtype for p in adapter.encoders["vae"].parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_encoders_are_loaded_when_they_are_first_used(model_dir: Path) -> None:
    adapter = WanS2VAdapter.from_pretrained(options_for(model_dir))
    assert not adapter.encoders.loaded
    adapter.encoders.run("text", ["hello"])
    assert set(adapter.encoders.loaded) == {"text"}
    adapter.encoders.load()
    assert set(adapter.encoders.loaded) == {"vae", "text", "speech"}


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
    assert caught.value.hint and "models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl" in caught.value.hint


def test_export_names_are_the_released_names(adapter: WanS2VAdapter) -> None:
    names = [name for name, _ in adapter.transformer.named_parameters()]
    assert "blocks.0.self_attn.q.weight" in names and [SPEC.export.names["same"](name) for name in names] == names
