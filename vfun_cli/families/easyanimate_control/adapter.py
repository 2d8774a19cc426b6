"""EasyAnimate Control for the trainer: what is decoded, encoded and given to the transformer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKLMagvit, EasyAnimateTransformer3DModel
from torch import Tensor, nn

from vfun_cli.errors import ConfigError
from vfun_cli.families.easyanimate_control import CAPTION_TOKENS, V5, V5_1, caption_lengths, complete_config
from vfun_cli.families.easyanimate_control.transformer import build_transformer, load_transformer
from vfun_cli.families.spec import FamilySpec
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
from vfun_cli.modeling.clips import clip_of
from vfun_cli.modeling.encoders.bert_t5 import load_bert, load_t5
from vfun_cli.modeling.encoders.clip_vae import folder_source, keep, sample_posteriors
from vfun_cli.modeling.encoders.frozen import Encoders, Output
from vfun_cli.modeling.encoders.magvit_vae import MagvitVAE, latent_channels
from vfun_cli.modeling.encoders.pretrained import text_source
from vfun_cli.modeling.encoders.qwen2_vl import Qwen2VLText
from vfun_cli.modeling.inputs import ClipInput, Value
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.shaped import Shaped
from vfun_cli.modeling.weights import empty_model, read_json

CONTROL_DROP = 0.20
REFERENCE_DROP = 0.20
"""Independent of each other, per sample (docs/numerics.md, Timesteps, noise and drops)."""

TextEncoders = Mapping[str, tuple[Callable[..., Any], str, str]]
"""By the name of the transformer's argument that reads their output: what loads them, model and tokenizer folder."""


class EasyAnimateControl(WholeVideo):
    """What V5.1 and V5 share; a subclass says how it reads captions."""

    spec: ClassVar[FamilySpec]
    text: ClassVar[TextEncoders]

    def __init__(self, transformer: EasyAnimateTransformer3DModel, encoders: Encoders, options: AdapterOptions) -> None:
        self.transformer: EasyAnimateTransformer3DModel = transformer
        self.encoders = encoders
        self.options = options

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> "EasyAnimateControl":
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`.

        Raises:
            ConfigError: options that this family cannot train with.
            CheckpointError: the directory does not fit.
        """
        folder = options.model_dir
        config = complete_config(read_json(folder / cls.spec.model.config_file))
        _check_family(config, cls.spec, folder)
        encoders = cls.encoders_of(options)
        _check_channels(config, latent_channels(folder / "vae"), cls.train_mode(options.train_mode), folder)
        return cls(load_transformer(folder / "transformer", config, options.given.transformer), encoders, options)

    @classmethod
    def blank(cls, config: Mapping[str, Any], options: AdapterOptions) -> Self:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        transformer = empty_model(lambda: build_transformer(complete_config(config)))
        return cls(transformer, Encoders({}, options.device), options)

    def blank_conditions(self, latents: Tensor) -> Conditions:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        config = self.transformer.config
        output = {
            argument: {"states": latents.new_empty(CAPTION_TOKENS, width, dtype=self.options.compute_dtype)}
            for argument, width in zip(self.text, (config.text_embed_dim, config.text_embed_dim_t5), strict=False)
        }
        reference = latents[:, :, :1] if self.has_reference else None
        return self._conditions([output] * len(latents), torch.empty_like(latents), reference)

    @staticmethod
    def blank_vae(options: AdapterOptions) -> MagvitVAE:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return MagvitVAE(empty_model(AutoencoderKLMagvit), mini_batch=options.vae_mini_batch)

    @classmethod
    def encoders_of(cls, options: AdapterOptions) -> Encoders:
        """``vae``, and the text encoders by the transformer's arguments.

        Raises:
            CheckpointError: a part is missing.
        """
        folder, dtype = options.model_dir, options.compute_dtype
        lengths = caption_lengths(cls.spec.model.settings_beside(folder))
        text = {
            argument: text_source(load, folder / model, folder / tokenizer, dtype=dtype, length=length)
            for (argument, (load, model, tokenizer)), length in zip(cls.text.items(), lengths, strict=False)
        }
        sources = {
            "vae": folder_source(
                MagvitVAE.from_folder,
                folder / "vae",
                dtype=dtype,
                mini_batch=options.vae_mini_batch,
                given=options.given.vae,
            ),
            **text,
        }
        return Encoders(sources, options.device, low_vram=options.low_vram)

    @classmethod
    def train_mode(cls, given: str | None) -> str:
        """The train mode of a run that may not have named one."""
        return given or cls.spec.train_modes[0]

    @classmethod
    def inputs(cls, request: SampleRequest, options: AdapterOptions) -> Inputs:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`; the control clip shows the same frames as the clip."""
        usable = V5_1.plan.usable_span
        caption = "" if request.key.chance("text-drop", options.caption_dropout) else request.caption
        pixels = clip_of(request, usable_span=usable)
        control = clip_of(request, "control_file_path", usable_span=usable)
        return cls.compose(pixels, control, caption, train_mode=cls.train_mode(options.train_mode))

    @classmethod
    def compose(cls, pixels: ClipInput, control: ClipInput, caption: str, *, train_mode: str) -> Inputs:
        """``clip`` and ``control``, each text encoder's caption; ``reference``: the first frame, if the mode has one.

        An image is its own reference, as the released weights were trained.
        """
        clips = {"clip": pixels, "control": control}
        if train_mode == "control_ref":
            clips["reference"] = pixels.take([0])
        return {
            **{name: Input(encoder="vae", lazy=clip) for name, clip in clips.items()},
            **{argument: Input(encoder=argument, lazy=Value(caption)) for argument in cls.text},
        }

    def assemble(self, outputs: Sequence[Mapping[str, Output]], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
        """Latents [B, C, F, H, W] and ``control_latents`` [B, C or 2C, F, H, W], float32; text [B, 256, channels] each.

        The control latents and the reference are each left out of one sample in five.
        """
        control = _drop(_sampled(outputs, keys, "control"), keys, "control-drop", CONTROL_DROP)
        reference = None
        if self.has_reference:
            reference = _drop(_sampled(outputs, keys, "reference"), keys, "reference-drop", REFERENCE_DROP)
        return _sampled(outputs, keys, "clip"), self._conditions(outputs, control, reference)

    @property
    def has_reference(self) -> bool:
        """Whether the transformer reads a reference beside the control clip."""
        return self.train_mode(self.options.train_mode) == "control_ref"

    def _conditions(
        self, outputs: Sequence[Mapping[str, Output]], control: Tensor, reference: Tensor | None
    ) -> Conditions:
        """What ``predict`` reads, of control latents [B, C, F, H, W] and a reference [B, C, 1, H, W].

        The reference lies at latent frame 0, zeros after it.
        """
        conditioning = [control]
        if reference is not None:
            at_first = torch.zeros_like(control)
            at_first[:, :, :1] = reference
            conditioning.append(at_first)
        text = {argument: torch.stack([output[argument]["states"] for output in outputs]) for argument in self.text}
        return {"control_latents": torch.cat(conditioning, dim=1), **text}

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """[B, C, F, H, W] like ``noisy``; everything enters in the dtype of ``noisy``, timesteps as they are."""
        inputs = {name: value.to(noisy) for name, value in conditions.items()}
        prediction: Tensor = transformer(noisy, timesteps, return_dict=False, **inputs)[0]
        return prediction

    def latent_shape(self, request: Shaped) -> tuple[int, int, int, int]:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return int(self.transformer.config.out_channels), *self.spec.plan.latent_shape(request)

    @classmethod
    def inputs_to_sample(cls, request: VideoRequest, options: AdapterOptions) -> Inputs:
        """The prompt for each text encoder, and of ``control`` and ``reference`` what there is."""
        clips = {"control": request.control, "reference": request.image}
        inputs = {name: Input(encoder="vae", lazy=clip) for name, clip in clips.items() if clip is not None}
        return inputs | captions_to_sample(request, *cls.text)

    def branches(
        self, outputs: Mapping[str, Output], request: VideoRequest, segment: int, shown: Tensor | None
    ) -> Branches:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`; zeros for what is not given.

        A picture takes no reference, as released.
        """
        nothing = torch.zeros(1, *self.latent_shape(request), device=self.options.device)
        control = outputs["control"]["mean"].unsqueeze(0) if "control" in outputs else nothing
        reference = nothing[:, :, :1] if self.has_reference else None
        if self.has_reference and "reference" in outputs and request.frames > 1:
            reference = outputs["reference"]["mean"].unsqueeze(0)
        return both_branches(outputs, request, lambda found: self._conditions([found], control, reference))


class EasyAnimateV51(EasyAnimateControl):
    """V5.1: captions through Qwen2-VL, flow matching."""

    spec = V5_1
    text: ClassVar[TextEncoders] = {"encoder_hidden_states": (Qwen2VLText.from_folders, "text_encoder", "tokenizer")}


class EasyAnimateV5(EasyAnimateControl):
    """V5: captions through BERT and mT5, DDPM."""

    spec = V5
    text: ClassVar[TextEncoders] = {
        "encoder_hidden_states": (load_bert, "text_encoder", "tokenizer"),
        "encoder_hidden_states_t5": (load_t5, "text_encoder_2", "tokenizer_2"),
    }
    """In the order in which the transformer joins them."""


def _check_channels(config: Mapping[str, Any], latent: int, train_mode: str, folder: Path) -> None:
    """The train mode decides how many channels enter the transformer."""
    has = config["in_channels"]
    parts = {"control": 2, "control_ref": 3}
    if has == parts[train_mode] * latent:
        return
    fitting = next((mode for mode, count in parts.items() if has == count * latent), None)
    raise ConfigError(
        f"train_mode {train_mode!r} gives the transformer {parts[train_mode] * latent} channels "
        f"(noisy, control{', reference' if train_mode == 'control_ref' else ''}); the model in {folder} reads {has}.",
        hint=f"Use --train-mode {fitting}." if fitting else "Use a model whose name ends in -zh-Control.",
    )


def _check_family(config: Mapping[str, Any], spec: FamilySpec, folder: Path) -> None:
    """V5 has two text streams, V5.1 one: refuse the other family's model before gigabytes are read."""
    other = {V5.name: V5_1.name, V5_1.name: V5.name}[spec.name]
    streams = 2 if config["text_embed_dim_t5"] else 1
    if streams != spec.model.dims.extra["text_streams"]:
        raise ConfigError(
            f"{folder} looks like {other}, not {spec.name}: its transformer reads {streams} text stream(s).",
            hint=f"Train {other}, or name a model of {spec.name}.",
        )


def _sampled(outputs: Sequence[Mapping[str, Output]], keys: Sequence[SampleKey], part: str) -> Tensor:
    """Latents [B, C, f, h, w] of one input, each with its own noise."""
    return sample_posteriors([output[part] for output in outputs], keys, f"vae-{part}")


def _drop(latents: Tensor, keys: Sequence[SampleKey], purpose: str, probability: float) -> Tensor:
    """Zeros instead of some samples' latents, each by its own draw."""
    return keep(latents, [not key.chance(purpose, probability) for key in keys])
