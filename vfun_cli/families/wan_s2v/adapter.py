"""Wan2.2-S2V for the trainer: what is decoded, encoded and given to the transformer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from vfun_cli.families.wan_s2v import SPEC
from vfun_cli.families.wan_s2v.sizes import MOTION_FRAMES, MOTION_LATENTS, NUM_AUDIO_LAYERS, read_dims
from vfun_cli.families.wan_s2v.transformer import empty_transformer, load_transformer
from vfun_cli.modeling.adapter import (
    AdapterOptions,
    Branches,
    Conditions,
    Input,
    Inputs,
    SampleRequest,
    Schedule,
    VideoRequest,
    both_branches,
    captions_to_sample,
)
from vfun_cli.modeling.clips import clip_sound, frame_indices, reference_frame
from vfun_cli.modeling.encoders import umt5, wan_vae, wav2vec2
from vfun_cli.modeling.encoders.clip_vae import sample_posterior
from vfun_cli.modeling.encoders.frozen import Encoders, EncoderSource, Output
from vfun_cli.modeling.encoders.umt5 import pad_text
from vfun_cli.modeling.encoders.wav2vec2 import SpeechEncoder
from vfun_cli.modeling.inputs import (
    ClipInput,
    ConcatenatedClip,
    ConstantFrames,
    LazyInput,
    MediaFile,
    Size,
    TupleInput,
    Value,
    VideoFrames,
    load_inputs,
)
from vfun_cli.modeling.pixels import constant, float_pixels
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.shaped import Shaped
from vfun_cli.modeling.weights import empty_model, read_json, require_parts, require_same

DROP = 0.1
"""Probability of leaving out the control, the sound, the end of both, or the history."""
FIRST_FRAME_AS_HISTORY = 0.5
"""Probability that a clip without history, referenced by its first frame, gets that frame as its history."""
REFERENCE_HISTORY = 6
"""Frames of history that the reference frame takes over: two latents."""
LEAD_IN = 3
"""Frames that a segment behind the reference alone loses at its beginning."""
BLACK = -1.0
GREY = 0.0
LATENTS = ("clip", "reference", "control", "history")
"""Inputs that the VAE reads: control where the row has one, otherwise its latents are zeros, as a video is made without
one; history only where motion is dropped."""
REQUIRED_FILES = ("config.json", umt5.WEIGHTS, umt5.TOKENIZER, wan_vae.WEIGHTS, wav2vec2.FOLDER)
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


def decide(key: SampleKey, *, frames: int, options: AdapterOptions) -> Decisions:
    """The choices for one sample, each drawn by its own purpose so that none depends on another."""
    reference = reference_frame(key, frames, options.control_ref_image)
    cut_tail = key.chance("drop-tail", DROP)
    return Decisions(
        drop_text=key.chance("drop-text", options.caption_dropout),
        drop_control=key.chance("drop-control", DROP),
        drop_audio=key.chance("drop-audio", DROP),
        drop_history=key.chance("drop-history", DROP),
        silent_from=int(key.content.numpy("tail-start").integers(1, frames)) if cut_tail else None,
        reference=reference,
        first_frame_as_history=reference == 0 and key.chance("first-frame-as-history", FIRST_FRAME_AS_HISTORY),
    )


@dataclass(frozen=True, kw_only=True)
class TalkingClip:
    """One clip with what belongs to it; clips are [F, 3, H, W]."""

    pixels: ClipInput
    history: ClipInput | None
    """What came before, at most 73 frames; None at the start of the video."""
    control: ClipInput | None
    audio: LazyInput
    """Mono samples at 16 kHz, exactly as long as the clip."""
    fps: Fraction
    """Frames of the clip a second."""
    text: str
    frames: int
    size: Size


def talking_clip(request: SampleRequest) -> TalkingClip:
    """The clip, its history, its control video of the same frames, and its sound."""
    size = (request.height, request.width)
    clip = frame_indices(request)
    video = MediaFile(request.record["file_path"])
    history = history_indices(clip[0], request.stride)
    control = request.record.get("control_file_path")
    return TalkingClip(
        pixels=VideoFrames(video, tuple(clip), size),
        history=VideoFrames(video, tuple(history), size) if history else None,
        control=VideoFrames(MediaFile(control), tuple(clip), size) if control else None,
        audio=clip_sound(request, "audio_path", clip[0]),
        fps=Fraction(*request.fps) / request.stride,
        text=request.caption,
        frames=request.frames,
        size=size,
    )


def compose(source: TalkingClip, decisions: Decisions) -> Inputs:
    """What the encoders read of a clip, as decided."""
    reference = source.pixels.take([decisions.reference])
    motion = motion_clips(source, reference, decisions)
    clips = {**motion, "reference": reference}
    if source.control is not None:
        clips["control"] = behind_its_first_frame(control_clip(source.control, decisions, source.size))
    return {
        **{name: Input(encoder="vae", lazy=clip) for name, clip in clips.items()},
        "text": Input(encoder="text", lazy=Value("" if decisions.drop_text else source.text)),
        "audio": Input(encoder="speech", lazy=TupleInput((source.audio, Value(source.fps), Value(source.frames)))),
    }


def behind_its_first_frame(clip: ClipInput) -> ConcatenatedClip:
    """4k frames behind a copy of their first one, which make whole latents; the copy's latent is cut off later."""
    return ConcatenatedClip((clip.take([0]), clip))


def segments(request: VideoRequest) -> int:
    """How many segments are needed to show as long as the sound is heard."""
    return max(1, math.ceil(request.seconds * request.fps / request.frames))


def motion_clips(source: TalkingClip, reference: ClipInput, decisions: Decisions) -> dict[str, LazyInput]:
    """How the clip meets its history: ``clip`` is the context frames followed by the clip.

    Real history stays untouched, is encoded with the clip and is seen; it is right-aligned in 73 frames, grey where
    there is none. A clip without history either gets its first frame as the end of a grey history, or is encoded behind
    the reference image and its motion tokens are dropped (there is a ``history`` of its own then): the first segment of
    the inference pipeline. (The original's "has motion" test is inverted; see docs/compatibility.md.)
    """
    pixels, size = source.pixels, source.size
    if source.history is not None and not decisions.drop_history:
        missing = MOTION_FRAMES - source.history.count
        grey = (ConstantFrames(GREY, missing, size),) if missing else ()
        return {"clip": ConcatenatedClip((*grey, source.history, pixels))}
    if decisions.first_frame_as_history:
        grey_first = ConstantFrames(GREY, MOTION_FRAMES - REFERENCE_HISTORY, size)
        return {"clip": ConcatenatedClip((grey_first, reference.take([0] * REFERENCE_HISTORY), pixels))}
    return {"clip": ConcatenatedClip((reference, pixels)), "history": ConstantFrames(GREY, MOTION_FRAMES, size)}


def history_indices(start: int, stride: int) -> list[int]:
    """Source frames of the history of a clip that starts at ``start``: one stride apart, in time order, at most 73."""
    return list(range(start % stride, start, stride))[-MOTION_FRAMES:]


class WanS2VAdapter:
    """Noisy latents with speech, a reference image, a control video, history and a caption."""

    def __init__(self, *, transformer: nn.Module, encoders: Encoders, options: AdapterOptions) -> None:
        self.transformer = transformer
        self.text_len = int(cast(Any, transformer).config["text_len"])
        self.encoders = encoders
        self.options = options

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> "WanS2VAdapter":
        """The transformer of the released directory in float32, offline; its encoders when they are needed.

        Raises:
            CheckpointError: a file is missing or does not fit; of an encoder that does not fit, when it is loaded.
        """
        encoders = cls.encoders_of(options)
        transformer = load_transformer(options.model_dir, options.given.transformer)
        return cls(transformer=transformer, encoders=encoders, options=options)

    @classmethod
    def blank(cls, config: Mapping[str, Any], options: AdapterOptions) -> "WanS2VAdapter":
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        encoders = Encoders({}, options.device)
        return cls(transformer=empty_transformer(config), encoders=encoders, options=options)

    def blank_conditions(self, latents: Tensor) -> Conditions:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        clips, channels, frames, *size = latents.shape
        config = cast(Any, self.transformer).config
        return {
            "control_latents": torch.empty_like(latents),
            "ref_latents": latents.new_empty(clips, channels, 1, *size),
            "motion_latents": latents.new_empty(clips, channels, MOTION_LATENTS, *size),
            "drop_motion": (False,) * clips,
            "text_embeds": latents.new_empty(
                clips, self.text_len, config["text_dim"], dtype=self.options.compute_dtype
            ),
            "audio": latents.new_empty(clips, NUM_AUDIO_LAYERS, config["audio_dim"], 4 * frames),
        }

    @staticmethod
    def blank_vae(options: AdapterOptions) -> wan_vae.WanVAE:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return wan_vae.WanVAE(empty_model(AutoencoderKLWan), mini_batch=options.vae_mini_batch)

    @classmethod
    def encoders_of(cls, options: AdapterOptions) -> Encoders:
        """VAE, text and speech encoder of the released directory; the last one in float32 always.

        Raises:
            CheckpointError: parts are missing; it names all of them.
        """
        folder, dtype = options.model_dir, options.compute_dtype
        require_parts(folder, REQUIRED_FILES, model="Wan2.2-S2V")
        config = read_dims(read_json(folder / SPEC.model.config_file)).extra

        def load_speech() -> SpeechEncoder:
            encoder = SpeechEncoder.from_folder(folder / wav2vec2.FOLDER)
            require_same(folder, "audio_dim", config["audio_dim"], encoder.dim, wav2vec2.FOLDER)
            require_same(folder, "audio layers", NUM_AUDIO_LAYERS, encoder.num_states, wav2vec2.FOLDER)
            return encoder

        return Encoders(
            {
                "vae": wan_vae.source(folder, dtype=dtype, mini_batch=options.vae_mini_batch, given=options.given.vae),
                "text": umt5.source(folder, dtype=dtype, text_len=config["text_len"], dim=config["text_dim"]),
                "speech": EncoderSource(load=load_speech, files=(folder / wav2vec2.FOLDER,), settings="float32"),
            },
            options.device,
            low_vram=options.low_vram,
        )

    @staticmethod
    def inputs(request: SampleRequest, options: AdapterOptions) -> Inputs:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return compose(
            talking_clip(request),
            decide(request.key, frames=request.frames, options=options),
        )

    def assemble(self, outputs: Sequence[Mapping[str, Output]], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
        """Latents [B, 16, F, h, w] float32 and the transformer's other inputs, on the device of the options.

        text_embeds [B, text_len, text_dim]; control_latents [B, 16, F, h, w]; ref_latents [B, 16, 1, h, w];
        motion_latents [B, 16, 19, h, w]; audio [B, 25, audio_dim, 4 F] float32; drop_motion, B booleans: the
        transformer's sequence length depends on them, and DDP and FSDP would move a tensor to the device.
        """
        dropped = tuple("history" in output for output in outputs)
        drawn = [
            {part: sample_posterior(output[part], key, f"posterior-{part}") for part in LATENTS if part in output}
            for output, key in zip(outputs, keys, strict=True)
        ]
        contexts = [1 if drop else MOTION_LATENTS for drop in dropped]
        motion = [each["history"] if "history" in each else each["clip"][:, :MOTION_LATENTS] for each in drawn]
        latents = torch.stack([each["clip"][:, context:] for each, context in zip(drawn, contexts, strict=True)])
        return latents, self._conditions(
            text=[output["text"] for output in outputs],
            audio=[self._speech_features(output, key) for output, key in zip(outputs, keys, strict=True)],
            control=[
                each["control"][:, 1:] if "control" in each else torch.zeros_like(clip)
                for each, clip in zip(drawn, latents, strict=True)
            ],
            reference=[each["reference"] for each in drawn],
            motion=motion,
            drop_motion=dropped,
        )

    def _conditions(
        self,
        *,
        text: Sequence[Output],
        audio: Sequence[Tensor],
        control: Sequence[Tensor],
        reference: Sequence[Tensor],
        motion: Sequence[Tensor],
        drop_motion: tuple[bool, ...],
    ) -> Conditions:
        """What ``predict`` reads, from the parts of each sample."""
        return {
            "control_latents": torch.stack(list(control)),
            "ref_latents": torch.stack(list(reference)),
            "motion_latents": torch.stack(list(motion)),
            "drop_motion": drop_motion,
            "text_embeds": pad_text([each["states"] for each in text], self.text_len),
            "audio": torch.stack(list(audio)),
        }

    def _speech_features(self, output: Mapping[str, Output], key: SampleKey) -> Tensor:
        """Speech features [25, audio_dim, n] float32, silent when dropped or from a cut tail on."""
        features = output["audio"]["features"].clone()  # [n, 25, audio_dim]
        decisions = decide(key, frames=len(features), options=self.options)
        features[0 if decisions.drop_audio else decisions.silent_from or len(features) :] = 0
        return features.permute(1, 2, 0)

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

    def latent_shape(self, request: Shaped) -> tuple[int, int, int, int]:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return wan_vae.Z_DIM, *SPEC.plan.latent_shape(request)

    @classmethod
    def inputs_to_sample(cls, request: VideoRequest, options: AdapterOptions) -> Inputs:
        """``text``; ``reference``; ``audio``, the whole sound; of a control clip ``control 0`` and so on by segment.

        A control clip that is shorter than the sound is black from there on, a longer one is cut.
        """
        assert request.image is not None and request.audio is not None
        count = segments(request)
        frames = count * request.frames
        sound = TupleInput((request.audio, Value(request.fps), Value(frames)))
        inputs = {
            "reference": Input(encoder="vae", lazy=request.image),
            "audio": Input(encoder="speech", lazy=sound),
            **captions_to_sample(request, "text"),
        }
        if request.control is not None:
            shown = request.control.take(range(min(frames, request.control.count)))
            black = ConstantFrames(BLACK, frames - shown.count, (request.height, request.width))
            whole = ConcatenatedClip((shown, black) if black.frames else (shown,))
            for segment in range(count):
                part = whole.take(range(segment * request.frames, (segment + 1) * request.frames))
                inputs[f"control {segment}"] = Input(encoder="vae", lazy=behind_its_first_frame(part))
        return inputs

    def segments(self, request: VideoRequest) -> int:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return segments(request)

    def branches(
        self, outputs: Mapping[str, Output], request: VideoRequest, segment: int, shown: Tensor | None
    ) -> Branches:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`; without guidance's text and sound in the other one.

        The first segment does not see its history, which is grey, unless it starts from the reference; every later one
        sees the frames before it. Without a control clip its latents are zeros, as released.
        """
        nothing = torch.zeros(self.latent_shape(request), device=self.options.device)
        reference = outputs["reference"]["mean"]
        dropped = shown is None and not request.start_from_ref
        if dropped:  # the motion is not looked at
            motion = nothing[:, :1].expand(-1, MOTION_LATENTS, -1, -1)
        else:
            motion = self.encoders.run("vae", [self._history(request, shown)])[0]["mean"]
        first = segment * request.frames
        features = outputs["audio"]["features"][first : first + request.frames].permute(1, 2, 0)
        control = outputs.get(f"control {segment}")
        both = both_branches(
            outputs,
            request,
            lambda found: self._conditions(
                text=[found["text"]],
                audio=[features],
                control=[nothing if control is None else control["mean"][:, 1:]],
                reference=[reference],
                motion=[motion],
                drop_motion=(dropped,),
            ),
        )
        if both.unconditional is not None:
            both.unconditional["audio"] = torch.zeros_like(both.unconditional["audio"])
        return both

    def _history(self, request: VideoRequest, shown: Tensor | None) -> Tensor:
        """The 73 frames before a segment, [73, 3, H, W]: grey, then the image if the video starts from it, then those
        made so far."""
        size = (request.height, request.width)
        before = [constant(GREY, MOTION_FRAMES, *size).to(self.options.device)]
        if request.start_from_ref:
            assert request.image is not None
            still = float_pixels(load_inputs({"image": request.image})["image"], self.options.device)
            before.append(still.expand(REFERENCE_HISTORY, -1, -1, -1))
        if shown is not None:
            before.append(shown[-MOTION_FRAMES:].to(self.options.device))
        return torch.cat(before)[-MOTION_FRAMES:]

    def begin(self, noise: Tensor, branches: Branches, request: VideoRequest, schedule: Schedule) -> Tensor:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return noise

    def pixels(self, latents: Tensor, branches: Branches, request: VideoRequest) -> Tensor:
        """The frames of a segment, decoded behind its history in one pass: the decoder carries its state along.

        A segment that has not seen its history is decoded behind the reference, and loses ``LEAD_IN`` frames, which
        come out of that.
        """
        seen = branches.conditional
        (dropped,) = seen["drop_motion"]
        before = seen["ref_latents" if dropped else "motion_latents"]
        frames = self.encoders.decode("vae", torch.cat([before.to(latents), latents], dim=2))[0].transpose(0, 1)
        return frames[-request.frames + LEAD_IN * dropped :]

    def heard_from(self, request: VideoRequest) -> Fraction:
        """Frame k of the video belongs to the sound of frame k + ``LEAD_IN``, unless it starts from the reference."""
        return Fraction(0) if request.start_from_ref else LEAD_IN / request.fps


def control_clip(control: ClipInput, decisions: Decisions, size: Size) -> ClipInput:
    """The control video [F, 3, H, W] that the model sees: black when it is dropped, or from a cut tail on."""
    seen = 0 if decisions.drop_control else decisions.silent_from
    if seen is None:
        return control
    black = ConstantFrames(BLACK, control.count - seen, size)
    return ConcatenatedClip((control.take(range(seen)), black)) if seen else black
