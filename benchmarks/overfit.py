"""Every family overfits one clip, and makes it of noise: how much nearer the tuned model comes than the untuned one.

    python benchmarks/overfit.py [--families NAME ...] [--steps N] [--jobs 1] [--picture docs/images/overfit.png]

One clip of the demo, with all that the family is given beside it (caption, first frame, control clip, sound), trains
the tiny model on one core in float32: the family's conditions with all their random drops, its objective, AdamW, a
cosine. Base and tuned model then make the video from the same noise and the same conditions with the sampler of
``vfun generate``, the family's schedule, and no guidance.

The VAEs have the weights of ``vfun_cli/demo/mosaic.py``: random ones show nothing. What they make of the clip's own
latents is the ``ceiling``. All numbers are PSNR in dB against the clip. Results: ``benchmarks/results/overfit.json``.
"""

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import record
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.demo.default import make
from vfun_cli.demo.media import CLIPS
from vfun_cli.demo.mosaic import show_blocks
from vfun_cli.encoding.encode import outputs_of, prepared
from vfun_cli.families.detect import read_dims
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.clip_needs import Span, usable_frames
from vfun_cli.modeling.adapter import ModelAdapter, SampleRequest, VideoRequest
from vfun_cli.modeling.inputs import AudioSegment, MediaFile, VideoFrames, describe, load_inputs
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.sampling.films import encoded, film_of
from vfun_cli.sampling.loop import Sampler
from vfun_cli.sampling.schedules import make_schedule
from vfun_cli.sampling.source import find_source
from vfun_cli.sampling.weights import LoadOptions, load_model
from vfun_cli.training.objectives import make_objective
from vfun_cli.training.optim import choose_trainable, learning_rate, make_optimizer, trainable

CLIP = 4
"""Two discs that pass each other."""
SIZE, FRAMES = 128, 9
"""Pixels of a side; one frame less where the family counts so."""
WITHOUT_IMAGE = ("hunyuanvideo-t2v", "easyanimate-v5-control")
"""Families that read no picture beside the caption and the control clip."""
SAMPLING_STEPS = 20
BATCH = 2
"""Draws of noise and timestep a step."""
VARIANTS = 8
"""Of what the encoders see: drawn masks and the like."""
GAIN = 10.0
"""dB that the tuned model must be nearer to the clip."""
SHOWN, SIDE = 4, 64
"""Frames of a video in the picture, and their size."""
RATE = 4e-3
STEPS = {
    "wan-s2v": 500, "wan-fun-control": 800, "hunyuanvideo-t2v": 500, "hunyuanvideo-i2v": 500,
    "easyanimate-v5.1-control": 1300, "easyanimate-v5-control": 1100, "cogvideox-fun": 3000,
}  # fmt: skip
"""What each takes to come nearer by ``GAIN``. After 400, Wan and HunyuanVideo were nearer by 8.7 to 10.4 dB,
EasyAnimate by 6.2 and 8.6, CogVideoX by 4.2; a larger rate (1e-2) is no quicker."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One family on the clip."""

    spec: FamilySpec
    adapter: ModelAdapter
    clip: SampleRequest
    video: VideoRequest

    @property
    def pixels(self) -> Tensor:
        """What the video should show, [F, 3, H, W] in [-1, 1]."""
        first = round(self.adapter.heard_from(self.video) * self.video.fps)
        return loaded(self.clip.record["file_path"], self.start, self.clip.frames)[first:]

    @property
    def start(self) -> int:
        """The frame of the file that the clip begins with."""
        return usable_frames(self.clip.total_frames, self.spec.plan.usable_span)[0]


def shown(path: str, start: int, frames: int) -> VideoFrames:
    return VideoFrames(MediaFile(path), tuple(range(start, start + frames)), (SIZE, SIZE))


def loaded(path: str, start: int, frames: int) -> Tensor:
    """[F, 3, H, W] in [-1, 1]."""
    return load_inputs({"clip": shown(path, start, frames)})["clip"].float() / 127.5 - 1


def prepare(family: str, folder: Path) -> Row:
    """The tiny model with a VAE that shows something, the clip, and the request for the same video."""
    spec = families.find(family)
    made = make(spec, folder)
    data, name, demo = made["train_data_dir"], f"{CLIP:08d}", CLIPS[CLIP - 1]
    files = {"file_path": "train/{}.mp4", "control_file_path": "control/{}.mp4", "audio_path": "wav/{}.wav"}
    known = {field.name for field in spec.fields}
    record = {field: str(data / file.format(name)) for field, file in files.items() if field in known}
    frames = FRAMES - (not spec.plan.frame_rule.first_alone)
    span = spec.plan.usable_span
    total = next(n for n in itertools.count(frames) if usable_length(n, span) >= frames)  # there is one place to begin
    key = SampleKey(seed=1, epoch=0, row=0, variants=VARIANTS)
    clip = SampleRequest(
        key=key, record={**record, "text": demo.text, "type": "video"}, kind="video", frames=frames, height=SIZE,
        width=SIZE, stride=1, total_frames=total, fps=demo.fps.as_integer_ratio(),
    )  # fmt: skip
    adapter = load_model(
        find_source(str(made["pretrained_model_name_or_path"]), output_dir=folder),
        LoadOptions(device=torch.device("cpu"), compute_dtype=torch.float32),
    )
    show_blocks(adapter.encoders["vae"])
    video = VideoRequest(
        key=key, prompt=demo.text, negative_prompt="", frames=frames, height=SIZE, width=SIZE, fps=demo.fps,
        guidance=1.0,
    )  # fmt: skip
    return Row(spec=spec, adapter=adapter, clip=clip, video=with_conditions(video, clip, spec))


def usable_length(total: int, span: Span) -> int:
    first, end = usable_frames(total, span)
    return end - first


def with_conditions(video: VideoRequest, clip: SampleRequest, spec: FamilySpec) -> VideoRequest:
    """The request with the row's first frame, control clip and sound, as far as the family reads them."""
    start, _ = usable_frames(clip.total_frames, spec.plan.usable_span)
    if spec.name not in WITHOUT_IMAGE:
        video = replace(video, image=shown(clip.record["file_path"], start, 1))
    if "control_file_path" in clip.record:
        video = replace(video, control=shown(clip.record["control_file_path"], start, clip.frames))
    if "audio_path" in clip.record:
        seconds, rate = clip.frames / Fraction(*clip.fps), 16000
        sound = AudioSegment(MediaFile(clip.record["audio_path"]), Fraction(0), seconds, rate, round(seconds * rate))
        video = replace(video, audio=sound, seconds=seconds)
    return video


def train(row: Row, steps: int) -> list[float]:
    """Losses of each step."""
    spec, adapter = row.spec, row.adapter
    folder, transformer = adapter.options.model_dir, adapter.transformer
    objective = make_objective(spec.model.objective, spec.model.objective_options, folder)
    config = RunConfig(learning_rate=RATE, lr_scheduler="cosine", lr_warmup_steps=steps // 20, adam_weight_decay=0.0)
    choose_trainable(transformer.train(), (".",), spec.model.modules_without_gradient(read_dims(spec, folder)))
    optimizer = make_optimizer(trainable(transformer), config, torch.device("cpu"))
    losses, known = [], dict[str, Any]()
    for step in range(steps):
        keys = [replace(row.clip.key, epoch=step * BATCH + index) for index in range(BATCH)]
        total = 0.0
        for group in of_one_shape(row, keys, known).values():
            found, members = [each for each, _ in group], [key for _, key in group]
            latents, conditions = adapter.assemble(found, members)
            corrupted = objective.corrupt(latents, members)
            mask = conditions.pop("loss_mask", None)
            prediction = adapter.predict(transformer, corrupted.noisy, corrupted.timesteps, conditions)
            loss = objective.loss(prediction, corrupted.target, mask) * len(group) / BATCH
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for group_of in optimizer.param_groups:
            group_of["lr"] = learning_rate(step, config, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    transformer.eval()
    return losses


def of_one_shape(row: Row, keys: Sequence[SampleKey], known: dict[str, Any]) -> dict[Any, list[tuple[Any, SampleKey]]]:
    """The encoders' outputs for each key, those of one shape together; ``known`` keeps them."""
    groups: dict[Any, list[tuple[Any, SampleKey]]] = {}
    for key in keys:
        inputs = type(row.adapter).inputs(replace(row.clip, key=key), row.adapter.options)
        names = {name: f"{each.encoder} {describe(each.lazy, str)}" for name, each in inputs.items()}
        missing = {name: each for name, each in inputs.items() if names[name] not in known}
        for name, output in outputs_of(row.adapter.encoders, [prepared(missing)])[0].items():
            known[names[name]] = output
        outputs = {name: known[names[name]] for name in inputs}
        groups.setdefault(tuple(sorted(inputs)), []).append((outputs, key))
    return groups


def sample(row: Row) -> Tensor:
    """The video [F, 3, H, W] that the model makes."""
    model_dir = row.adapter.options.model_dir
    schedule = partial(make_schedule, row.spec, model_dir, SAMPLING_STEPS)
    sampler = Sampler(adapter=row.adapter, transformer=row.adapter.transformer, schedule=schedule, dtype=torch.float32)
    frames: list[Tensor] = []
    for _ in sampler.steps(encoded(row.adapter, row.video), row.video, frames):
        pass
    return film_of(row.adapter, row.video, frames).pixels


def psnr(found: Tensor, expected: Tensor) -> float:
    return float(10 * torch.log10(4 / (found - expected).square().mean()))


def ceiling(row: Row) -> float:
    """What the VAE makes of the clip itself; its latent frames begin with the first frame, wherever the video's do."""
    pixels = loaded(row.clip.record["file_path"], row.start, FRAMES).transpose(0, 1)[None]
    vae = row.adapter.encoders["vae"]
    return psnr(vae.decode(vae.encode(pixels)), pixels)


def picture(videos: Mapping[str, Mapping[str, Tensor]]) -> Image.Image:
    """A row for each family; frames of the clip, of the base model's video and of the tuned model's."""
    margin, gap, head = 170, 12, 22
    width = margin + 3 * (SHOWN * SIDE + gap)
    image = Image.new("RGB", (width, head + len(videos) * (SIDE + 4)), "white")
    draw = ImageDraw.Draw(image)
    for column, title in enumerate(("the clip", "untuned", "tuned on it")):
        draw.text((margin + column * (SHOWN * SIDE + gap), 6), title, fill="black")
    for line, (family, columns) in enumerate(videos.items()):
        top = head + line * (SIDE + 4)
        draw.text((4, top + SIDE // 2 - 6), family, fill="black")
        for column, pixels in enumerate(columns.values()):
            for place, index in enumerate(torch.linspace(0, len(pixels) - 1, SHOWN).round().int().tolist()):
                frame = ((pixels[index].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
                left = margin + column * (SHOWN * SIDE + gap) + place * SIDE
                image.paste(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BILINEAR), (left, top))
    return image


def measure(family: str, steps: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Numbers of a family, and what the clip, the base and the tuned model look like."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        row = prepare(family, Path(folder))
        wanted, base = row.pixels, sample(row)
        began = time.process_time()
        losses = train(row, steps)
        seconds = time.process_time() - began
        tuned = sample(row)
        numbers = {"base": psnr(base, wanted), "tuned": psnr(tuned, wanted), "ceiling": ceiling(row)}
    numbers |= {
        "gain": numbers["tuned"] - numbers["base"], "first_loss": losses[0],
        "last_loss": sum(losses[-20:]) / len(losses[-20:]), "processor_seconds": seconds,
    }  # fmt: skip
    return {name: round(value, 2) for name, value in numbers.items()}, {"clip": wanted, "base": base, "tuned": tuned}


def main() -> None:
    parser = record.parser("overfit", __doc__)
    parser.add_argument("--families", nargs="+", default=list(families.FAMILIES), choices=list(families.FAMILIES))
    parser.add_argument("--steps", type=int, help="of each; default: what each takes")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time, each on one core")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    if given.smoke:
        given.families, given.steps = given.families[:1], 2
    rows: dict[str, Any] = {}
    videos: dict[str, dict[str, Tensor]] = {}
    columns = ("base", "tuned", "gain", "ceiling", "first_loss", "last_loss", "processor_seconds")
    print(" " * 24, *(f"{name:>18}" for name in columns))
    steps = [given.steps or STEPS[family] for family in given.families]
    settings: dict[str, Any] = {
        "steps": dict(zip(given.families, steps, strict=True)),
        "batch": BATCH,
        "learning_rate": RATE,
        "sampling_steps": SAMPLING_STEPS,
    }
    settings |= {"clip": CLIP, "size": SIZE, "frames": FRAMES, "wanted_gain": GAIN}
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        found = pool.map(measure, given.families, steps)
        for family, (rows[family], videos[family]) in zip(given.families, found, strict=True):
            print(f"{family:24}", *(f"{rows[family][name]:18.2f}" for name in columns), flush=True)
            record.write_result(given, {**settings, "psnr_db": rows})
    if given.picture:
        picture(videos).quantize(128).save(given.picture, optimize=True)
    if short := [family for family, row in rows.items() if row["gain"] < GAIN and given.steps is None]:
        sys.exit(f"nearer by less than {GAIN:.0f} dB: {', '.join(short)}")


if __name__ == "__main__":
    main()
