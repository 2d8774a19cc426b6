"""Wan2.1-Fun Control for the trainer: what is decoded, encoded and given to the transformer."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from vfun_cli.checkpoints.released import tensor_shapes
from vfun_cli.errors import ConfigError
from vfun_cli.families.wan_fun_control import IMAGE_TOKENS, SPEC, TEXT_TOKENS, read_dims
from vfun_cli.families.wan_fun_control.names import live_name
from vfun_cli.families.wan_fun_control.transformer import (
    WanFunControlTransformer,
    blank_transformer,
    transformer_config,
)
from vfun_cli.modeling.adapter import (
    AdapterOptions,
    Branches,
    Conditions,
    Input,
    Inputs,
    SampleRequest,
    VideoRequest,
    WholeVideo,
    both_branches,
    captions_to_sample,
)
from vfun_cli.modeling.clips import clip_of, reference_frame
from vfun_cli.modeling.encoders import clip_vision, umt5, wan_vae
from vfun_cli.modeling.encoders.clip_vae import FRAMES_PER_LATENT, keep, sample_posteriors
from vfun_cli.modeling.encoders.clip_vision import ClipImageEncoder
from vfun_cli.modeling.encoders.frozen import Encoders, EncoderSource, Output
from vfun_cli.modeling.encoders.umt5 import pad_text
from vfun_cli.modeling.inputs import ClipInput, ConstantFrames, Value
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.shaped import Shaped
from vfun_cli.modeling.weights import empty_model, load_weights, read_json, require_parts, safetensors_files

DROP = 0.1
"""Probability, for each condition but the caption on its own, of training a sample without it."""
BLACK = -1.0
REQUIRED_FILES = ("config.json", umt5.WEIGHTS, umt5.TOKENIZER, wan_vae.WEIGHTS, clip_vision.WEIGHTS)
"""What a released directory holds beside the transformer's safetensors."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which conditions one sample trains with; the others are zeros."""

    picture: int
    """Clip frame that serves as start image or reference and that CLIP sees."""
    control: bool
    start: bool
    reference: bool
    image: bool


def choose(key: SampleKey, frames: int, *, train_mode: str | None, control_ref_image: str) -> Choice:
    """Draw one sample's conditions.

    A picture is start image (it is frame 0 of the clip) or reference (it is a later frame), never both. Images keep
    theirs.
    """
    picture = reference_frame(key, frames, control_ref_image)
    with_picture = has_picture(train_mode)
    return Choice(
        picture=picture,
        control=not key.chance("drop control", DROP),
        start=with_picture and picture == 0 and (frames == 1 or not key.chance("drop start", DROP)),
        reference=with_picture and picture > 0 and not key.chance("drop reference", DROP),
        image=with_picture and not key.chance("drop image", DROP),
    )


def has_picture(train_mode: str | None) -> bool:
    """Whether the mode trains with a start image or reference at all."""
    return train_mode != "control"


class WanFunControlAdapter(WholeVideo):
    """Noisy latents beside the latents of a control clip and of a start image, with text, CLIP and a reference."""

    def __init__(
        self,
        *,
        transformer: WanFunControlTransformer,
        encoders: Encoders,
        options: AdapterOptions,
    ) -> None:
        self.transformer: nn.Module = transformer
        self.encoders = encoders
        self.options = options
        self.has_reference = transformer.has_reference
        self.image_dim = int(transformer.config["image_dim"])
        self.text_dim = int(transformer.config["text_dim"])
        self.latent_channels = int(transformer.config["out_channels"])
        if self.has_reference and has_picture(options.train_mode) and options.control_ref_image == "first_frame":
            log.warning(
                "control_ref_image is first_frame: frame 0 trains as start image, so the reference branch (ref_conv) "
                "of this V1.1 checkpoint sees zeros only. --control-ref-image random trains both."
            )

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> "WanFunControlAdapter":
        """The transformer of the released directory in float32, offline; its encoders when they are needed.

        Raises:
            CheckpointError: a file is missing, or is another model's; an encoder's is found out when it is loaded.
        """
        encoders = cls.encoders_of(options)
        transformer = load_transformer(options.model_dir, options.given.transformer)
        return cls(transformer=transformer, encoders=encoders, options=options)

    @classmethod
    def blank(cls, config: Mapping[str, Any], options: AdapterOptions) -> "WanFunControlAdapter":
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return cls(transformer=blank_transformer(config), encoders=Encoders({}, options.device), options=options)

    def blank_conditions(self, latents: Tensor) -> Conditions:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        dtype, pictures = self.options.compute_dtype, latents[:, :, 0]
        return self._conditions(
            text=[{"states": latents.new_empty(TEXT_TOKENS, self.text_dim, dtype=dtype)} for _ in latents],
            control=torch.empty_like(latents),
            start=pictures,
            reference=pictures,
            image=latents.new_empty(len(latents), IMAGE_TOKENS, self.image_dim, dtype=dtype),
        )

    @staticmethod
    def blank_vae(options: AdapterOptions) -> wan_vae.WanVAE:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return wan_vae.WanVAE(empty_model(AutoencoderKLWan), mini_batch=options.vae_mini_batch)

    @classmethod
    def encoders_of(cls, options: AdapterOptions) -> Encoders:
        """VAE, text and image encoder of the released directory.

        Raises:
            CheckpointError: parts are missing; it names all of them.
        """
        folder, dtype = options.model_dir, options.compute_dtype
        require_parts(folder, REQUIRED_FILES, model="Wan2.1-Fun Control")
        dims, clip = read_dims(read_json(folder / SPEC.model.config_file)), folder / clip_vision.WEIGHTS
        return Encoders(
            {
                "vae": wan_vae.source(folder, dtype=dtype, mini_batch=options.vae_mini_batch, given=options.given.vae),
                "text": umt5.source(folder, dtype=dtype, text_len=TEXT_TOKENS, dim=dims.extra["text_dim"]),
                "clip": EncoderSource(
                    load=lambda: ClipImageEncoder.from_file(clip, dtype=dtype), files=(clip,), settings=str(dtype)
                ),
            },
            options.device,
            low_vram=options.low_vram,
        )

    @classmethod
    def inputs(cls, request: SampleRequest, options: AdapterOptions) -> Inputs:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`; the control clip shows the same frames as the clip.

        A row without a control clip trains with a black one.
        """
        pixels = clip_of(request)
        has_control = bool(request.record.get("control_file_path"))
        black = ConstantFrames(BLACK, request.frames, (request.height, request.width))
        return cls.compose(
            pixels,
            clip_of(request, "control_file_path") if has_control else black,
            "" if request.key.chance("text", options.caption_dropout) else request.caption,
            request.key,
            train_mode=options.train_mode,
            control_ref_image=options.control_ref_image,
        )

    @classmethod
    def compose(
        cls,
        pixels: ClipInput,
        control: ClipInput,
        caption: str,
        key: SampleKey,
        *,
        train_mode: str | None,
        control_ref_image: str,
    ) -> Inputs:
        """``clip``, ``control`` and ``text``; ``picture`` and ``image``, if the mode has them.

        These two are one frame of the clip, for the VAE and for CLIP. Whether the sample keeps them is decided later.
        """
        inputs = {
            "clip": Input(encoder="vae", lazy=pixels),
            "control": Input(encoder="vae", lazy=control),
            "text": Input(encoder="text", lazy=Value(caption)),
        }
        if has_picture(train_mode):
            picture = pixels.take([reference_frame(key, pixels.count, control_ref_image)])
            inputs["picture"] = Input(encoder="vae", lazy=picture)
            inputs["image"] = Input(encoder="clip", lazy=picture)
        return inputs

    def assemble(self, outputs: Sequence[Mapping[str, Output]], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
        """Latents [B, 16, F, H, W] float32 and what else ``predict`` reads.

        ``control`` [B, 32, F, H, W]: latents of the control clip, then of the start image in latent frame 0;
        ``text`` [B, 512, text_dim]; ``image`` [B, 257, image_dim]; V1.1 also ``reference`` [B, 16, H, W].
        """
        options = self.options
        latents = _sampled(outputs, keys, "clip")
        frames = 1 + FRAMES_PER_LATENT * (latents.shape[2] - 1)
        choices = [
            choose(key, frames, train_mode=options.train_mode, control_ref_image=options.control_ref_image)
            for key in keys
        ]
        if has_picture(options.train_mode):
            picture = _sampled(outputs, keys, "picture")[:, :, 0]  # [B, 16, H, W]
            image = torch.stack([output["image"]["states"] for output in outputs])
        else:
            picture = torch.zeros_like(latents[:, :, 0])
            image = latents.new_zeros(len(keys), IMAGE_TOKENS, self.image_dim, dtype=options.compute_dtype)

        return latents, self._conditions(
            text=[output["text"] for output in outputs],
            control=keep(_sampled(outputs, keys, "control"), [choice.control for choice in choices]),
            start=keep(picture, [choice.start for choice in choices]),
            reference=keep(picture, [choice.reference for choice in choices]),
            image=keep(image, [choice.image for choice in choices]),
        )

    def _conditions(
        self, *, text: Sequence[Output], control: Tensor, start: Tensor, reference: Tensor, image: Tensor
    ) -> Conditions:
        """What ``predict`` reads, of control latents [B, 16, F, H, W], pictures [B, 16, H, W], and CLIP's states."""
        start_frames = torch.zeros_like(control)
        start_frames[:, :, 0] = start
        conditions = {
            "control": torch.cat([control, start_frames], dim=1),
            "text": pad_text([each["states"] for each in text], TEXT_TOKENS),
            "image": image,
        }
        if self.has_reference:
            conditions["reference"] = reference
        return conditions

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The velocity, [B, 16, F, H, W], of ``noisy`` at ``timesteps`` [B], 0..1000."""
        latents = torch.cat([noisy, conditions["control"]], dim=1)
        return transformer(latents, timesteps, conditions["text"], conditions["image"], conditions.get("reference"))

    def latent_shape(self, request: Shaped) -> tuple[int, int, int, int]:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return self.latent_channels, *SPEC.plan.latent_shape(request)

    @classmethod
    def inputs_to_sample(cls, request: VideoRequest, options: AdapterOptions) -> Inputs:
        """``text``, and of ``control``, ``start`` and ``reference`` what there is.

        CLIP sees the reference if there is one, else the start image.
        """
        clips = {"control": request.control, "start": request.image, "reference": request.reference}
        inputs = {name: Input(encoder="vae", lazy=clip) for name, clip in clips.items() if clip is not None}
        picture = request.reference or request.image
        if picture is not None:
            inputs["image"] = Input(encoder="clip", lazy=picture)
        return inputs | captions_to_sample(request, "text")

    def branches(
        self, outputs: Mapping[str, Output], request: VideoRequest, segment: int, shown: Tensor | None
    ) -> Branches:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`; zeros for what is not given.

        A video of one latent frame takes no start image, as released.

        Raises:
            ConfigError: a reference for a V1.0 model.
        """
        if "reference" in outputs and not self.has_reference:
            raise ConfigError(
                f"the model in {self.options.model_dir} takes no reference: it is a V1.0 model.",
                hint="Give the picture as --image, which the video begins with, or use a V1.1 model.",
            )
        nothing = torch.zeros(1, *self.latent_shape(request), device=self.options.device)
        parts = {
            name: outputs[name]["mean"].unsqueeze(0) if name in outputs else nothing
            for name in ("control", "start", "reference")
        }
        no_image = nothing.new_zeros(1, IMAGE_TOKENS, self.image_dim)
        image = outputs["image"]["states"].unsqueeze(0) if "image" in outputs else no_image
        return both_branches(
            outputs,
            request,
            lambda found: self._conditions(
                text=[found["text"]],
                control=parts["control"],
                start=parts["start"][:, :, 0] * (nothing.shape[2] > 1),
                reference=parts["reference"][:, :, 0],
                image=image,
            ),
        )


def _sampled(outputs: Sequence[Mapping[str, Output]], keys: Sequence[SampleKey], part: str) -> Tensor:
    """Latents [B, 16, F, H, W] of one input, each with noise of its sample's own."""
    return sample_posteriors([output[part] for output in outputs], keys, f"{part} posterior")


def load_transformer(folder: Path, given: Path | None = None) -> WanFunControlTransformer:
    """The transformer of a released directory, float32 on the CPU; its variant is read off the tensors' shapes. With
    other weights if they are given.

    Raises:
        CheckpointError: no such model there, or another one.
    """
    files = safetensors_files(folder)
    config = transformer_config(tensor_shapes(folder), read_json(folder / SPEC.model.config_file))
    model = empty_model(lambda: WanFunControlTransformer(**config), where=str(folder))
    load_weights(model, files, rename=live_name, where=str(folder), transformer=True, given=given)
    return model
