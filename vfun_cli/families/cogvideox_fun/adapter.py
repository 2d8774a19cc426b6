"""CogVideoX-Fun for the trainer: what is decoded, encoded and given to the transformer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn
from torch.nn import functional as F

from vfun_cli.errors import ConfigError
from vfun_cli.families.cogvideox_fun import SPEC, read_dims
from vfun_cli.families.cogvideox_fun.masks import draw_mask
from vfun_cli.families.cogvideox_fun.transformer import CogVideoXFunTransformer, build_transformer, load_transformer
from vfun_cli.families.spec import steps_of_edit
from vfun_cli.modeling.adapter import (
    AdapterOptions,
    Branches,
    Conditions,
    Input,
    Inputs,
    SampleRequest,
    Schedule,
    VideoRequest,
    WholeVideo,
    both_branches,
    captions_to_sample,
)
from vfun_cli.modeling.clips import clip_of
from vfun_cli.modeling.encoders.bert_t5 import load_t5
from vfun_cli.modeling.encoders.clip_vae import folder_source, sample_posteriors
from vfun_cli.modeling.encoders.cogvideox_vae import CogVideoXVAE, read_scale
from vfun_cli.modeling.encoders.frozen import Encoders, Output
from vfun_cli.modeling.encoders.pretrained import text_source
from vfun_cli.modeling.inputs import ClipInput, ConcatenatedClip, ConstantFrames, Decoder, LazyInput, Size, Value
from vfun_cli.modeling.pixels import float_pixels
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.shaped import Shaped
from vfun_cli.modeling.transfer import upload
from vfun_cli.modeling.weights import empty_model, read_json

SAMPLED_STRENGTH = 0.0563
"""Of the noise on known pixels when a video is made: the mean of what training draws."""
EMPTY_DROP = 0.9
"""How often a clip without any known pixel gets zeros instead of the latents of an all-masked clip."""
MASKED = -1.0
"""What pixels to be generated are set to: black."""
ADD_NOISE_KEY = "add_noise_in_inpaint_model"
"""The transformer's setting that its known pixels get noise."""


@dataclass(frozen=True)
class DrawnMask:
    """Where the model generates: bool [F, 1, H, W].

    It is drawn on the clip as it is trained: the original draws it on a longer one and cuts it, so masks lose their
    known last frames.
    """

    key: SampleKey
    frames: int
    size: Size

    def load(self, decoder: Decoder) -> Tensor:
        """See :class:`~vfun_cli.modeling.inputs.LazyInput`."""
        return torch.from_numpy(draw_mask(self.key.numpy("mask"), self.frames, *self.size)).unsqueeze(1)


@dataclass(frozen=True)
class FirstAndLast:
    """What is generated between given frames: bool [F, 1, H, W], False in the first and, if it is given, the last."""

    frames: int
    size: Size
    first: bool
    last: bool

    def load(self, decoder: Decoder) -> Tensor:
        """See :class:`~vfun_cli.modeling.inputs.LazyInput`."""
        mask = torch.ones(self.frames, 1, *self.size, dtype=torch.bool)
        mask[0] = not self.first
        mask[-1] = mask[-1] & (not self.last)
        return mask


@dataclass(frozen=True)
class KnownPixels:
    """The pixels that the model is given, float32 [F, 3, H, W]: black where it generates."""

    pixels: ClipInput
    mask: LazyInput
    noise: SampleKey | None
    """Whose noise they get; None: none."""
    strength: float | None = None
    """Of the noise; None: drawn, as for training."""

    def load(self, decoder: Decoder) -> Tensor:
        """See :class:`~vfun_cli.modeling.inputs.LazyInput`."""
        known = float_pixels(self.pixels.load(decoder)).masked_fill(self.mask.load(decoder), MASKED)
        return (
            known if self.noise is None else add_noise(known.transpose(0, 1), self.noise, self.strength).transpose(0, 1)
        )


class CogVideoXFunAdapter(WholeVideo):
    """Noisy latents beside a mask and the latents of the known pixels, with a caption."""

    def __init__(
        self, *, transformer: CogVideoXFunTransformer, encoders: Encoders, scale: float, options: AdapterOptions
    ) -> None:
        self.transformer = transformer
        self.encoders = encoders
        self.scale = scale
        """What the VAE's latents are multiplied with, and the mask like them."""
        self.options = options
        self.inpaint = train_mode(options.train_mode) == "inpaint"
        self._check_channels()

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> "CogVideoXFunAdapter":
        """The transformer of the released directory in float32, offline; its encoders when they are needed.

        Raises:
            CheckpointError: a file is missing, or is another model's.
            ConfigError: the model was not made for the train mode.
        """
        folder = options.model_dir
        encoders = cls.encoders_of(options)  # first: it names what is missing before gigabytes are read
        return cls(
            scale=read_scale(folder / "vae"),
            encoders=encoders,
            transformer=load_transformer(
                folder / "transformer", read_json(folder / SPEC.model.config_file), options.given.transformer
            ),
            options=options,
        )

    @classmethod
    def blank(cls, config: Mapping[str, Any], options: AdapterOptions) -> "CogVideoXFunAdapter":
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        transformer = empty_model(lambda: build_transformer(config))
        return cls(transformer=transformer, encoders=Encoders({}, options.device), scale=1.0, options=options)

    def blank_conditions(self, latents: Tensor) -> Conditions:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        config = self.transformer.config
        states = latents.new_empty(config.max_text_seq_length, config.text_embed_dim, dtype=self.options.compute_dtype)
        inpaint = torch.cat([latents[:, :1], latents], dim=1) if self.inpaint else None
        return self._conditions([{"text": {"states": states}}] * len(latents), inpaint)

    @staticmethod
    def blank_vae(options: AdapterOptions) -> CogVideoXVAE:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return CogVideoXVAE(empty_model(AutoencoderKLCogVideoX), mini_batch=options.vae_mini_batch)

    @classmethod
    def encoders_of(cls, options: AdapterOptions) -> Encoders:
        """``vae`` and ``text``.

        Raises:
            CheckpointError: a part is missing.
        """
        folder, dtype = options.model_dir, options.compute_dtype
        length = read_dims(read_json(folder / SPEC.model.config_file)).extra["text_tokens"]
        sources = {
            "vae": folder_source(
                CogVideoXVAE.from_folder,
                folder / "vae",
                dtype=dtype,
                mini_batch=options.vae_mini_batch,
                given=options.given.vae,
            ),
            "text": text_source(load_t5, folder / "text_encoder", folder / "tokenizer", dtype=dtype, length=length),
        }
        return Encoders(sources, options.device, low_vram=options.low_vram)

    @staticmethod
    def inputs(request: SampleRequest, options: AdapterOptions) -> Inputs:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`; ``options`` has the spec's ``input_settings``."""
        key = request.key
        caption = "" if key.chance("text-drop", options.caption_dropout) else request.caption
        if train_mode(options.train_mode) != "inpaint":
            return compose(clip_of(request), caption)
        mask = DrawnMask(key.content, request.frames, (request.height, request.width))
        return compose(
            clip_of(request), caption, mask, noise=key.content if options.model_settings[ADD_NOISE_KEY] else None
        )

    def assemble(self, outputs: Sequence[Mapping[str, Output]], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
        """Latents [B, 16, f, h, w] float32; ``text`` [B, 226, channels], to inpaint also ``inpaint`` [B, 17, f, h, w].

        The clips of a micro-batch have one shape.
        """
        latents = sample_posteriors([output["clip"] for output in outputs], keys, "vae-clip")
        return latents, self._conditions(outputs, self._inpaint(outputs, keys) if self.inpaint else None)

    def _conditions(self, outputs: Sequence[Mapping[str, Output]], inpaint: Tensor | None) -> Conditions:
        """What ``predict`` reads, with the channels of an inpainting model [B, 17, f, h, w]."""
        conditions: Conditions = {"text": torch.stack([output["text"]["states"] for output in outputs])}
        if inpaint is not None:
            conditions["inpaint"] = inpaint
        return conditions

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """[B, 16, f, h, w] like ``noisy``; everything enters in the dtype of ``noisy``, timesteps as they are."""
        parts = [noisy, conditions["inpaint"].to(noisy)] if self.inpaint else [noisy]
        frames_first = torch.cat(parts, dim=1).transpose(1, 2)  # [B, f, 33, h, w], as CogVideoX has it
        prediction: Tensor = transformer(frames_first, conditions["text"].to(noisy), timesteps)
        return prediction.transpose(1, 2)

    def _inpaint(self, outputs: Sequence[Mapping[str, Output]], keys: Sequence[SampleKey]) -> Tensor:
        """Mask and latents of the known pixels, [B, 17, f, h, w] float32; zeros for most clips without any."""
        masks = [output["mask"]["value"] for output in outputs]  # [F, 1, H, W] each
        known = sample_posteriors([output["known"] for output in outputs], keys, "vae-known")
        inpaint = join(known, torch.stack(masks).transpose(1, 2), self.scale)
        # Decided on the device: reading on the host whether a mask leaves anything known would wait for it.
        # Where nothing is left out, zeros always stand for a clip of which nothing is known, as when a video is made.
        zeros = [not key.drops or key.chance("empty-drop", EMPTY_DROP) for key in keys]
        dropped = upload(torch.tensor(zeros), inpaint.device)
        empty = torch.stack([mask.all() for mask in masks])
        return inpaint * ~(empty & dropped).view(-1, 1, 1, 1, 1)

    def latent_shape(self, request: Shaped) -> tuple[int, int, int, int]:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return int(self.transformer.config.out_channels), *SPEC.plan.latent_shape(request)

    @classmethod
    def inputs_to_sample(cls, request: VideoRequest, options: AdapterOptions) -> Inputs:
        """``text``; ``mask`` and ``known`` where pixels are given; ``edit``, if a clip is edited."""
        inputs = captions_to_sample(request, "text")
        if request.edit is not None:
            inputs["edit"] = Input(encoder="vae", lazy=request.edit)
        known = known_pixels(request)
        if known is None:
            return inputs
        pixels, mask = known
        noise = request.key if options.model_settings[ADD_NOISE_KEY] else None
        given = KnownPixels(pixels, mask, noise, SAMPLED_STRENGTH)
        return inputs | {"mask": Input(encoder=None, lazy=mask), "known": Input(encoder="vae", lazy=given)}

    def branches(
        self, outputs: Mapping[str, Output], request: VideoRequest, segment: int, shown: Tensor | None
    ) -> Branches:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`; zeros where nothing is given.

        Raises:
            ConfigError: pixels for a model that takes none.
        """
        if not self.inpaint and "known" in outputs:
            raise ConfigError(
                f"the model in {self.options.model_dir} takes no images: it makes videos of text alone.",
                hint="Leave out --image, or use an InP model.",
            )
        inpaint = None
        if self.inpaint:
            channels, *size = self.latent_shape(request)
            inpaint = torch.zeros(1, 1 + channels, *size, device=self.options.device)
            if "known" in outputs:
                mask = outputs["mask"]["value"].transpose(0, 1).unsqueeze(0)
                inpaint = join(outputs["known"]["mean"].unsqueeze(0), mask, self.scale)
        both = both_branches(outputs, request, lambda found: self._conditions([found], inpaint))
        if "edit" in outputs:
            # Sampled as released: the mean of a posterior is smoother than what the model was trained on.
            both.conditional["edit"] = sample_posteriors([outputs["edit"]], [request.key], "edit posterior")
        return both

    def begin(self, noise: Tensor, branches: Branches, request: VideoRequest, schedule: Schedule) -> Tensor:
        """Noise; or of a clip that is edited, its latents as noisy as the step they enter at."""
        if "edit" not in branches.conditional or request.strength >= 1:
            return noise
        schedule.last(steps_of_edit(len(schedule.timesteps), request.strength))
        return schedule.noised(branches.conditional["edit"], noise)

    def _check_channels(self) -> None:
        """Refuse a train mode that gives the transformer other channels than it reads."""
        latent = self.transformer.config.out_channels
        modes = {"normal": latent, "inpaint": 2 * latent + 1}
        mode, reads = "inpaint" if self.inpaint else "normal", self.transformer.config.in_channels
        if reads == modes[mode]:
            return
        fitting = next((mode for mode, channels in modes.items() if channels == reads), None)
        raise ConfigError(
            f"train_mode {mode!r} gives the transformer {modes[mode]} channels"
            f" ({'noisy, mask and known latents' if self.inpaint else 'the noisy latents alone'}), but the model in "
            f"{self.options.model_dir} reads {reads}"
            f"{': an InP model is trained to inpaint, text to video included' if fitting == 'inpaint' else ''}.",
            hint=f"Use --train-mode {fitting}." if fitting else "Use a CogVideoX-Fun InP model.",
        )


def known_pixels(request: VideoRequest) -> tuple[ClipInput, LazyInput] | None:
    """The clip that a video's known pixels come from, and where it is generated; None: everywhere."""
    size = (request.height, request.width)
    if request.edit is not None:
        return None if request.edit_mask is None else (request.edit, request.edit_mask)
    if request.image is None and request.end_image is None:
        return None
    first = request.image or ConstantFrames(MASKED, 1, size)
    between = ConstantFrames(MASKED, request.frames - 1 - (request.end_image is not None), size)
    last = () if request.end_image is None else (request.end_image,)
    mask = FirstAndLast(request.frames, size, first=request.image is not None, last=request.end_image is not None)
    return ConcatenatedClip((first, between, *last)), mask


def compose(
    pixels: ClipInput, caption: str, mask: LazyInput | None = None, *, noise: SampleKey | None = None
) -> Inputs:
    """``clip`` and ``text``; with a mask also ``mask``, and ``known``: the known pixels, with the noise of a key."""
    inputs = {"clip": Input(encoder="vae", lazy=pixels), "text": Input(encoder="text", lazy=Value(caption))}
    if mask is None:
        return inputs
    known = KnownPixels(pixels, mask, noise)
    return inputs | {"mask": Input(encoder=None, lazy=mask), "known": Input(encoder="vae", lazy=known)}


def train_mode(given: str | None) -> str:
    """The train mode of a run that may not have named one."""
    return given or SPEC.train_modes[0]


def add_noise(known: Tensor, key: SampleKey, strength: float | None = None) -> Tensor:
    """Known pixels [3, F, H, W] as V1.1 and later want them: a little noisy, by exp(N(-3, 0.5)) times standard normal.

    A ``strength`` that is given takes the place of the drawn one.

    Pixels that are exactly black stay so, whether masked or not: that is how the original tells them apart.
    """
    if strength is None:
        strength = torch.tensor(float(key.numpy("known-strength").normal(-3.0, 0.5))).exp().item()
    noise = key.normal("known-noise", tuple(known.shape)).to(known) * strength
    return torch.where(known == MASKED, known, known + noise)


def join(latents: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The known part of the clip, resized to latents, then the latents of its pixels: [B, 1 + 16, f, h, w].

    latents: [B, 16, f, h, w], scaled. mask: [B, 1, F, H, W], 1 where the model generates.
    Frame 0 becomes latent 0 and every later four frames one latent; the mask is scaled like the latents, in training
    and inference alike.
    """
    frames, *size = latents.shape[2:]
    known = 1 - mask.to(latents)
    parts = [F.interpolate(known[:, :, :1], (1, *size), mode="trilinear", align_corners=False)]
    if frames > 1:
        parts.append(F.interpolate(known[:, :, 1:], (frames - 1, *size), mode="trilinear", align_corners=False))
    return torch.cat([torch.cat(parts, dim=2) * scale, latents], dim=1)
