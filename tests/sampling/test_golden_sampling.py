"""Every family's sampler against runs of the original pipelines: conditions, predictions, latents, frames."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.golden_vaes import GOLDEN, golden_vae
from vfun_cli import families
from vfun_cli.families import adapter_of
from vfun_cli.families.cogvideox_fun.transformer import load_transformer as load_cogvideox
from vfun_cli.families.easyanimate_control import complete_config
from vfun_cli.families.easyanimate_control.transformer import load_transformer as load_easyanimate
from vfun_cli.families.hunyuanvideo.adapter import load_transformer as load_hunyuan
from vfun_cli.families.wan_fun_control.adapter import load_transformer as load_fun
from vfun_cli.families.wan_s2v.transformer import load_transformer as load_s2v
from vfun_cli.modeling.adapter import AdapterOptions, ModelAdapter, VideoRequest
from vfun_cli.modeling.encoders.frozen import Encoders, EncoderSource, Output
from vfun_cli.modeling.encoders.wav2vec2 import align_to_frames
from vfun_cli.modeling.inputs import AudioSegment, ClipInput, Decoded, MediaFile, load_inputs
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.sampling.loop import Sampler
from vfun_cli.sampling.schedules import make_schedule

pytestmark = pytest.mark.slow

CASES = sorted(path.parent for path in (GOLDEN / "sampling").glob("*/*/meta.json"))
CASES = [case for case in CASES if case.name != "v10_unipc"]  # another sampler; the released default is Euler
PREDICTIONS, LATENTS, CONDITIONS, HISTORY = 5e-5, 1e-4, 1e-5, 1e-4
"""Tolerances of the golden tensors, absolute."""
FRAMES = {"hunyuanvideo": 5e-4}
"""2e-4 for the others; these are stored as float16."""


@dataclass(frozen=True)
class GoldenKey(SampleKey):
    """Draws what the original drew."""

    noise: Mapping[str, Tensor] = field(default_factory=dict)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        assert self.noise[purpose].shape == shape
        return self.noise[purpose]


@dataclass(frozen=True, kw_only=True)
class Golden:
    case: Path
    io: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def family(self) -> str:
        return str(self.meta["family"])

    def latents(self, name: str) -> Tensor:
        """[B, C, f, h, w], as vfun has them."""
        return self.io[name].transpose(1, 2) if self.family == "cogvideox-fun" else self.io[name]

    def blocks(self, name: str) -> Decoded | None:
        """Pixels [F, 3, H, W] in [-1, 1]."""
        if name not in self.io:
            return None
        small = self.io[name][0].float() / 255 * 2 - 1  # [3, F, h, w]
        return Decoded(small.repeat_interleave(8, -1).repeat_interleave(8, -2).transpose(0, 1))

    def pixels(self, name: str) -> Decoded | None:
        return Decoded(self.io[name][0].transpose(0, 1)) if name in self.io else None


def golden(case: Path) -> Golden:
    return Golden(case=case, io=load_file(case / "io.safetensors"), meta=json.loads((case / "meta.json").read_text()))


# --- the models ---


def released(source: Path, folder: Path, weights: str = "weights.safetensors") -> Path:
    """A golden transformer under the names of a released folder."""
    folder.mkdir(exist_ok=True)
    shutil.copy(source / "config.json", folder)
    shutil.copy(source / weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def s2v(made: Golden, folder: Path) -> nn.Module:
    released(GOLDEN / "wan_s2v", folder)
    stated = config_of(folder)
    for key in ("in_channels", "hidden_size"):  # the original's loader adds them
        stated.pop(key, None)
    (folder / "config.json").write_text(json.dumps(stated))
    return load_s2v(folder)


def fun(made: Golden, folder: Path) -> nn.Module:
    released(GOLDEN / "wan_fun_control/v11", folder)
    if made.meta["version"] == "V1.0":
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith("ref_conv.")}
        save_file(kept, folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(config_of(folder) | {"add_ref_conv": False}))
    return load_fun(folder)


def hunyuan(made: Golden, folder: Path) -> nn.Module:
    released(GOLDEN / made.meta["transformer"], folder, "../transformer_weights.safetensors")
    return load_hunyuan(folder, "i2v" if made.family.endswith("i2v") else "t2v")


def easyanimate(made: Golden, folder: Path) -> nn.Module:
    released(GOLDEN / made.meta["transformer"], folder)
    return load_easyanimate(folder, complete_config(config_of(folder)))


def cogvideox(made: Golden, folder: Path) -> nn.Module:
    released(GOLDEN / made.meta["transformer"], folder)
    return load_cogvideox(folder, config_of(folder))


def adapter_for(made: Golden, folder: Path, load: Callable[[Golden, Path], nn.Module], **more: Any) -> ModelAdapter:
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(made.meta["scheduler_config"]))
    mode = {"2b_normal": "normal"}.get(made.case.name)
    options = AdapterOptions(
        model_dir=folder,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
        train_mode=mode,
        model_settings={"add_noise_in_inpaint_model": False},
    )
    vae = golden_vae(made.meta["vae"])
    source = EncoderSource(load=lambda: vae, files=(), settings="")
    encoders = Encoders({"vae": source}, options.device)
    kind: Any = adapter_of(families.find(made.family))
    return kind(transformer=load(made, folder / "transformer"), encoders=encoders, options=options, **more)


# --- what each case gives ---


def request_of(made: Golden, **given: Any) -> VideoRequest:
    meta = made.meta
    if "segment0.noise" in made.io:
        noise = {f"video {r}": made.io[f"segment{r}.noise"][0] for r in range(meta["num_segments"])}
    else:
        noise = {"video 0": made.latents("noise")[0]}
    common = {
        "frames": meta.get("segment_frame_length", meta["num_frames"]),
        "guidance": meta.get("true_cfg_scale", meta["guidance_scale"]),
        "fps": Fraction(meta.get("fps", 8)),
    }
    return VideoRequest(
        key=GoldenKey(seed=0, epoch=0, row=0, noise=noise),
        prompt="positive",
        negative_prompt="negative",
        height=meta["height"],
        width=meta["width"],
        **{**common, **given},
    )


SOUND = AudioSegment(MediaFile("sound.wav"), Fraction(0), Fraction(1), 16000, 16000)
"""Never read: its features are given."""


def states(tensor: Tensor) -> Output:
    return {"states": tensor}


def parts_of(made: Golden, folder: Path) -> tuple[ModelAdapter, VideoRequest, dict[str, Output]]:
    """The adapter, the request, and what the encoders that the goldens leave out would give."""
    io, meta = made.io, made.meta
    if made.family == "wan-s2v":
        seconds = Fraction(io["features_30hz"].shape[1], 30)
        request = request_of(
            made, image=made.blocks("ref_blocks"), control=made.blocks("pose_blocks"), audio=SOUND,
            seconds=seconds, start_from_ref=meta["init_first_frame"],
        )  # fmt: skip
        frames = meta["segment_frame_length"] * meta["num_segments"]
        audio = align_to_frames(io["features_30hz"], fps=Fraction(meta["fps"]), frames=frames)
        text = {"text": states(io["context"]), "negative text": states(io["negative_context"])}
        return adapter_for(made, folder, s2v), request, text | {"audio": {"features": audio}}
    if made.family == "wan-fun-control":
        request = request_of(
            made, control=made.blocks("control_blocks"), image=made.blocks("start_blocks"),
            reference=made.blocks("ref_blocks"),
        )  # fmt: skip
        text = {"text": states(io["context"]), "negative text": states(io["negative_context"])}
        if meta["clip_states"] != "zeros":
            seed = int(meta["clip_states"].split("manual_seed(")[1].split(")")[0])
            text["image"] = states(torch.randn((1, 257, 1280), generator=torch.Generator().manual_seed(seed))[0])
        return adapter_for(made, folder, fun), request, text
    if made.family.startswith("hunyuan"):
        image = io["image_pixels"][0].unsqueeze(0) * 2 - 1 if "image_pixels" in io else None
        request = request_of(made, image=None if image is None else Decoded(image))
        text = {
            f"{vfun}{name}": output
            for vfun, theirs in (("", ""), ("negative ", "negative_"))
            if f"{theirs}text" in io
            for name, output in (
                ("prompt", {"states": io[f"{theirs}text"][0], "mask": io[f"{theirs}text_mask"][0]}),
                ("pooled", {"pooled": io[f"{theirs}pooled"][0]}),
            )
        }
        return adapter_for(made, folder, hunyuan), request, text
    if made.family.startswith("easyanimate"):
        request = request_of(made, control=made.blocks("control_blocks"), image=made.blocks("ref_blocks"))
        names = {"encoder_hidden_states": "text", "encoder_hidden_states_t5": "text_t5"}
        text = {
            f"{vfun}{name}": states(io[theirs + golden_name][0])
            for vfun, theirs in (("", ""), ("negative ", "negative_"))
            for name, golden_name in names.items()
            if golden_name in io
        }
        return adapter_for(made, folder, easyanimate), request, text
    first, last = (made.pixels(f"known_{end}") or made.blocks(f"{end}_blocks") for end in ("first", "last"))
    mask = Decoded(io["mask"].bool().unsqueeze(1)) if "mask" in io else None
    request = request_of(
        made, image=first, end_image=last, edit=made.blocks("video_blocks"), edit_mask=mask, strength=meta["strength"]
    )
    if request.edit is not None:
        request = replace(request, key=edited_key(made, request.edit))
    text = {"text": states(io["text"][0]), "negative text": states(io["negative_text"][0])}
    scale = float(json.loads((GOLDEN / meta["vae"] / "config.json").read_text())["scaling_factor"])
    return adapter_for(made, folder, cogvideox, scale=scale), request, text


def edited_key(made: Golden, video: ClipInput) -> GoldenKey:
    """Draws with which a video's latents become ``initial_latents``, whose own draws nothing states."""
    pixels = load_inputs({"video": video})["video"].transpose(0, 1).unsqueeze(0)
    clean = golden_vae(made.meta["vae"]).encode(pixels)
    alpha = made.io["alphas_cumprod"][made.io["timesteps"][-made.meta["steps_run"]].long()]
    noise = (made.latents("initial_latents") - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    draws = {"video 0": noise[0], "edit posterior": torch.zeros_like(clean[0])}
    return GoldenKey(seed=0, epoch=0, row=0, noise=draws)


def encoded(adapter: ModelAdapter, request: VideoRequest, given: Mapping[str, Output]) -> dict[str, Output]:
    """What the VAE makes of its inputs, and what is given of the other encoders."""
    outputs = dict(given)
    inputs = adapter.inputs_to_sample(request, adapter.options)
    assert {name for name, each in inputs.items() if each.encoder not in ("vae", None)} == given.keys()
    for name, each in inputs.items():
        if name in given:
            continue
        value = load_inputs({name: each.lazy})[name]
        outputs[name] = {"value": value} if each.encoder is None else adapter.encoders.run("vae", [value])[0]
    return outputs


def test_every_case_is_here() -> None:
    assert len(CASES) == 19


NAMES_OF_CONDITIONS = {
    "control": ("y", CONDITIONS),
    "reference": ("full_ref", CONDITIONS),
    "control_latents": ("control_latents", CONDITIONS),
    "ref_latents": ("ref_latents", CONDITIONS),
    "audio": ("audio", CONDITIONS),
    "motion_latents": ("motion_latents", HISTORY),
    "first_latent": ("image_latents", CONDITIONS),
    "guidance": ("guidance", CONDITIONS),
    "inpaint": ("inpaint_latents", CONDITIONS),
}
"""vfun's names of conditions, and the goldens' with their tolerance."""


def require_close(found: Tensor, wanted: Tensor, within: float, what: str) -> None:
    torch.testing.assert_close(found, wanted.float(), atol=within, rtol=0, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_a_video_is_made_as_the_original_makes_it(case: Path, tmp_path: Path) -> None:
    made = golden(case)
    adapter, request, given = parts_of(made, tmp_path)
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def predict(transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        velocity = type(adapter).predict(adapter, transformer, noisy, timesteps, conditions)
        seen.append((conditions, velocity))
        return velocity

    adapter.predict = predict  # type: ignore[method-assign]
    spec, frames = families.find(made.family), list[Tensor]()
    sampler = Sampler(
        adapter=adapter,
        transformer=adapter.transformer,
        schedule=lambda: make_schedule(spec, tmp_path, made.meta["num_inference_steps"]),
        dtype=torch.float32,
    )
    count = 0
    for after in sampler.steps(encoded(adapter, request, given), request, frames):
        prefix = f"segment{after.segment}." if "segment0.noise" in made.io else ""
        if after.step == 0:
            continue
        if after.step == 1:
            branches = seen[count:]
            assert len(branches) == 1 + request.is_guided
            for (conditions, velocity), branch in zip(branches, ("cond", "uncond"), strict=False):
                theirs = made.latents(f"{prefix}step0.{branch}")
                require_close(velocity, theirs, PREDICTIONS, f"{prefix}step0.{branch}")
                for name, (stored, within) in NAMES_OF_CONDITIONS.items():
                    wanted = prefix + stored if prefix + stored in made.io else stored
                    if name in conditions and wanted in made.io and not (name == "audio" and branch == "uncond"):
                        require_close(conditions[name], made.latents(wanted), within, wanted)
        count = len(seen)
        name = f"{prefix}latents{after.step}"
        wanted_latents, found_latents = made.latents(name), after.latents
        if made.family == "hunyuanvideo-i2v":  # the given frame never matters
            wanted_latents, found_latents = wanted_latents[:, :, 1:], found_latents[:, :, 1:]
        require_close(found_latents, wanted_latents, LATENTS, name)
    assert after.step == made.meta.get("steps_run", made.meta["num_inference_steps"])
    assert after.segment + 1 == made.meta.get("num_segments", 1)
    video = (torch.cat(frames).transpose(0, 1).unsqueeze(0) + 1) / 2
    assert video.shape[2] == made.meta["num_frames"]
    for name, every in (("frames", 1), ("frames_sub2", 2), ("frames_sub4", 4)):
        if name in made.io:
            within = FRAMES.get(case.parent.name, 2e-4)
            require_close(video[..., ::every, ::every], made.io[name], within, name)
    if "frames_mean" in made.io:
        require_close(video.mean((3, 4)), made.io["frames_mean"], 2e-4, "frames_mean")
