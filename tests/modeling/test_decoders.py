"""Every VAE makes of latents the frames that the original's sampling made of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.fake_cuda import made_up_cuda
from tests.golden_vaes import GOLDEN, SAME, VAES, WAN, golden_vae
from vfun_cli.modeling.encoders.clip_vae import ClipVAE
from vfun_cli.modeling.encoders.frozen import Encoders, EncoderSource
from vfun_cli.modeling.encoders.wan_vae import WanVAE, load_wan_vae

pytestmark = pytest.mark.slow

CASES = sorted(path.parent for path in (GOLDEN / "sampling").glob("*/*/meta.json"))
ONE_PASS = [case for case in CASES if case.parent.name != "wan_s2v"]
SEGMENTS = [case for case in CASES if case.parent.name == "wan_s2v"]


@pytest.fixture(scope="module")
def vaes() -> dict[str, ClipVAE]:
    return {name: golden_vae(name) for name in (*VAES, *SAME)}


def golden(case: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(case / "io.safetensors"), json.loads((case / "meta.json").read_text())


def last_latents(io: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    steps = [name for name in io if name.removeprefix(prefix).removeprefix("latents").isdigit()]
    return io[max(steps)]  # fewer than ten


def require_frames(pixels: Tensor, io: Mapping[str, Tensor], *, within: float = 2e-4) -> None:
    frames = (pixels + 1) / 2
    every = {"frames": 1, "frames_sub2": 2, "frames_sub4": 4}
    stored = [name for name in every if name in io]
    assert len(stored) == 1
    for name in stored:
        found = frames[..., :: every[name], :: every[name]]
        torch.testing.assert_close(found, io[name].float(), atol=within, rtol=0)
    if "frames_mean" in io:
        torch.testing.assert_close(frames.mean((3, 4)), io["frames_mean"], atol=within, rtol=0)


def latents_of(frames: int, channels: int, height: int = 4, width: int = 4) -> Tensor:
    return torch.randn(1, channels, frames, height, width, generator=torch.Generator().manual_seed(frames))


def channels_of(vae: ClipVAE) -> int:
    return 16 if isinstance(vae, WanVAE) else int(vae.model.config.latent_channels)  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize("case", ONE_PASS, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_the_last_latents_become_the_originals_frames(case: Path, vaes: dict[str, ClipVAE]) -> None:
    io, meta = golden(case)
    latents = last_latents(io)
    if meta["family"] == "cogvideox-fun":
        latents = latents.transpose(1, 2)  # the original has frames before channels
    if meta["family"] == "hunyuanvideo-i2v":
        latents = torch.cat([io["image_latents"], latents[:, :, 1:]], dim=2)
    pixels = vaes[meta["vae"]].decode(latents)
    assert pixels.dtype == torch.float32 and not pixels.requires_grad
    require_frames(pixels, io, within=5e-4 if "frames" in io else 2e-4)  # these are float16


@pytest.mark.parametrize("case", SEGMENTS, ids=lambda case: case.name)
def test_every_segment_is_decoded_behind_what_it_saw(case: Path, vaes: dict[str, ClipVAE]) -> None:
    io, meta = golden(case)
    parts = []
    for index, dropped in enumerate(meta["drop_motion"]):
        name = f"segment{index}."
        before = io["ref_latents"] if dropped else io[f"{name}motion_latents"]
        latents = torch.cat([before, last_latents(io, name)], dim=2)
        assert latents.shape[2] == meta["decoded_latent_frames"][index]
        frames = vaes[meta["vae"]].decode(latents)[:, :, -meta["segment_frame_length"] :]
        parts.append(frames[:, :, 3:] if dropped else frames)
    require_frames(torch.cat(parts, dim=2), io)


def test_no_golden_case_is_forgotten() -> None:
    assert len(ONE_PASS) == 18 and len(SEGMENTS) == 2
    assert {SAME.get(meta["vae"], meta["vae"]) for _, meta in map(golden, CASES)} == set(VAES)


@pytest.mark.parametrize("name", VAES)
def test_every_latent_behind_the_first_makes_four_frames(name: str, vaes: dict[str, ClipVAE]) -> None:
    vae = vaes[name]
    for frames in range(1, 7):
        pixels = vae.decode(latents_of(frames, channels_of(vae)))
        assert pixels.shape == (1, 3, 1 + 4 * (frames - 1), 32, 32)


@pytest.mark.parametrize("name", VAES)
def test_frames_do_not_depend_on_the_batch_or_on_earlier_clips(
    name: str, vaes: dict[str, ClipVAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = vaes[name]
    latents = torch.cat([latents_of(3, channels_of(vae)), latents_of(3, channels_of(vae)).flip(2)])
    one_by_one = vae.decode(latents)
    monkeypatch.setattr(vae, "mini_batch", 2)
    torch.testing.assert_close(vae.decode(latents), one_by_one, atol=1e-4, rtol=0)  # rounding: 2e-5


def test_pixels_are_clamped(vaes: dict[str, ClipVAE], monkeypatch: pytest.MonkeyPatch) -> None:
    vae = vaes["hunyuanvideo/vae"]
    monkeypatch.setattr(vae, "reconstruction", lambda latents: latents.new_tensor([[-2.0, -1.0, 0.5, 3.0]]))
    assert vae.decode(torch.zeros(1, 4, 1, 4, 4)).tolist() == [[-1.0, -1.0, 0.5, 1.0]]


def test_hunyuan_latents_are_decoded_in_tiles_of_32(vaes: dict[str, ClipVAE]) -> None:
    vae = vaes["hunyuanvideo/vae"]
    latents = latents_of(1, 4, height=4, width=33)
    alone = vae.decode(latents[..., :32])
    torch.testing.assert_close(vae.decode(latents)[..., :192], alone[..., :192], atol=1e-6, rtol=0)


@pytest.mark.parametrize("low_vram", [False, True])
def test_encoders_decode_on_their_device_in_the_dtype_of_the_networks(low_vram: bool) -> None:
    vae = WanVAE(load_wan_vae(load_file(GOLDEN / WAN / "weights.safetensors"), dtype=torch.bfloat16, where=WAN))
    source = EncoderSource(load=lambda: vae, files=(), settings="")
    if not low_vram:
        vae.to("meta")  # where it stays
    with made_up_cuda() as device:
        encoders = Encoders({"vae": source}, device, low_vram=low_vram)
        pixels = encoders.decode("vae", torch.empty(1, 16, 2, 4, 4, device=device))
        assert pixels.device == device and pixels.dtype == torch.float32 and pixels.shape == (1, 3, 5, 32, 32)
        assert {each.is_cuda for each in vae.parameters()} == {not low_vram}
