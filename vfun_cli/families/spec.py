"""What the torch-free half of vfun needs to know about a model family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from vfun_cli.checkpoints.naming import LayerLocation, unchanged
from vfun_cli.metadata.clip_needs import WHOLE, ClipNeeds, Span
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.modeling.encoders.captions import CaptionReader
from vfun_cli.modeling.shaped import Shaped
from vfun_cli.typed_json import read_object, whole

SIZE = whole(1, 1 << 20)
"""What a width, or a number of heads, channels or tokens can be in a configuration; the released ones go to 13,824."""

LAYERS = whole(0, 10_000)
"""What a number of layers can be; the released ones go to 60."""


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    """The shape of one training clip in pixels: frames, height, width."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class FrameRule:
    """How many frames a clip can have: whole latents of them. As text ``4k``; ``4k+1`` if the first stands alone."""

    frames_per_latent: int
    first_alone: bool
    """The first frame of a clip is a latent of its own."""

    @property
    def fewest(self) -> int:
        """The shortest video: one latent of motion, after the first frame where that stands alone."""
        return self.frames_per_latent + self.first_alone

    def round_down(self, frames: int) -> int:
        """The longest clip of at most ``frames`` frames; 0 if there is none."""
        return max(0, (frames - self.first_alone) // self.frames_per_latent * self.frames_per_latent + self.first_alone)

    def latents(self, frames: int) -> int:
        """Latent frames of a clip or, where the first frame does not stand alone, of an image repeated to fill one."""
        return -(-(frames - self.first_alone) // self.frames_per_latent) + self.first_alone

    def __str__(self) -> str:
        return f"{self.frames_per_latent}k{'+1' * self.first_alone}"


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """The dimensions that decide tokens and FLOPs, read from a model directory's configuration."""

    dim: int
    """Hidden size of the transformer."""
    ffn_dim: int
    """Inner size of a feed-forward layer."""
    num_layers: int
    extra: Mapping[str, int] = field(default_factory=dict)
    """Dimensions only one family has (audio injectors, single-stream blocks, reference tokens, …)."""


class ConditioningOptions(Protocol):
    """The options of a run in which families differ; ``config.options.RunConfig`` has them."""

    @property
    def train_mode(self) -> str | None:
        """What the model is conditioned on; None: the family's first mode."""

    @property
    def control_ref_image(self) -> str:
        """Which frame serves as the reference image."""

    @property
    def loss_type(self) -> str | None:
        """The original scripts' name of the objective; None: the family's own."""


@dataclass(frozen=True, kw_only=True)
class EncoderSize:
    """A released encoder."""

    weights: float
    """How many, in billions."""
    shared: bool = False
    """Whether ranks that shard the transformer keep it between them."""
    float32: bool = False
    """Whether it computes in float32 always."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The transformer: its dimensions, its cost, and what its loss is."""

    released: Mapping[str, object]
    """The transformer's ``config.json`` of the largest released model, of what decides its sizes."""
    layers: tuple[str, ...] = ("num_layers",)
    """Keys of that configuration that count the layers of one kind each, or list them. What layers of a kind weigh and
    keep of a pass is the same for each."""
    with_layers: Callable[[Mapping[str, int]], Mapping[str, object]] = dict
    """Values of these keys for a model with so many layers of each kind."""
    read_dims: Callable[[Mapping[str, object]], ModelDims]
    """Dimensions from the transformer's ``config.json``; a CheckpointError where it states others than a model has."""
    recognises: Callable[[Mapping[str, object]], bool]
    """Whether a transformer's ``config.json`` is of this family: tells people which family a directory fits."""
    config_file: str = "config.json"
    """Where the transformer's configuration lies inside the model directory."""
    vae: str = "vae"
    """Where the VAE's weights lie there: a folder or a file."""
    other_settings: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """What ``read_dims`` reads beside it: a name, and the file of the model directory and its key with the value."""
    input_settings: tuple[str, ...] = ()
    """Keys of ``config_file`` that decide what the encoders must read: the adapter's ``inputs`` gets their values."""
    encoders: Mapping[str, EncoderSize]
    """Those of the released models, by the adapter's names; ``vae`` is one."""
    captions: Callable[[ModelDims], tuple[CaptionReader, ...]]
    """What each text encoder reads of a caption, in the order in which the adapter loads them."""
    block_classes: tuple[str, ...]
    """Transformer block classes: what FSDP gathers at a time and ``--compile`` compiles."""
    unit_classes: tuple[str, ...] = ()
    """Further classes that FSDP gathers one at a time: of modules outside of blocks, of tens of millions of weights or
    more. Each runs once in every forward pass, whatever the clip, and nothing but its own forward reads its weights;
    otherwise ranks would wait for each other, or read a part for the whole."""
    blocks: Callable[[ModelDims], int] = lambda dims: dims.num_layers
    """How many of them there are, of all classes."""
    injection_classes: tuple[str, ...] = ()
    """Classes that make the rest of a layer, behind its block."""
    sequence_tokens: Callable[[ClipShape, ModelDims], int]
    """Length of the transformer's token sequence for one clip: video, text, reference and motion tokens."""
    forward_flops: Callable[[ClipShape, ModelDims], float]
    """FLOPs of one forward pass on one clip (a multiply-add counts two)."""
    attention_flops: Callable[[ClipShape, ModelDims], float]
    """The part of them in products of two activations (attention); the rest multiplies weights, frozen or trained."""
    modules_without_gradient: Callable[[ModelDims], tuple[str, ...]] = lambda dims: ()
    """Names of transformer modules whose parameters never get a gradient other than zero; the trainer freezes them."""
    objective: Literal["flow-matching", "ddpm"]
    objective_options: Mapping[str, object] = field(default_factory=dict)
    """What the objective needs to know of this family: shift, timesteps, folder of the scheduler's configuration."""
    embedded_guidance: Callable[[ModelDims], bool] = lambda dims: False
    """Whether the transformer is told a scale of guidance, as one is that was distilled from it."""
    sampler: Literal["flow-shifted-twice", "flow-shifted-once", "flow-shifted-dynamically", "ddim"]
    """The noise levels that a video is made through, as the family is released (docs/numerics.md, Sampling)."""
    sampler_options: Mapping[str, float] = field(default_factory=dict)
    """The shift of a flow, or what it is made of."""

    @property
    def gathered_classes(self) -> tuple[str, ...]:
        """All that FSDP gathers at a time."""
        return (*self.block_classes, *self.unit_classes)

    @property
    def dims(self) -> ModelDims:
        """Dimensions of the largest released model, used when no model directory is given."""
        return self.read_dims(self.released)

    def transformer_dir(self, model_dir: Path) -> Path:
        """Where the transformer's configuration and weights lie in a model directory."""
        return (model_dir / self.config_file).parent

    def settings_beside(self, model_dir: Path) -> dict[str, object]:
        """``other_settings`` of a model directory; what is not stated there is left out.

        Raises:
            CheckpointError: a damaged file.
        """
        found: dict[str, object] = {}
        for name, (file, key) in self.other_settings.items():
            path = model_dir / file
            stated = read_object(path, hint="Download the file again.") if path.is_file() else {}
            if stated.get(key) is not None:
                found[name] = stated[key]
        return found


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """What a clip of the family may become: its sizes, its lengths, its tokens."""

    vae_stride: tuple[int, int, int]
    """Pixels per latent along (frames, height, width)."""
    patch_size: tuple[int, int, int]
    """Latents per token along (frames, height, width)."""
    first_frame_alone: bool = True
    """The VAE makes a latent of a clip's first frame alone; False: every latent holds as many frames."""
    reference_frame: bool = False
    """A reference frame enters the VAE before the clip and becomes a latent of its own (Wan-S2V). The published
    figures count it: their 49 frames are 48 of the clip."""
    adjust_frames: Callable[[int, ModelDims], int] | None = None
    """Shortens a clip that already obeys the frame rule to one the model can take (CogVideoX-V1.5: an even number
    of latent frames). Never lengthens it; applied to videos only."""
    usable_span: Span = WHOLE
    """Part of a video that clips are cut from (EasyAnimate: the middle, without titles and credits)."""
    strides_to_max_fps: int | None = None
    """Raise the stride until fps / stride is at most this (Wan-S2V: 30); None keeps the stride as given."""
    smallest_side: int = 1
    """Pixels; the transformer refuses clips that are narrower or lower."""
    lowest_video_size: int | None = None
    """Fixed lower end of the size range (Wan-S2V: 256); None means min(video, image sample size)."""
    token_size_share: float | None = None
    """In token-length mode, the probability of the video size nearest to ``token_sample_size`` (Wan-Fun: 0.5);
    None draws all sizes alike."""
    encoded_frames: Callable[[int], int] = lambda frames: frames
    """Of a clip of so many frames, the most that the VAE encodes at a time, with what comes before the clip."""
    decoded_frames: Callable[[int], int] = lambda frames: frames
    """Of a clip of so many frames, all that is decoded for its encoders, counted in its frames of bytes."""
    full_size_share: float = 0.75
    """Probability of the full size among images of adaptive sizes, and among videos with ``random_hw_adapt`` alone (the
    Wan scripts: 0.9)."""

    @property
    def frame_rule(self) -> FrameRule:
        """The lengths that a clip can have."""
        return FrameRule(frames_per_latent=self.vae_stride[0], first_alone=self.first_frame_alone)

    @property
    def grid(self) -> tuple[int, int]:
        """Pixels of a token along (height, width): the sides of a bucket are multiples of them."""
        return self.vae_stride[1] * self.patch_size[1], self.vae_stride[2] * self.patch_size[2]

    def clip_needs(self, stride: int) -> ClipNeeds:
        """What a video must have to be trained on with the option ``video_sample_stride``."""
        return ClipNeeds(
            min_frames=self.frame_rule.fewest,
            stride=stride,
            max_fps=self.strides_to_max_fps,
            usable_span=self.usable_span,
        )

    def latent_shape(self, shape: Shaped) -> tuple[int, int, int]:
        """Latent (frames, height, width) of a clip, without a reference frame's."""
        _, h, w = self.vae_stride
        return self.frame_rule.latents(shape.frames), shape.height // h, shape.width // w

    def video_tokens(self, shape: ClipShape) -> int:
        """Tokens of the clip itself, nothing added."""
        frames, height, width = self.latent_shape(shape)
        pt, ph, pw = self.patch_size
        return (frames // pt) * (height // ph) * (width // pw)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Where other documents of the original scripts type another value than the family's defaults."""

    train: Mapping[str, object] = field(default_factory=dict)
    lora: Mapping[str, object] = field(default_factory=dict)
    """Of ``vfun lora``, beside or instead of those of ``train``."""


@dataclass(frozen=True, kw_only=True)
class DefaultOptions:
    """Option values by name, where they are not the options' own defaults."""

    train: Mapping[str, object] = field(default_factory=dict)
    """The published command line."""
    by_strategy: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Where the published command line differs between strategies."""
    lora: Mapping[str, object] = field(default_factory=dict)
    """Where ``vfun lora`` differs from ``train``."""
    presets: Mapping[str, Preset] = field(default_factory=dict)
    """By the values of ``--preset``. Folders stay where they are, so that ``vfun resume`` finds a run."""
    lora_aliases: Mapping[str, str] = field(default_factory=dict)
    """Spellings of ``target_name`` in the published command lines that name no layer, and the layers they mean."""
    demo: Mapping[str, object] = field(default_factory=dict)
    """Of ``--demo``: a tiny model on tiny media."""


SamplingInput = Literal["image", "end_image", "reference", "control", "edit", "edit_mask", "audio"]
"""What a video can be made from besides text; ``modeling.adapter.VideoRequest`` says what each is."""


def steps_of_edit(steps: int, strength: float) -> int:
    """How many of a schedule's steps, its last ones, are made of a clip that is edited."""
    return int(steps * strength)


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """How a video is made where nothing else is said: the settings of the released model's predict script."""

    steps: int
    guidance: float
    """Scale of classifier-free guidance; at 1 or less the negative prompt is not read."""
    negative_prompt: str
    frames: int
    """Of the video or, where it is made in segments, of one of them."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    fps: int
    required: tuple[SamplingInput, ...] = ()
    optional: tuple[SamplingInput, ...] = ()
    without: Callable[[ModelDims], Mapping[SamplingInput, str]] = lambda dims: {}
    """Of what is optional, that which a model of these dimensions cannot be given, each with why."""
    by_sound: bool = False
    """The video is as long as its sound: it is made in segments, and a control clip that ends earlier is followed by
    black."""
    strength: float | None = None
    """How much of a clip is replaced that is edited without a mask; None: the family edits none."""
    demo: Mapping[str, Any] = field(default_factory=dict)
    """Values of ``--demo``, by the names of these fields."""


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """What other programs call the trained weights."""

    names: Mapping[str, Callable[[str], str]] = field(default_factory=lambda: {"same": unchanged})
    """``same`` turns a transformer parameter's name into the released one; every other export format turns a released
    name into its own."""
    parameter: Callable[[str], str] = unchanged
    """Turns a released name into the transformer parameter's: the inverse of ``same``."""
    lora_formats: Mapping[str, str] = field(
        default_factory=lambda: {name: name for name in ("peft", "diffusers", "comfyui", "original")}
    )
    """What ``export-bf16`` can make of a LoRA checkpoint, and the style of ``checkpoints.lora_export`` it takes:
    ComfyUI nodes of some families read the original's keys."""
    architecture: str | None = None
    """What other trainers call the model in a LoRA's header; None: the family's name."""
    implementation: str | None = None
    """The repository whose names the model's files have, for that header; None: VideoX-Fun."""
    comfyui_location: Callable[[str, ModelDims], LayerLocation | None] | None = None
    """Where ComfyUI looks for a layer, by its module name; None: under its released name."""
    original_location: Callable[[str, ModelDims], LayerLocation | None] | None = None
    """Where a release in other names, and perhaps joint layers, keeps a layer: ``--format original`` of a full
    checkpoint; None: there is no such release."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """A model of a family as it is published; ``families.releases`` says how to get it."""

    size: str
    """What ``vfun fetch --size`` calls it."""
    hugging_face: str
    """Its repository on Hugging Face, ``owner/name``."""
    model_scope: str | None = None
    """The same on ModelScope; None: none is known to hold these files."""

    @property
    def folder(self) -> str:
        """What its directory is called in the published command lines."""
        return self.hugging_face.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One trainable model family. Frozen and free of torch: the adapter is named, not imported."""

    name: str
    """Name on the command line, e.g. ``wan-s2v``."""
    summary: str
    """One line for ``vfun train`` without arguments."""
    adapter: str
    """``module:Class`` of the ModelAdapter, imported by the training plane only."""
    fields: tuple[MetadataField, ...]
    """What it reads from a row of the metadata."""
    media_types: tuple[Literal["video", "image"], ...]
    """Row types the family can train on."""
    releases: tuple[Release, ...] = ()
    """Its models, that of the published command line first."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What is read of a release, by part: patterns of paths from its folder, in which ``*`` may stand for folders too.
    A part of which no file is there is missing."""
    train_modes: tuple[str, ...] = ()
    """Values of ``train_mode``; none: it has no such choice."""
    reference_images: tuple[str, ...] = ()
    """Values of ``control_ref_image`` that the family trains with; none: it reads no reference image."""
    check_options: Callable[[ConditioningOptions], None] = lambda options: None
    """Refuses, with a ConfigError, an option value that exists but cannot train this family."""
    fixed_flags: Mapping[str, object] = field(default_factory=dict)
    """Flags of the family's original scripts alone that have one right value, and that value."""
    model: ModelSpec
    plan: PlanSpec
    sampling: SamplingSpec
    defaults: DefaultOptions = field(default_factory=DefaultOptions)
    export: ExportSpec = field(default_factory=ExportSpec)
