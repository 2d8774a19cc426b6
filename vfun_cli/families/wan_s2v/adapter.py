"""Wan2.2-S2V for the trainer: clips with sound, a control video and history in; what the transformer reads out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families.wan_s2v.sizes import MOTION_FRAMES, MOTION_LATENTS, NUM_AUDIO_LAYERS
from vfun_cli.families.wan_s2v.transformer import load_transformer
from vfun_cli.training.adapter import AdapterOptions, Conditions, Sample, SampleRequest
from vfun_cli.training.clips import frame_indices
from vfun_cli.training.encoders import umt5, wan_vae, wav2vec2
from vfun_cli.training.encoders.placement import encoding_on
from vfun_cli.training.encoders.umt5 import UMT5TextEncoder, pad_text
from vfun_cli.training.encoders.wan_vae import WanVAE, noise_shape
from vfun_cli.training.encoders.wav2vec2 import SpeechEncoder
from vfun_cli.training.media import read_audio, read_frames
from vfun_cli.training.randomness import SampleKey

DROP = 0.1
"""Probability of leaving out the text, the control, the sound, the end of both, or the history."""
FIRST_FRAME_AS_HISTORY = 0.5
"""Probability that a clip without history, referenced by its first frame, gets that frame as its history."""
REFERENCE_FIRST = 0.4
"""``control_ref_image random``: probability of the first frame; the others share the rest."""
REFERENCE_HISTORY = 6
"""Frames of history that the reference frame takes over: two latents."""
BLACK = -1.0
SAMPLE_RATE = 16000
LAYOUT = ("config.json", umt5.WEIGHTS, umt5.TOKENIZER, wan_vae.WEIGHTS, wav2vec2.FOLDER)
"""What a released directory holds beside the transformer's safetensors."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Every random choice about one sample, apart from its start frame and the noise."""

    drop_text: bool
    drop_control: bool
    drop_audio: bool
    drop_history: bool
    silent_from: int | None
    """First frame from which control is black and sound is zero; None keeps both to the end."""
    reference: int
    """Frame of the clip that is the reference image."""
    first_frame_as_history: bool
    """Only read for a clip without history."""


def decide(key: SampleKey, *, frames: int, control_ref_image: str) -> Decisions:
    """The choices for one sample, each drawn by its own purpose so that none depends on another.

    Raises ConfigError for an unknown ``control_ref_image``.
    """
    reference = _reference_frame(key, frames, control_ref_image)
    cut_tail = key.chance("drop-tail", DROP)
    return Decisions(
        drop_text=key.chance("drop-text", DROP),
        drop_control=key.chance("drop-control", DROP),
        drop_audio=key.chance("drop-audio", DROP),
        drop_history=key.chance("drop-history", DROP),
        silent_from=int(key.numpy("tail-start").integers(1, frames)) if cut_tail else None,
        reference=reference,
        first_frame_as_history=reference == 0 and key.chance("first-frame-as-history", FIRST_FRAME_AS_HISTORY),
    )


def _reference_frame(key: SampleKey, frames: int, control_ref_image: str) -> int:
    if control_ref_image not in ("first_frame", "random"):
        raise ConfigError(f"control_ref_image = {control_ref_image!r}. Choose one of: first_frame, random")
    if control_ref_image == "first_frame" or key.chance("reference-first", REFERENCE_FIRST):
        return 0
    return int(key.numpy("reference").integers(1, frames))


@dataclass(frozen=True, kw_only=True)
class MotionPlan:
    """What the VAE encodes for one clip and its history, [F, 3, H, W] each."""

    clip: Tensor
    """Context frames followed by the clip."""
    history: Tensor | None
    """History encoded by itself, or None where it is the context of ``clip``."""

    @property
    def dropped(self) -> bool:
        """Whether the transformer leaves the motion tokens out."""
        return self.history is not None


def plan_motion(
    pixels: Tensor, history: Tensor, has_history: bool, reference: Tensor, decisions: Decisions
) -> MotionPlan:
    """Choose how the clip [F, 3, H, W] meets its history [73, 3, H, W].

    Real history stays untouched, is encoded with the clip and is seen. A clip without history either gets its first
    frame as the end of a grey history, or is encoded behind the reference image and its motion tokens are dropped: the
    first segment of the inference pipeline. (The original's "has motion" test is inverted; see docs/compatibility.md.)
    """
    if decisions.drop_history:
        history, has_history = torch.zeros_like(history), False
    if not has_history and not decisions.first_frame_as_history:
        return MotionPlan(clip=torch.cat([reference, pixels]), history=history)
    if not has_history:
        history = torch.cat([history[:-REFERENCE_HISTORY], reference.expand(REFERENCE_HISTORY, -1, -1, -1)])
    return MotionPlan(clip=torch.cat([history, pixels]), history=None)


def history_indices(start: int, stride: int) -> list[int]:
    """Source frames of the history of a clip that starts at ``start``: one stride apart, in time order, at most 73."""
    return list(range(start % stride, start, stride))[-MOTION_FRAMES:]


class WanS2VAdapter:
    """The transformer, its three encoders, and the dialect between them."""

    def __init__(
        self,
        *,
        transformer: nn.Module,
        vae: WanVAE,
        text: UMT5TextEncoder,
        speech: SpeechEncoder,
        options: AdapterOptions,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.text = text
        self.speech = speech
        self.options = options

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> "WanS2VAdapter":
        """Everything from the released directory, offline; the transformer float32, the speech encoder float32.

        Raises CheckpointError if a file is missing or does not fit, or if the parts do not fit each other.
        """
        folder = options.model_dir
        require_layout(folder)
        transformer: Any = load_transformer(folder)
        vae = WanVAE.from_file(folder / wan_vae.WEIGHTS, dtype=options.compute_dtype, mini_batch=options.vae_mini_batch)
        text = UMT5TextEncoder.from_files(
            folder, dtype=options.compute_dtype, text_len=int(transformer.config["text_len"])
        )
        speech = SpeechEncoder.from_folder(folder / wav2vec2.FOLDER)
        sizes = {
            "text_dim": (transformer.config["text_dim"], text.dim, umt5.WEIGHTS),
            "audio_dim": (transformer.config["audio_dim"], speech.dim, wav2vec2.FOLDER),
            "audio layers": (NUM_AUDIO_LAYERS, speech.num_states, wav2vec2.FOLDER),
        }
        for name, (wanted, found, part) in sizes.items():
            if wanted != found:
                raise CheckpointError(
                    f"{folder}: the transformer reads {name} {wanted}, {part} gives {found}",
                    hint="all parts must come from one released model: download them again",
                )
        return cls(transformer=transformer, vae=vae, text=text, speech=speech, options=options)

    @staticmethod
    def load(request: SampleRequest, options: Mapping[str, Any]) -> Sample:
        """Decode one clip with its history, control and sound.

        pixels [F, 3, H, W]; reference [1, 3, H, W]; control [F, 3, H, W], or None for a row without; motion
        [73, 3, H, W], right-aligned, grey where there is no history; has_motion; audio [samples] at 16 kHz, exactly
        F / clip_fps seconds; clip_fps, an exact Fraction; text.
        Raises MetadataError for media that cannot be decoded, ConfigError for an unknown ``control_ref_image``.
        """
        record, size = request.record, (request.height, request.width)
        decisions = _decide(request.key, request.frames, options)
        clip = frame_indices(request)
        history = history_indices(clip[0], request.stride)
        # One pass over the file: history ends where the clip begins.
        frames = read_frames(record["file_path"], [*history, *clip], *size)
        pixels = frames[len(history) :]
        motion = torch.zeros(MOTION_FRAMES, *pixels.shape[1:])
        if history:
            motion[-len(history) :] = frames[: len(history)]
        control = record.get("control_file_path")
        return {
            "pixels": pixels,
            "reference": pixels[decisions.reference : decisions.reference + 1],
            "control": read_frames(control, clip, *size) if control else None,
            "motion": motion,
            "has_motion": bool(history),
            "audio": clip_audio(request, clip[0]),
            "clip_fps": Fraction(*request.fps) / request.stride,
            "text": "" if decisions.drop_text else record["text"],
        }

    def encode(self, samples: Sequence[Sample], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
        """Latents [B, 16, F, h, w] float32 and the transformer's other inputs, on the device of the options.

        text_embeds [B, text_len, text_dim]; control_latents [B, 16, F, h, w]; ref_latents [B, 16, 1, h, w];
        motion_latents [B, 16, 19, h, w]; audio [B, 25, audio_dim, 4 F] float32; drop_motion [B] bool on the CPU,
        because the transformer's sequence length depends on it.
        """
        ref_image = {"control_ref_image": self.options.control_ref_image}
        decisions = [_decide(key, len(sample["pixels"]), ref_image) for key, sample in zip(keys, samples, strict=True)]
        latents, conditions = self._encode_pixels(samples, keys, decisions)
        conditions["text_embeds"] = self._encode_text([sample["text"] for sample in samples])
        conditions["audio"] = self._encode_audio(samples, decisions)
        return latents, conditions

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's velocity, [B, 16, F, h, w]."""
        prediction: Tensor = transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=conditions["text_embeds"],
            control_latents=conditions["control_latents"],
            ref_latents=conditions["ref_latents"],
            motion_latents=conditions["motion_latents"],
            audio=conditions["audio"],
            drop_motion=conditions["drop_motion"],
        )
        return prediction

    def _encode_pixels(
        self, samples: Sequence[Sample], keys: Sequence[SampleKey], decisions: Sequence[Decisions]
    ) -> tuple[Tensor, Conditions]:
        """The clip's latents and the conditions that are latents too. One pass, so that equal shapes share batches."""
        plans = [
            plan_motion(sample["pixels"], sample["motion"], sample["has_motion"], sample["reference"], decision)
            for sample, decision in zip(samples, decisions, strict=True)
        ]
        controls = [control_clip(sample, decision) for sample, decision in zip(samples, decisions, strict=True)]
        jobs: dict[tuple[int, str], Tensor] = {}
        for index, (sample, plan, control) in enumerate(zip(samples, plans, controls, strict=True)):
            jobs[index, "clip"] = plan.clip
            jobs[index, "reference"] = sample["reference"]
            # 4k frames behind a copy of their first one make 1 + 4k; the copy's latent is cut off below.
            jobs[index, "control"] = torch.cat([control[:1], control])
            if plan.history is not None:
                jobs[index, "history"] = plan.history
        noises = [keys[index].normal(f"posterior-{part}", noise_shape(clip)) for (index, part), clip in jobs.items()]
        with encoding_on(self.vae, self.options.device, low_vram=self.options.low_vram):
            encoded = dict(zip(jobs, self.vae.encode_clips(list(jobs.values()), noises), strict=True))

        def stacked(part: str, frames: slice) -> Tensor:
            return torch.stack([encoded[index, part][:, frames] for index in range(len(samples))])

        contexts = [1 if plan.dropped else MOTION_LATENTS for plan in plans]
        latents = [encoded[index, "clip"][:, context:] for index, context in enumerate(contexts)]
        motion = [
            encoded[index, "history"] if plan.dropped else encoded[index, "clip"][:, :MOTION_LATENTS]
            for index, plan in enumerate(plans)
        ]
        return torch.stack(latents), {
            "control_latents": stacked("control", slice(1, None)),
            "ref_latents": stacked("reference", slice(None)),
            "motion_latents": torch.stack(motion),
            "drop_motion": torch.tensor([plan.dropped for plan in plans]),
        }

    def _encode_text(self, texts: Sequence[str]) -> Tensor:
        with encoding_on(self.text, self.options.device, low_vram=self.options.low_vram):
            return pad_text(self.text.encode(texts), self.text.text_len)

    def _encode_audio(self, samples: Sequence[Sample], decisions: Sequence[Decisions]) -> Tensor:
        """[B, 25, audio_dim, n] float32."""
        features = []
        with encoding_on(self.speech, self.options.device, low_vram=self.options.low_vram):
            for sample, decision in zip(samples, decisions, strict=True):
                per_frame = self.speech.encode(
                    sample["audio"], fps=sample["clip_fps"], frames=len(sample["pixels"])
                )  # [n, 25, audio_dim]
                per_frame[0 if decision.drop_audio else decision.silent_from or len(per_frame) :] = 0
                features.append(per_frame.permute(1, 2, 0))
        return torch.stack(features)


def clip_audio(request: SampleRequest, start: int) -> Tensor:
    """The clip's sound [samples] at 16 kHz, exactly ``frames * stride / fps`` seconds from source frame ``start``.

    The last clip frame lasts a stride, so the sound may end up to ``stride - 1`` source frames behind the file's last
    one; that part is silence.
    """
    fps = Fraction(*request.fps)
    wanted = request.frames * request.stride
    there = min(wanted, request.total_frames - start)
    samples = torch.from_numpy(read_audio(request.record["audio_path"], start / fps, there / fps, SAMPLE_RATE))
    return nn.functional.pad(samples, (0, round(wanted / fps * SAMPLE_RATE) - len(samples)))


def control_clip(sample: Sample, decisions: Decisions) -> Tensor:
    """The control video [F, 3, H, W] that the model sees: black without one, when dropped, or from a cut tail on."""
    if sample["control"] is None or decisions.drop_control:
        return torch.full_like(sample["pixels"], BLACK)
    control: Tensor = sample["control"].clone()
    if decisions.silent_from is not None:
        control[decisions.silent_from :] = BLACK
    return control


def require_layout(folder: Path) -> None:
    """Look for every part before the first gigabyte is read. Raises CheckpointError naming all that are missing."""
    missing = [name for name in LAYOUT if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a Wan2.2-S2V directory: no {', '.join(missing)}",
            hint=f"it holds diffusion_pytorch_model*.safetensors and {', '.join(LAYOUT)}; "
            "vfun train wan-s2v --demo makes a tiny one",
        )


def _decide(key: SampleKey, frames: int, options: Mapping[str, Any]) -> Decisions:
    return decide(key, frames=frames, control_ref_image=options.get("control_ref_image", "first_frame"))
