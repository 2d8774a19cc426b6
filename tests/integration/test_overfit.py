"""Every family learns one clip by the command line, and what it learnt is in whichever of its files makes the video."""

import json
import wave
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from tests.jobs import finish, start
from vfun_cli import families
from vfun_cli.demo import default as demo_default
from vfun_cli.demo.media import CLIPS
from vfun_cli.errors import ConfigError
from vfun_cli.families.detect import read_dims
from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.media.writing import write_video
from vfun_cli.sampling.source import find_source
from vfun_cli.sampling.weights import LoadOptions, load_model

pytestmark = pytest.mark.long

CLIP, SIZE, FRAMES = 4, 128, 9
"""Of ``benchmarks/overfit.py``; one frame less where the family counts so."""
USABLE_OF = {"easyanimate-v5.1-control": 10}
"""Frames of the file: all but the tenth of it that the family does not read."""
STEPS = {
    "wan-s2v": 500, "wan-fun-control": 800, "hunyuanvideo-t2v": 800, "hunyuanvideo-i2v": 800,
    "easyanimate-v5.1-control": 3000, "easyanimate-v5-control": 3000, "cogvideox-fun": 3000,
}  # fmt: skip
"""Of some more than in the benchmark: bf16 and the mp4 take a little of what was gained."""
WITHOUT_IMAGE = ("hunyuanvideo-t2v", "easyanimate-v5-control")
LEAD_IN = {"wan-s2v": 3}
"""Frames that are made and not shown."""
GAIN = 10.0
"""dB that the tuned model's video must be nearer to the clip than the base model's."""
LORA_GAIN = 6.0
"""The same of a LoRA of all linear layers: 9.0 were measured of Wan-S2V, 9.6 of HunyuanVideo, 7.8 of CogVideoX."""
NARROW_STEPS = 50
"""Of a LoRA of the layers that ComfyUI knows, for a family of which it knows some alone; it learns little."""
ALIKE = 40.0
"""dB between the video of a LoRA's checkpoint and that of its files, whose A and B are in bf16 each before they are
multiplied; a checkpoint's are in float32. 47 to 64 dB were measured, 10 of 255 at most."""
ALPHA = {"cogvideox-fun": 256}
"""Strength of a LoRA of rank 64, where it is not 64."""
WITHIN = 1800
"""Seconds for a command."""


@dataclass(frozen=True)
class Task:
    """One clip of the demo, alone."""

    spec: FamilySpec
    rows: Path
    """Metadata to train on."""
    wish: Path
    """The row that makes the same video."""
    clip: NDArray[np.uint8]

    @property
    def frames(self) -> int:
        return FRAMES - (not self.spec.plan.frame_rule.first_alone)

    @property
    def model(self) -> Path:
        return Path("vfun-demo") / self.spec.name / "model"


def decoded(path: Path) -> NDArray[np.uint8]:
    """[F, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def signed(frames: NDArray[np.uint8]) -> torch.Tensor:
    """[F, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def prepare(family: str) -> Task:
    """The demo of a family in the working directory, and its fourth clip cut to the frames that are learnt."""
    spec = families.find(family)
    data, name, demo = Path(demo_default.make(spec)["train_data_dir"]), f"{CLIP:08d}", CLIPS[CLIP - 1]
    known = {field.name for field in spec.fields}
    frames = FRAMES - (not spec.plan.frame_rule.first_alone)
    (data / "cut").mkdir(exist_ok=True)
    total = USABLE_OF.get(family, frames)
    row: dict[str, Any] = {"text": demo.text, "type": "video"}
    wish: dict[str, Any] = {"prompt": demo.text, "fps": str(demo.fps), "frames": frames}
    for field, folder in (("file_path", "train"), ("control_file_path", "control")):
        if field in known:
            write_video(data / f"cut/{folder}.mp4", signed(decoded(data / folder / f"{name}.mp4")[:total]), demo.fps)
            row[field] = f"cut/{folder}.mp4"
    if "control_file_path" in row:
        wish["control"] = row["control_file_path"]
    if "audio_path" in known:
        row["audio_path"] = wish["audio"] = "cut/sound.wav"
        with wave.open(str(data / f"wav/{name}.wav")) as source, wave.open(str(data / "cut/sound.wav"), "wb") as cut:
            cut.setparams(source.getparams())
            cut.writeframes(source.readframes(int(frames / demo.fps * source.getframerate())))
    clip = decoded(data / "cut/train.mp4")[:frames]
    if family not in WITHOUT_IMAGE:
        Image.fromarray(clip[0]).save(data / "cut/first.png")
        wish["image"] = "cut/first.png"
    rows, wishes = data / "one-cut.json", data / "wish.json"
    rows.write_text(json.dumps([row]), encoding="utf-8")
    wishes.write_text(json.dumps([wish]), encoding="utf-8")
    small = [np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for frame in clip]
    return Task(spec, rows, wishes, np.stack(small)[LEAD_IN.get(family, 0) :])


def train(command: str, task: Task, folder: Path, *more: object, steps: int | None = None) -> Path:
    """The checkpoint at the end of a run in one process, which draws conditions and noise as any run does."""
    steps = steps or STEPS[task.spec.name]
    finish(
        start(
            command, task.spec.name, "--demo", "--device", "cpu", "--strategy", "single", "--num-processes", 1,
            "--train-data-meta", task.rows, "--output-dir", folder, "--cache", folder.with_name("cache"),
            "--cache-variants", 8, "--video-repeat", 2, "--train-batch-size", 2, "--video-sample-size", SIZE,
            "--image-sample-size", SIZE, "--token-sample-size", SIZE, "--video-sample-n-frames", task.frames,
            "--video-sample-stride", 1, "--dataloader-num-workers", 0, "--max-train-steps", steps,
            "--checkpointing-steps", steps, "--learning-rate", 4e-3, "--lr-scheduler", "cosine",
            "--lr-warmup-steps", steps // 20, "--adam-weight-decay", 0, "--max-grad-norm", 1,
            "--gradient-checkpointing", "none", "--mixed-precision", "no", "--report-to", "none", *more,
        ),
        within=WITHIN,
    )  # fmt: skip
    return folder / f"checkpoint-{steps}"


def video(task: Task, output: Path, weights: object, *more: object) -> NDArray[np.uint8]:
    """The frames that these weights make of the same noise."""
    finish(
        start(
            "generate", weights, "--meta", task.wish, "--height", SIZE, "--width", SIZE, "--steps", 20,
            "--guidance", 1, "--seed", 1, "--device", "cpu", "--output", output, *more,
        ),
        within=WITHIN,
    )  # fmt: skip
    return decoded(output)


def psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    difference = found.astype(np.float64) - expected
    with np.errstate(divide="ignore"):  # equal ones
        return float(10 * np.log10(255**2 / np.square(difference).mean()))


def linear_layers(task: Task, *, in_comfyui: bool = False) -> str:
    """All of them, in which adapters of rank 64 can do what full tuning can, or those that ComfyUI adds a LoRA to."""
    source = find_source(str(task.model), output_dir=Path())
    adapter = load_model(source, LoadOptions(device=torch.device("cpu"), compute_dtype=torch.float32))
    location, dims = task.spec.export.comfyui_location, read_dims(task.spec, task.model)
    found = []
    for name, module in adapter.transformer.named_modules():
        if isinstance(module, nn.Linear):
            with suppress(ConfigError):
                if in_comfyui and location is not None:
                    location(name, dims)
                found.append(name)
    return ",".join(found)


def adapters(task: Task, layers: str) -> tuple[object, ...]:
    """Options of a LoRA in these layers."""
    return ("--rank", 64, "--network-alpha", ALPHA.get(task.spec.name, 64), "--target-name", layers)


def export(checkpoint: Path, folder: Path, *more: object) -> Path:
    finish(start("export-bf16", checkpoint, "--output", folder, *more))
    return folder


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_a_family_learnt_of_a_clip_is_in_every_file_made_of_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clip comes of noise again: byte for byte of a checkpoint and of its export, nearly of a LoRA in every format.

    A LoRA of the same steps comes less near: what is no linear layer (convolutions, biases, norms) stays random. Where
    ComfyUI adds LoRAs to some layers alone (HunyuanVideo), its file is of another one of these, trained briefly.
    """
    monkeypatch.chdir(tmp_path)
    task = prepare(family)
    base = psnr(video(task, Path("base.mp4"), task.model), task.clip)

    checkpoint = train("train", task, Path("full"))
    tuned = video(task, Path("tuned.mp4"), checkpoint)
    np.testing.assert_array_equal(video(task, Path("exported.mp4"), export(checkpoint, Path("export"))), tuned)

    wide = train("lora", task, Path("lora"), *adapters(task, linear_layers(task)))
    adapted = video(task, Path("adapted.mp4"), wide)
    merged = export(wide, Path("merged"), "--merge")
    np.testing.assert_array_equal(video(task, Path("merged.mp4"), merged), adapted)
    alike = {}
    for form in task.spec.export.lora_formats:
        if form == "comfyui" and task.spec.export.comfyui_location is not None:
            layers = linear_layers(task, in_comfyui=True)
            checkpoint = train("lora", task, Path("narrow"), *adapters(task, layers), steps=NARROW_STEPS)
            adapted_so = video(task, Path("narrow.mp4"), checkpoint)
        else:
            checkpoint, adapted_so = wide, adapted
        file = next(export(checkpoint, Path(form), "--format", form).glob("*.safetensors"))
        alike[form] = psnr(video(task, Path(f"{form}.mp4"), task.model, "--lora", file), adapted_so)
    gains = {"full": psnr(tuned, task.clip) - base, "LoRA": psnr(adapted, task.clip) - base}
    print(family, f"base {base:.2f} dB, gains {gains}, LoRA files against its checkpoint {alike}")
    assert gains["full"] >= GAIN and gains["LoRA"] >= LORA_GAIN, gains
    assert min(alike.values()) >= ALIKE, alike
