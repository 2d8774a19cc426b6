"""What Wan2.1-Fun Control is conditioned on: pixels and text in, the transformer's inputs out."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vfun_cli.errors import CheckpointError
from vfun_cli.families.spec import ClipShape
from vfun_cli.families.wan_fun_control import LATENT_CHANNELS, SPEC, TEXT_TOKENS
from vfun_cli.families.wan_fun_control.names import live_name
from vfun_cli.families.wan_fun_control.transformer import WanFunControlTransformer, transformer_config
from vfun_cli.training.adapter import AdapterOptions, Conditions, Sample, SampleRequest
from vfun_cli.training.clips import read_clip
from vfun_cli.training.encoders import clip_vision, wan_vae
from vfun_cli.training.encoders.clip_vision import ClipImageEncoder
from vfun_cli.training.encoders.placement import encoding_on
from vfun_cli.training.encoders.umt5 import UMT5TextEncoder, pad_text
from vfun_cli.training.encoders.wan_vae import WanVAE
from vfun_cli.training.loading import empty_model, load_weights, safetensors_files
from vfun_cli.training.randomness import SampleKey

DROP = 0.1
"""Probability, for each condition on its own, of training a sample without it."""
FIRST_FRAME = 0.4
"""Probability of frame 0 with ``control_ref_image=random``; the other frames share the rest."""
BLACK = -1.0

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


def choose(key: SampleKey, frames: int, *, train_mode: str, control_ref_image: str) -> Choice:
    """Draw one sample's conditions.

    A picture is start image (it is frame 0 of the clip) or reference (it is a later frame), never both.
    """
    picture = 0
    if control_ref_image == "random" and frames > 1:
        draw = key.numpy("picture")
        picture = 0 if draw.random() < FIRST_FRAME else int(draw.integers(1, frames))
    with_picture = train_mode != "control"
    return Choice(
        picture=picture,
        control=not key.chance("drop control", DROP),
        start=with_picture and picture == 0 and not key.chance("drop start", DROP),
        reference=with_picture and picture > 0 and not key.chance("drop reference", DROP),
        image=with_picture and not key.chance("drop image", DROP),
    )


class WanFunControlAdapter:
    """Noisy latents beside the latents of a control clip and of a start image, with text, CLIP and a reference."""

    def __init__(
        self,
        *,
        transformer: WanFunControlTransformer,
        vae: WanVAE,
        text: UMT5TextEncoder,
        clip: ClipImageEncoder,
        options: AdapterOptions,
    ) -> None:
        self.transformer: nn.Module = transformer
        self.vae = vae
        self.text = text
        self.clip = clip
        self.options = options
        self.has_reference = transformer.has_reference
        if self.has_reference and options.train_mode != "control" and options.control_ref_image == "first_frame":
            log.warning(
                "control_ref_image is first_frame: frame 0 trains as start image, so the reference branch (ref_conv) "
                "of this V1.1 checkpoint sees zeros only. --control-ref-image random trains both."
            )

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> "WanFunControlAdapter":
        """Load the released directory, offline; the transformer in float32, the encoders in the compute dtype.

        Raises:
            CheckpointError: a file is missing, or is another model's.
        """
        folder, dtype = options.model_dir, options.compute_dtype
        return cls(
            transformer=load_transformer(folder),
            vae=WanVAE.from_file(folder / wan_vae.WEIGHTS, dtype=dtype, mini_batch=options.vae_mini_batch),
            text=UMT5TextEncoder.from_files(folder, dtype=dtype, text_len=TEXT_TOKENS),
            clip=ClipImageEncoder.from_file(folder / clip_vision.WEIGHTS, dtype=dtype),
            options=options,
        )

    @staticmethod
    def load(request: SampleRequest, options: Mapping[str, Any]) -> Sample:
        """``pixels`` and ``control`` [F, 3, H, W] of the same source frames, and ``text``, empty one time in ten.

        A row without a control clip trains with a black one.
        """
        pixels = read_clip(request)
        has_control = bool(request.record.get("control_file_path"))
        return {
            "pixels": pixels,
            "control": read_clip(request, "control_file_path") if has_control else torch.full_like(pixels, BLACK),
            "text": "" if request.key.chance("text", DROP) else request.record["text"],
        }

    def encode(self, samples: Sequence[Sample], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
        """Latents [B, 16, F, H, W] float32 and what ``predict`` reads beside them.

        ``control`` [B, 32, F, H, W]: latents of the control clip, then of the start image in latent frame 0;
        ``text`` [B, 512, text_dim]; ``image`` [B, 257, image_dim]; V1.1 also ``reference`` [B, 16, H, W].
        """
        options = self.options
        pixels = torch.stack([sample["pixels"] for sample in samples])  # [B, F, 3, H, W]
        control = torch.stack([sample["control"] for sample in samples])
        choices = [
            choose(key, pixels.shape[1], train_mode=options.train_mode, control_ref_image=options.control_ref_image)
            for key in keys
        ]
        picture = pixels[range(len(keys)), [choice.picture for choice in choices]]  # [B, 3, H, W]
        with self._encoding(self.vae):
            latents = self._latents(pixels, keys, "clip")
            control_latents = self._latents(control, keys, "control")
            picture_latents = self._latents(picture.unsqueeze(1), keys, "picture")[:, :, 0]  # [B, 16, H, W]
        with self._encoding(self.clip):
            image = self.clip.encode(picture)
        with self._encoding(self.text):
            text = pad_text(self.text.encode([sample["text"] for sample in samples]), TEXT_TOKENS)

        control_latents = _keep(control_latents, [choice.control for choice in choices])
        start = torch.zeros_like(latents)
        start[:, :, 0] = _keep(picture_latents, [choice.start for choice in choices])
        conditions = {
            "control": torch.cat([control_latents, start], dim=1),
            "text": text,
            "image": _keep(image, [choice.image for choice in choices]),
        }
        if self.has_reference:
            conditions["reference"] = _keep(picture_latents, [choice.reference for choice in choices])
        return latents, conditions

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The velocity, [B, 16, F, H, W], of ``noisy`` at ``timesteps`` [B], 0..1000."""
        latents = torch.cat([noisy, conditions["control"]], dim=1)
        return transformer(latents, timesteps, conditions["text"], conditions["image"], conditions.get("reference"))

    def _encoding(self, module: nn.Module) -> Any:
        return encoding_on(module, self.options.device, low_vram=self.options.low_vram)

    def _latents(self, pixels: Tensor, keys: Sequence[SampleKey], what: str) -> Tensor:
        """A posterior sample [B, 16, F, H, W] of pixels [B, F, 3, H, W], with noise of the sample's own."""
        _, frames, _, height, width = pixels.shape
        shape = (LATENT_CHANNELS, *SPEC.latent_shape(ClipShape(frames=frames, height=height, width=width)))
        noise = torch.stack([key.normal(f"{what} posterior", shape) for key in keys])
        return self.vae.encode(pixels.transpose(1, 2), noise)


def _keep(tensor: Tensor, kept: Sequence[bool]) -> Tensor:
    """Zeros for the samples of the batch that are not kept."""
    mask = torch.tensor(kept, device=tensor.device).view(-1, *[1] * (tensor.dim() - 1))
    return torch.where(mask, tensor, torch.zeros_like(tensor))


def load_transformer(folder: Path) -> WanFunControlTransformer:
    """The transformer of a released directory, float32 on the CPU; its variant is read off the tensors' shapes.

    Raises:
        CheckpointError: no such model there, or another one.
    """
    files = safetensors_files(folder)
    config = transformer_config(_shapes(files), _config(folder / SPEC.config_file))
    model = empty_model(lambda: WanFunControlTransformer(**config))
    load_weights(model, files, rename=live_name, dtype=torch.float32, where=str(folder), transformer=True)
    return model


def _shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as shard:
            shapes |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    return shapes


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}", hint="Point --pretrained-model-name-or-path at the released directory."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object.", hint="Download config.json of the released model again.")
    return config
