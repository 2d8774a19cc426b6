"""HunyuanVideo for the trainer: what is decoded, encoded and given to the transformer."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from vfun_cli.errors import CheckpointError
from vfun_cli.families.hunyuanvideo import T2V
from vfun_cli.families.hunyuanvideo.comfyui import original_location
from vfun_cli.families.hunyuanvideo.sizes import (
    IMAGE_INTERLEAVE,
    PROMPT_TOKENS,
    SHIFT,
    TEXT_TOKENS,
    Condition,
    check_config,
    dims_reader,
)
from vfun_cli.modeling.adapter import (
    NEGATIVE,
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
from vfun_cli.modeling.encoders.clip_text import ClipPooledText
from vfun_cli.modeling.encoders.clip_vae import folder_source, sample_posteriors
from vfun_cli.modeling.encoders.frozen import Encoders, EncoderSource, Output
from vfun_cli.modeling.encoders.hunyuan_vae import HunyuanVAE
from vfun_cli.modeling.encoders.llama_prompt import LlamaPrompt
from vfun_cli.modeling.encoders.llava_prompt import LlavaPrompt
from vfun_cli.modeling.inputs import ClipInput, ConstantFrames, TupleInput, Value
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.shaped import Shaped
from vfun_cli.modeling.weights import empty_model, load_diffusers, read_json, require_parts

SAMPLED_GUIDANCE = 6.0
"""The embedded guidance that videos of these guidance-distilled models are made at."""
IMAGE_IN_NOISE = 0.001
"""How much of the image the noise holds that a video starts from."""
BLACK = -1.0
REQUIRED_FILES = (
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
    "text_encoder_2/config.json",
    "tokenizer_2",
)
"""What the encoders of both families are loaded from, besides their weights."""


class HunyuanVideoAdapter(WholeVideo):
    """What the two families share: VAE, pooled CLIP text, transformer, guidance."""

    condition: ClassVar[Condition]
    required_files: ClassVar[tuple[str, ...]] = REQUIRED_FILES
    """Files and folders that must be there before gigabytes are read."""

    def __init__(
        self,
        *,
        transformer: HunyuanVideoTransformer3DModel,
        encoders: Encoders,
        options: AdapterOptions,
    ) -> None:
        self.transformer = transformer
        self.encoders = encoders
        self.options = options

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> Self:
        """The transformer of the released diffusers directory in float32, offline; its encoders when they are needed.

        Raises:
            CheckpointError: the directory is incomplete or another model's; of an encoder that does not fit, when it is
                loaded.
            ConfigError: the directory is another family's.
        """
        folder = options.model_dir
        _check_shift(folder / "scheduler" / "scheduler_config.json")
        check_config(read_json(folder / "transformer" / "config.json"), cls.condition)
        encoders = cls.encoders_of(options)
        transformer = load_transformer(folder / "transformer", cls.condition, options.given.transformer)
        return cls(transformer=transformer, encoders=encoders, options=options)

    @classmethod
    def blank(cls, config: Mapping[str, Any], options: AdapterOptions) -> Self:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        check_config(config, cls.condition)
        transformer = empty_model(lambda: HunyuanVideoTransformer3DModel.from_config(config))
        return cls(transformer=transformer, encoders=Encoders({}, options.device), options=options)

    def blank_conditions(self, latents: Tensor) -> Conditions:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        config, dtype, tokens = self.transformer.config, self.options.compute_dtype, TEXT_TOKENS[self.condition]
        output = {
            "prompt": {
                "states": latents.new_empty(tokens, config.text_embed_dim, dtype=dtype),
                "mask": latents.new_empty(tokens, dtype=torch.int64),
            },
            "pooled": {"pooled": latents.new_empty(config.pooled_projection_dim, dtype=dtype)},
            "image": {"mean": latents[0, :, :1]},
        }
        return self._loss_mask(latents) | self._conditions([output] * len(latents), self.options.guidance_scale)

    @staticmethod
    def blank_vae(options: AdapterOptions) -> HunyuanVAE:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return HunyuanVAE(empty_model(AutoencoderKLHunyuanVideo), mini_batch=options.vae_mini_batch)

    @classmethod
    def encoders_of(cls, options: AdapterOptions) -> Encoders:
        """``vae``, ``prompt`` and ``pooled``.

        Raises:
            CheckpointError: parts are missing; it names all of them.
        """
        folder, dtype = options.model_dir, options.compute_dtype
        require_parts(folder, cls.required_files, model="HunyuanVideo")
        model, tokenizer = folder / "text_encoder_2", folder / "tokenizer_2"
        sources = {
            "vae": folder_source(
                HunyuanVAE.from_folder,
                folder / "vae",
                dtype=dtype,
                mini_batch=options.vae_mini_batch,
                given=options.given.vae,
            ),
            "prompt": cls._prompt_source(folder, dtype),
            "pooled": EncoderSource(
                load=lambda: ClipPooledText.from_folders(model, tokenizer, dtype=dtype),
                files=(model, tokenizer),
                settings=str(dtype),
            ),
        }
        return Encoders(sources, options.device, low_vram=options.low_vram)

    @classmethod
    def _prompt_source(cls, folder: Path, dtype: torch.dtype) -> EncoderSource:
        raise NotImplementedError

    @classmethod
    def inputs(cls, request: SampleRequest, options: AdapterOptions) -> Inputs:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        caption = "" if request.key.chance("text-drop", options.caption_dropout) else request.caption
        return cls.compose(clip_of(request), Value(caption))

    @classmethod
    def compose(cls, pixels: ClipInput, caption: Value) -> Inputs:
        """``clip``, ``prompt`` and ``pooled``; both text encoders read the same caption."""
        return {
            "clip": Input(encoder="vae", lazy=pixels),
            "pooled": Input(encoder="pooled", lazy=caption),
            **cls._condition_inputs(pixels, caption),
        }

    @classmethod
    def _condition_inputs(cls, pixels: ClipInput, caption: Value) -> Inputs:
        """``prompt``, and what else the family reads."""
        raise NotImplementedError

    def assemble(self, outputs: Sequence[Mapping[str, Output]], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
        """Latents [B, 16, f, h, w] float32 and what ``predict`` needs; the clips of a micro-batch have one shape."""
        latents = sample_posteriors([output["clip"] for output in outputs], keys, "posterior")
        return latents, self._loss_mask(latents) | self._conditions(outputs, self.options.guidance_scale)

    def _conditions(self, outputs: Sequence[Mapping[str, Output]], guidance: float) -> Conditions:
        """What ``predict`` reads."""
        # In bf16 six of them are 6016, not 6000: the value the released models are sampled with.
        device = outputs[0]["pooled"]["pooled"].device
        scale = torch.full((len(outputs),), guidance, device=device, dtype=self.options.compute_dtype)
        return {
            **self._image_conditions(outputs),
            "text": torch.stack([output["prompt"]["states"] for output in outputs]),
            "text_mask": torch.stack([output["prompt"]["mask"] for output in outputs]),
            "pooled": torch.stack([output["pooled"]["pooled"] for output in outputs]),
            "guidance": scale * 1000,
        }

    def _image_conditions(self, outputs: Sequence[Mapping[str, Output]]) -> Conditions:
        """Conditions taken from a picture."""
        return {}

    def _loss_mask(self, latents: Tensor) -> Conditions:
        """Which latents do not count in the loss, where some do not."""
        return {}

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Velocity [B, 16, f, h, w], in the compute dtype like the inputs."""
        text = conditions["text"]
        prediction: Tensor = transformer(
            hidden_states=noisy.to(text.dtype),
            timestep=timesteps,
            encoder_hidden_states=text,
            encoder_attention_mask=conditions["text_mask"],
            pooled_projections=conditions["pooled"],
            guidance=conditions["guidance"] if self.transformer.config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return prediction

    def latent_shape(self, request: Shaped) -> tuple[int, int, int, int]:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`."""
        return int(self.transformer.config.out_channels), *T2V.plan.latent_shape(request)

    @classmethod
    def inputs_to_sample(cls, request: VideoRequest, options: AdapterOptions) -> Inputs:
        """``prompt`` and ``pooled``."""
        return captions_to_sample(request, "prompt", "pooled")

    def branches(
        self, outputs: Mapping[str, Output], request: VideoRequest, segment: int, shown: Tensor | None
    ) -> Branches:
        """See :class:`~vfun_cli.modeling.adapter.ModelAdapter`; both have the embedded guidance."""
        return both_branches(outputs, request, lambda found: self._conditions([found], SAMPLED_GUIDANCE))


class TextToVideoAdapter(HunyuanVideoAdapter):
    """Captions only; every latent frame is noised and counts."""

    condition = "t2v"

    @classmethod
    def _prompt_source(cls, folder: Path, dtype: torch.dtype) -> EncoderSource:
        model, tokenizer = folder / "text_encoder", folder / "tokenizer"
        return EncoderSource(
            load=lambda: LlamaPrompt.from_folders(model, tokenizer, dtype=dtype, max_length=PROMPT_TOKENS),
            files=(model, tokenizer),
            settings=f"{dtype} {PROMPT_TOKENS}",
            dummy_input="",
        )

    @classmethod
    def _condition_inputs(cls, pixels: ClipInput, caption: Value) -> Inputs:
        return {"prompt": Input(encoder="prompt", lazy=caption)}


class ImageToVideoAdapter(HunyuanVideoAdapter):
    """The first frame is given, to LLaVA as an image and to the transformer as its first latent frame."""

    condition = "i2v"
    required_files = (*REQUIRED_FILES, "image_processor/preprocessor_config.json")

    @classmethod
    def _prompt_source(cls, folder: Path, dtype: torch.dtype) -> EncoderSource:
        folders = folder / "text_encoder", folder / "tokenizer", folder / "image_processor"
        return EncoderSource(
            load=lambda: LlavaPrompt.from_folders(
                *folders, dtype=dtype, max_length=PROMPT_TOKENS, interleave=IMAGE_INTERLEAVE
            ),
            files=folders,
            settings=f"{dtype} {PROMPT_TOKENS} {IMAGE_INTERLEAVE}",
            dummy_input=("", torch.zeros(1, 3, 64, 64)),
        )

    @classmethod
    def _condition_inputs(cls, pixels: ClipInput, caption: Value) -> Inputs:
        """``prompt`` reads caption and first frame, ``image`` is the first frame alone, as in inference.

        The clip's own first latent is another one: the encoder normalises over the whole temporal window.
        """
        first = pixels.take([0])
        return {
            "prompt": Input(encoder="prompt", lazy=TupleInput((caption, first))),
            "image": Input(encoder="vae", lazy=first),
        }

    def _image_conditions(self, outputs: Sequence[Mapping[str, Output]]) -> Conditions:
        """The most probable latent of the image."""
        return {"first_latent": torch.stack([output["image"]["mean"] for output in outputs])}

    def _loss_mask(self, latents: Tensor) -> Conditions:
        """The given latent does not count."""
        mask = latents.new_ones(len(latents), 1, latents.shape[2], 1, 1)
        mask[:, :, :1] = 0
        return {"loss_mask": mask}

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """As the base class, with the given latent in place of the first noisy frame."""
        return super().predict(transformer, _with_first(noisy, conditions), timesteps, conditions)

    @classmethod
    def inputs_to_sample(cls, request: VideoRequest, options: AdapterOptions) -> Inputs:
        """``prompt`` and ``pooled``, and the image for LLaVA and VAE; the negative prompt is read with a black one."""
        assert request.image is not None
        inputs = super().inputs_to_sample(request, options) | {"image": Input(encoder="vae", lazy=request.image)}
        black = ConstantFrames(BLACK, 1, (request.height, request.width))
        pictures: dict[str, ClipInput] = {"prompt": request.image, NEGATIVE + "prompt": black}
        for name in pictures.keys() & inputs.keys():
            inputs[name] = Input(encoder="prompt", lazy=TupleInput((inputs[name].lazy, pictures[name])))
        return inputs

    def begin(self, noise: Tensor, branches: Branches, request: VideoRequest, schedule: Schedule) -> Tensor:
        """A thousandth of the image in every frame of the noise, as released."""
        return (1 - IMAGE_IN_NOISE) * noise + IMAGE_IN_NOISE * branches.conditional["first_latent"]

    def pixels(self, latents: Tensor, branches: Branches, request: VideoRequest) -> Tensor:
        """The frames of the latents, behind the one that was given."""
        return super().pixels(_with_first(latents, branches.conditional), branches, request)


def _with_first(latents: Tensor, conditions: Conditions) -> Tensor:
    """Latents [B, 16, f, h, w] with the given one in the place of the first."""
    return torch.cat([conditions["first_latent"].to(latents), latents[:, :, 1:]], dim=2)


def load_transformer(folder: Path, condition: Condition, given: Path | None = None) -> HunyuanVideoTransformer3DModel:
    """The released transformer in float32 on the CPU, with other weights if they are given.

    Raises:
        ConfigError: the directory is another family's.
        CheckpointError: the tensors do not fit.
    """
    dims = dims_reader(condition)(read_json(folder / "config.json"))
    locate = partial(original_location, dims=dims)
    model: HunyuanVideoTransformer3DModel = load_diffusers(
        HunyuanVideoTransformer3DModel, folder, transformer=True, given=given, locate=locate
    )
    return model


def _check_shift(path: Path) -> None:
    """Refuse a scheduler of another shift than the released models', which the objective trains with.

    Raises:
        CheckpointError: the scheduler has another shift.
    """
    shift = read_json(path).get("shift")
    if shift != SHIFT:
        raise CheckpointError(
            f"{path} has shift {shift}; the released HunyuanVideo models have {SHIFT}, and so does the training.",
            hint="Use the scheduler folder of the released model.",
        )
