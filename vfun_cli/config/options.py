"""RunConfig: every option of a run, declared once.

The command line, ``vfun.toml``, the environment, ``run.json``, the help texts and ``docs/options.md`` are all made
from the annotated fields of :class:`RunConfig`.
"""

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

from vfun_cli.checkpoints.given import Given
from vfun_cli.config.datasets import DataSet, parse_data_sets, sets_over_paths, sets_to_json
from vfun_cli.config.optimizers import OPTIMIZERS
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import ConfigError, as_flag, did_you_mean
from vfun_cli.files import at_home, possible
from vfun_cli.metadata.fields import odd_sign
from vfun_cli.modeling.captions import CAPTION_DROPOUT

MODEL = "Model"
DATA = "Data"
BUCKETS = "Buckets"
CONDITIONING = "Conditioning"
OPTIMISATION = "Optimisation"
VALIDATION = "Validation"
MEMORY = "Memory and speed"
LORA = "LoRA"
PARALLEL = "Processes and machines"
OUTPUT = "Output and checkpoints"
FORECAST = "Forecast"

TRAIN = ("train", "lora")
DATA_COMMANDS = ("train", "lora", "plan-buckets", "validate-meta")
PLAN_COMMANDS = ("train", "lora", "plan-buckets")
LORA_COMMANDS = ("lora", "plan-buckets")

ResumeEffect = Literal["trajectory", "harmless", "sharding", "length", "contents"]


@dataclass(frozen=True, kw_only=True)
class Opt:
    """What is known of an option beside its name, type and default."""

    help: str
    panel: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    """Values that the original scripts take and that are no choice here, and why."""
    switch: tuple[str, str] | None = None
    """What the option means as a switch, off and on: ``--no-name`` or false, ``--name`` alone or true."""
    variables: tuple[str, ...] = ()
    """Environment variables that the original scripts export, read beside ``VFUN_<NAME>``."""
    minimum: float | None = None
    above: float | None = None
    """A number must be more than this."""
    maximum: float | None = None
    """The most that makes sense: beyond it a slip of the finger would cost minutes, or terabytes."""
    below: float | None = None
    """A number must be less than this."""
    verbatim: bool = False
    """A text is taken as it stands, blanks around it included; so is each entry of a list, commas included."""
    commands: tuple[str, ...] = TRAIN
    on_resume: ResumeEffect = "trajectory"
    """What a changed value means for a resumed run: another trajectory, nothing, the same steps spread otherwise,
    another length, which is a trajectory where the learning rate depends on it, or another place, whose contents tell.
    """
    hidden: bool = False
    other_names: tuple[str, ...] = ()
    """What it is called too, on the command line alone."""

    @property
    def bounds(self) -> str:
        """The range in words, empty where there is none."""
        least = f"from {_number(self.minimum)}" if self.minimum is not None else ""
        least = f"above {_number(self.above)}" if self.above is not None else least
        most = f"to {_number(self.maximum)}" if self.maximum is not None else ""
        most = f"below {_number(self.below)}" if self.below is not None else most
        return f"{least} {most}".strip()


def _number(value: float) -> str:
    """As it is typed."""
    return str(int(value)) if value == int(value) and abs(value) < 2**63 else f"{value:g}"


MOST_RANKS = 100_000
"""More processes than any machine has; a plan for so many takes seconds."""

DEFAULT_VARIANTS = 4
"""Starts and sizes of a clip that a cache holds: as many times the disk of one, and random enough for a fine-tune."""

TRACKERS = ("tensorboard", "wandb", "swanlab")
"""What curves can be written to; each is the name of its Python package."""

BASE_PRECISIONS = ("bf16", "fp8", "nf4")
ENDING_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial")
"""Those that fall until the end of the run, so that each rate depends on its length."""
TIMESTEP_DENSITIES = ("logit_normal", "mode")
"""Values of ``weighting_scheme`` that decide how often a timestep is drawn; the others, how much it counts."""
LR_SCHEDULERS = ("constant", "constant_with_warmup", *ENDING_SCHEDULERS)


LISTS_OF_PATHS = ("validation_paths", "validation_image_paths", "validation_audio_paths")
"""Options that are typed as texts, one after another."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The resolved options of one run; ``run.json`` holds exactly these."""

    pretrained_model_name_or_path: Annotated[
        Path | None,
        Opt(
            help="Model directory in its released layout; vfun fetch gets one, and nothing else is ever downloaded.",
            panel=MODEL,
            variables=("MODEL_NAME",),
            on_resume="contents",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    transformer_path: Annotated[
        Path | None,
        Opt(
            help="Start from these weights instead of the model directory's transformer: a file or a folder, such as "
            "an export. Every tensor must fit.",
            panel=MODEL,
            on_resume="contents",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    vae_path: Annotated[
        Path | None,
        Opt(
            help="Encode, and decode samples, with these weights instead of those of the model directory's VAE: a file "
            "or a folder. Every tensor must fit.",
            panel=MODEL,
            on_resume="contents",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    preset: Annotated[
        str | None,
        Opt(
            help="Take the defaults of other documents of the original scripts: 2026 for those of May 2026; "
            "docs/families.md says what moved.",
            panel=MODEL,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    train_data_dir: Annotated[
        Path | None,
        Opt(
            help="Folder that the paths in metadata files start from; by default the file's own, of each set. "
            "Those of a folder start from itself.",
            panel=DATA,
            variables=("DATASET_NAME",),
            on_resume="contents",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    train_data_meta: Annotated[
        tuple[DataSet, ...],
        Opt(
            help="Metadata: a folder of media, or a JSON list, JSON lines, CSV or Parquet (docs/data.md). Repeated, "
            "several sets: with PATH:2 an epoch shows each clip of the set twice, with PATH:0.5 half of them. [[data]] "
            "tables in vfun.toml say more.",
            panel=DATA,
            variables=("DATASET_META_NAME",),
            on_resume="contents",
            commands=PLAN_COMMANDS,
        ),
    ] = ()
    video_repeat: Annotated[
        int,
        Opt(
            help="How often an epoch shows each video; 0 and 1 both mean once.",
            panel=DATA,
            minimum=0,
            maximum=10_000,
            commands=PLAN_COMMANDS,
        ),
    ] = 1
    dataloader_num_workers: Annotated[
        int,
        Opt(
            help="Decoding processes of each rank; 0 decodes in the training process.",
            panel=DATA,
            minimum=0,
            maximum=1_024,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = 8

    on_bad_sample: Annotated[
        str,
        Opt(
            help="What to do with a clip that turns out undecodable while training: stop names its row; skip goes on "
            "without it and counts it.",
            panel=DATA,
            choices=("stop", "skip"),
            on_resume="harmless",
        ),
    ] = "stop"

    cache: Annotated[
        Path | None,
        Opt(
            help="Keep what the encoders give in this folder, and take it from there; several runs may share it. "
            "vfun cache fills it ahead.",
            panel=DATA,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    cache_variants: Annotated[
        int | None,
        Opt(
            help="Draw the start, the size and all else that encoders see anew for so many epochs, then repeat them; "
            f"by default {DEFAULT_VARIANTS} with --cache, and without it never repeat.",
            panel=DATA,
            minimum=1,
            maximum=100_000,
            commands=PLAN_COMMANDS,
        ),
    ] = None

    video_sample_size: Annotated[
        int,
        Opt(
            help="Base size of videos; with buckets, the area of the square of this side.",
            panel=BUCKETS,
            unit="pixels",
            minimum=1,
            maximum=16_384,
            commands=PLAN_COMMANDS,
        ),
    ] = 512
    image_sample_size: Annotated[
        int | None,
        Opt(
            help="Base size of images, and the other end of the size range (either order).",
            panel=BUCKETS,
            unit="pixels",
            minimum=1,
            maximum=16_384,
            commands=PLAN_COMMANDS,
        ),
    ] = None
    token_sample_size: Annotated[
        int,
        Opt(
            help="Size at which a clip keeps all its frames; sets the token budget.",
            panel=BUCKETS,
            unit="pixels",
            minimum=1,
            maximum=16_384,
            commands=PLAN_COMMANDS,
        ),
    ] = 512
    video_sample_stride: Annotated[
        int,
        Opt(
            help="Take every n-th source frame.",
            panel=BUCKETS,
            unit="frames",
            minimum=1,
            maximum=10_000,
            commands=DATA_COMMANDS,
        ),
    ] = 1
    video_sample_n_frames: Annotated[
        int,
        Opt(
            help="Most frames of a clip.",
            panel=BUCKETS,
            unit="frames",
            minimum=1,
            maximum=100_000,
            commands=DATA_COMMANDS,
        ),
    ] = 49
    enable_bucket: Annotated[
        bool,
        Opt(
            help="Group clips by aspect ratio instead of cropping all to a square.",
            panel=BUCKETS,
            commands=PLAN_COMMANDS,
        ),
    ] = True
    random_hw_adapt: Annotated[
        bool, Opt(help="Draw a size from the range for every clip and epoch.", panel=BUCKETS, commands=PLAN_COMMANDS)
    ] = False
    training_with_video_token_length: Annotated[
        bool,
        Opt(
            help="Shorten clips at larger sizes so that the token length stays within the budget.",
            panel=BUCKETS,
            commands=PLAN_COMMANDS,
        ),
    ] = False
    fix_sample_size: Annotated[
        tuple[int, ...],
        Opt(
            help="Train every clip at this one height and width, scaled to cover it and cropped, whatever the sizes "
            "above; random_hw_adapt and training_with_video_token_length are off then.",
            panel=BUCKETS,
            unit="pixels",
            minimum=1,
            maximum=16_384,
            commands=PLAN_COMMANDS,
        ),
    ] = ()
    random_ratio_crop: Annotated[
        bool,
        Opt(
            help="Crop each clip to an aspect ratio drawn anew in each epoch, instead of the one nearest to its own.",
            panel=BUCKETS,
            commands=PLAN_COMMANDS,
        ),
    ] = False
    random_frame_crop: Annotated[
        bool,
        Opt(help="Draw a shorter clip now and then, to train on many lengths.", panel=BUCKETS, commands=PLAN_COMMANDS),
    ] = False

    heaviest_first: Annotated[
        bool,
        Opt(
            help="Start each epoch with its heaviest step, so that what does not fit fails at once.",
            panel=BUCKETS,
            commands=PLAN_COMMANDS,
        ),
    ] = False
    tokens_per_batch: Annotated[
        int | None,
        Opt(
            help="Fill micro-batches up to this many tokens instead of train_batch_size clips.",
            panel=BUCKETS,
            unit="tokens",
            minimum=1,
            maximum=1e9,
            commands=PLAN_COMMANDS,
        ),
    ] = None

    train_mode: Annotated[
        str | None,
        Opt(
            help="What the model is conditioned on, where the family has a choice.",
            panel=CONDITIONING,
            commands=PLAN_COMMANDS,
        ),
    ] = None
    control_ref_image: Annotated[
        str,
        Opt(
            help="Which frame serves as the reference image.",
            panel=CONDITIONING,
            choices=("first_frame", "random"),
            commands=PLAN_COMMANDS,
        ),
    ] = "first_frame"
    caption_prefix: Annotated[
        str,
        Opt(
            help="Text in front of every caption, such as a trigger word; a row without text trains with it alone.",
            panel=CONDITIONING,
            verbatim=True,
            commands=PLAN_COMMANDS,
        ),
    ] = ""
    caption_suffix: Annotated[
        str,
        Opt(help="Text behind every caption.", panel=CONDITIONING, verbatim=True, commands=PLAN_COMMANDS),
    ] = ""
    caption_dropout: Annotated[
        float,
        Opt(
            help="Chance that a caption is left out, prefix and suffix with it, for classifier-free guidance.",
            panel=CONDITIONING,
            minimum=0,
            maximum=1,
        ),
    ] = CAPTION_DROPOUT
    shuffle_tags: Annotated[
        bool,
        Opt(help="Put what stands between the commas of a caption in another order every epoch.", panel=CONDITIONING),
    ] = False
    loss_type: Annotated[
        str | None,
        Opt(
            help="The original scripts' name of the objective (EasyAnimate: flow, ddpm); each family has one.",
            panel=CONDITIONING,
        ),
    ] = None
    uniform_sampling: Annotated[
        bool,
        Opt(
            help="Draw all timesteps alike, of every sample; off, with the density of weighting_scheme.",
            panel=CONDITIONING,
            on_resume="harmless",  # by itself: what it turns on and off is a weighting_scheme
        ),
    ] = True
    weighting_scheme: Annotated[
        str,
        Opt(
            help="Of flow matching: weigh each sample by its noise (sigma_sqrt, cosmap), or draw timesteps with a "
            "density (logit_normal, mode), which needs --no-uniform-sampling; docs/numerics.md has the formulas.",
            panel=CONDITIONING,
            choices=("none", "sigma_sqrt", "cosmap", *TIMESTEP_DENSITIES),
        ),
    ] = "none"
    logit_mean: Annotated[
        float,
        Opt(
            help="Mean of logit_normal; above 0, timesteps with less noise are drawn more often.",
            panel=CONDITIONING,
            minimum=-10,
            maximum=10,
        ),
    ] = 0.0
    logit_std: Annotated[
        float, Opt(help="Standard deviation of logit_normal.", panel=CONDITIONING, above=0, maximum=10)
    ] = 1.0
    mode_scale: Annotated[
        float,
        Opt(
            help="Scale of mode: 0 draws all alike, above it the middle more often, below it the ends.",
            panel=CONDITIONING,
            minimum=-1,
            maximum=1.75,  # at -1 and 2 / (pi - 2) the density ends: beyond, positions leave the schedule
        ),
    ] = 1.29
    motion_sub_loss: Annotated[
        bool,
        Opt(help="Make a share of the loss the error of what changes from frame to frame.", panel=CONDITIONING),
    ] = False
    motion_sub_loss_ratio: Annotated[float, Opt(help="That share.", panel=CONDITIONING, minimum=0, maximum=1)] = 0.25
    noise_share_in_frames: Annotated[
        bool, Opt(help="Let the noise of neighbouring latent frames resemble each other.", panel=CONDITIONING)
    ] = False
    noise_share_in_frames_ratio: Annotated[
        float,
        Opt(
            help="How much of the frame before is mixed into the noise of a frame; 1: all frames have the same.",
            panel=CONDITIONING,
            minimum=0,
            maximum=1,
        ),
    ] = 0.5
    guidance_scale: Annotated[
        float,
        Opt(
            help="Embedded guidance that HunyuanVideo trains at; its samples are made at 6 whatever this is.",
            panel=CONDITIONING,
            minimum=0,
            maximum=1e3,
        ),
    ] = 6.0

    train_batch_size: Annotated[
        int, Opt(help="Clips in a micro-batch.", panel=OPTIMISATION, minimum=1, maximum=100_000, commands=PLAN_COMMANDS)
    ] = 1
    gradient_accumulation_steps: Annotated[
        int,
        Opt(
            help="Micro-batches of each rank in a step.",
            panel=OPTIMISATION,
            minimum=1,
            maximum=100_000,
            commands=PLAN_COMMANDS,
        ),
    ] = 1
    num_train_epochs: Annotated[
        int,
        Opt(
            help="Epochs to train.",
            panel=OPTIMISATION,
            minimum=1,
            maximum=100_000,
            on_resume="length",
            commands=PLAN_COMMANDS,
        ),
    ] = 100
    max_train_steps: Annotated[
        int | None,
        Opt(
            help="Stop after this many optimizer steps, whatever the epochs.",
            panel=OPTIMISATION,
            minimum=0,
            maximum=1e9,
            on_resume="length",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    learning_rate: Annotated[float, Opt(help="Peak learning rate.", panel=OPTIMISATION, minimum=0, maximum=1e38)] = 2e-5
    optimizer: Annotated[
        str,
        Opt(
            help=f"{', '.join(OPTIMIZERS)}, or a class of an installed package, as torch.optim.RAdam; docs/numerics.md "
            "says what each keeps, and where it works.",
            panel=OPTIMISATION,
            commands=PLAN_COMMANDS,
        ),
    ] = "adamw"
    optimizer_args: Annotated[
        tuple[str, ...],
        Opt(
            help="Its further arguments, comma-separated or repeated: momentum=0.9,ns_steps=6. Numbers, true, false, "
            "none, tuples in brackets, or text.",
            panel=OPTIMISATION,
            verbatim=True,
            commands=PLAN_COMMANDS,
        ),
    ] = ()
    lr_scheduler: Annotated[
        str,
        Opt(
            help="Shape of the learning rate over the run.",
            panel=OPTIMISATION,
            choices=LR_SCHEDULERS,
            refused={"piecewise_constant": "its steps are rules that no flag of the original scripts can state"},
        ),
    ] = "constant_with_warmup"
    lr_warmup_steps: Annotated[
        int, Opt(help="Linear warm-up from zero.", panel=OPTIMISATION, unit="steps", minimum=0, maximum=1e9)
    ] = 100
    lr_num_cycles: Annotated[
        int,
        Opt(
            help="How often cosine_with_restarts falls from the peak.",
            panel=OPTIMISATION,
            minimum=1,
            maximum=1e6,
        ),
    ] = 1
    lr_power: Annotated[
        float, Opt(help="Exponent of polynomial; 1 is a straight line.", panel=OPTIMISATION, above=0, maximum=100)
    ] = 1.0
    lr_min_ratio: Annotated[
        float,
        Opt(
            help="Share of the peak that a schedule falls to instead of zero.",
            panel=OPTIMISATION,
            minimum=0,
            maximum=1,
        ),
    ] = 0.0
    adam_beta1: Annotated[
        float, Opt(help="Decay of the first moment, of AdamW and its like.", panel=OPTIMISATION, minimum=0, below=1)
    ] = 0.9
    adam_beta2: Annotated[
        float, Opt(help="Decay of the second moment, of AdamW and its like.", panel=OPTIMISATION, minimum=0, below=1)
    ] = 0.999
    adam_weight_decay: Annotated[
        float, Opt(help="Decoupled weight decay.", panel=OPTIMISATION, minimum=0, maximum=100)
    ] = 3e-2
    adam_epsilon: Annotated[
        float, Opt(help="Epsilon of AdamW and its like.", panel=OPTIMISATION, above=0, maximum=1)
    ] = 1e-10
    max_grad_norm: Annotated[
        float,
        Opt(
            help="Gradients are scaled down to this global norm, under every strategy; 0 leaves them as they are.",
            panel=OPTIMISATION,
            minimum=0,
            maximum=1e9,
        ),
    ] = 0.05
    seed: Annotated[
        int,
        Opt(
            help="Seed of every random choice.",
            panel=OPTIMISATION,
            minimum=0,
            maximum=2**63 - 1,
            commands=PLAN_COMMANDS,
        ),
    ] = 42
    mixed_precision: Annotated[
        str,
        Opt(
            help="Compute type; trainable weights keep a float32 master either way, and frozen encoders on a CPU are "
            "float32. Left open, it is no on a CPU without units for bf16.",
            panel=OPTIMISATION,
            choices=("no", "bf16"),
            refused={
                "fp16": "its small gradients need a scaled loss, which vfun has not; the models are made for bf16"
            },
            commands=PLAN_COMMANDS,
        ),
    ] = "bf16"
    trainable_modules: Annotated[
        tuple[str, ...],
        Opt(
            help="Parts of parameter names to train, comma-separated or repeated: of the released ones, or of those "
            "here; '.' is everything.",
            panel=OPTIMISATION,
            commands=PLAN_COMMANDS,
        ),
    ] = (".",)
    trainable_modules_low_learning_rate: Annotated[
        tuple[str, ...],
        Opt(
            help="Parts of parameter names to train at half the learning rate, whether or not trainable_modules names "
            "them too.",
            panel=OPTIMISATION,
            commands=PLAN_COMMANDS,
        ),
    ] = ()
    use_ema: Annotated[
        bool,
        Opt(
            help="Keep an exponential moving average of the weights.",
            panel=OPTIMISATION,
            commands=PLAN_COMMANDS,
        ),
    ] = False
    ema_decay: Annotated[
        float, Opt(help="Decay of the moving average per step.", panel=OPTIMISATION, minimum=0, below=1)
    ] = 0.9999

    validation_meta: Annotated[
        Path | None,
        Opt(
            help="Metadata of rows to validate on, as for train_data_meta; paths in a file start from train_data_dir "
            "too. Before the first step, and as often as asked, their loss is computed.",
            panel=VALIDATION,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    validation_rows: Annotated[
        int | None,
        Opt(
            help="Instead of that: hold so many of the training rows out, chosen by their videos and the seed, "
            "whatever their order. Rows of one video go together; none of them is trained on.",
            panel=VALIDATION,
            minimum=1,
            maximum=1e6,
            commands=PLAN_COMMANDS,
        ),
    ] = None
    validation_steps: Annotated[
        int | None,
        Opt(
            help="Validate each time after so many steps; with neither this nor validation_epochs, with every "
            "checkpoint. Before the first step and after the last it is done in any case.",
            panel=VALIDATION,
            unit="steps",
            minimum=1,
            maximum=1e9,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    validation_epochs: Annotated[
        int | None,
        Opt(
            help="Validate each time so many epochs are over.",
            panel=VALIDATION,
            unit="epochs",
            minimum=1,
            maximum=100_000,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    validation_samples: Annotated[
        bool,
        Opt(
            help="Make videos of the validation rows, or of the prompts; without, the rows' loss alone is computed.",
            panel=VALIDATION,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = True
    validation_prompts: Annotated[
        tuple[str, ...],
        Opt(help="Prompts to make videos of.", panel=VALIDATION, verbatim=True, on_resume="harmless"),
    ] = ()
    validation_paths: Annotated[
        tuple[str, ...],
        Opt(
            help="Control clips of these prompts, one each, or the videos that they continue.",
            panel=VALIDATION,
            verbatim=True,
            on_resume="harmless",
        ),
    ] = ()
    validation_image_paths: Annotated[
        tuple[str, ...],
        Opt(help="Pictures of these prompts, one each.", panel=VALIDATION, verbatim=True, on_resume="harmless"),
    ] = ()
    validation_audio_paths: Annotated[
        tuple[str, ...],
        Opt(help="Sounds of these prompts, one each.", panel=VALIDATION, verbatim=True, on_resume="harmless"),
    ] = ()
    validation_sampling_steps: Annotated[
        int | None,
        Opt(
            help="Denoising steps of each video; by default as many as the family's inference takes.",
            panel=VALIDATION,
            unit="steps",
            minimum=1,
            maximum=1_000,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    validation_guidance: Annotated[
        float | None,
        Opt(
            help="Strength of classifier-free guidance; by default the family's.",
            panel=VALIDATION,
            minimum=0,
            maximum=1e3,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None

    gradient_checkpointing: Annotated[
        str,
        Opt(
            help="What the backward pass computes again instead of keeping it: nothing; each layer whole (block); all "
            "of a layer but its self-attention (attention); or all but its matrix products and attentions (selective). "
            "Alone, it means block.",
            panel=MEMORY,
            choices=("none", "block", "attention", "selective"),
            switch=("none", "block"),
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = "block"
    activation_offload: Annotated[
        bool,
        Opt(
            help="Keep what the layers save for the backward pass in pinned memory of the host, and on the accelerator "
            "that of two layers at most; copied beside the computation.",
            panel=MEMORY,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = False
    compile: Annotated[
        bool,
        Opt(
            help="Compile the transformer's blocks, once for all shapes, in the first steps; not for ZeRO-3.",
            panel=MEMORY,
            commands=PLAN_COMMANDS,
        ),
    ] = False
    stream_blocks: Annotated[
        int | None,
        Opt(
            help="Keep only this many blocks on the device; the others' frozen weights wait in host memory and come "
            "ahead of their block. For the strategies single and ddp.",
            panel=MEMORY,
            unit="blocks",
            minimum=0,
            maximum=10_000,
            on_resume="harmless",
            commands=LORA_COMMANDS,
        ),
    ] = None
    fsdp_shard_size: Annotated[
        int | None,
        Opt(
            help="Cut weights, gradients and moments (FSDP) over groups of this many ranks that follow each other, and "
            "keep them once in each group: with the ranks of a machine, only sums of gradients cross machines. Without "
            "it, all ranks are one group.",
            panel=MEMORY,
            unit="ranks",
            minimum=1,
            maximum=MOST_RANKS,
            on_resume="sharding",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    fsdp_prefetch: Annotated[
        int,
        Opt(
            help="Gather the weights of this many blocks ahead (FSDP); each takes a block's memory.",
            panel=MEMORY,
            unit="blocks",
            minimum=0,
            maximum=1_000,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = 0
    fsdp_reduce_dtype: Annotated[
        str,
        Opt(
            help="Type in which FSDP sums gradients over ranks: bf16 halves the traffic and rounds every gradient.",
            panel=MEMORY,
            choices=("fp32", "bf16"),
            commands=PLAN_COMMANDS,
        ),
    ] = "fp32"
    vae_mini_batch: Annotated[
        int,
        Opt(
            help="Clips the VAE encodes at a time.",
            panel=MEMORY,
            minimum=1,
            maximum=10_000,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = 1
    low_vram: Annotated[
        bool,
        Opt(
            help="Keep the encoders in pinned memory of the host, and copies on the accelerator only while they work, "
            "which they do before each step and not beside the last one; a text encoder that the ranks share (FSDP, "
            "ZeRO-3) stays.",
            panel=MEMORY,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = False

    peak_tflops: Annotated[
        float | None,
        Opt(
            help="Peak of one device in dense bf16 matrix products, to tell the share of it that is used (MFU); known "
            "for common GPUs.",
            panel=MEMORY,
            unit="TFLOP/s",
            minimum=0.001,
            maximum=1e6,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None

    strategy: Annotated[
        str,
        Opt(
            help="How weights and work are spread; --ddp, --fsdp, --zero2, --zero3, --zero3-offload are short for it. "
            "auto: single on one GPU or CPU; on several GPUs the first of ddp, zero2, fsdp, zero3 and zero3-offload "
            "that its forecast says fits.",
            panel=PARALLEL,
            choices=tuple(STRATEGIES),
            on_resume="sharding",
            commands=PLAN_COMMANDS,
        ),
    ] = "auto"
    device: Annotated[
        str,
        Opt(
            help="Where to train; auto takes the GPUs if there are any.",
            panel=PARALLEL,
            choices=("auto", "cuda", "cpu"),
            on_resume="sharding",
        ),
    ] = "auto"
    num_processes: Annotated[
        int | None,
        Opt(
            help="Processes over all machines; by default one a GPU, or two on a machine without.",
            panel=PARALLEL,
            minimum=1,
            maximum=MOST_RANKS,
            on_resume="sharding",
        ),
    ] = None
    num_machines: Annotated[
        int,
        Opt(
            help="Machines in the job; start the same command on each, or --emit the file of a scheduler. Left out, "
            "the environment of srun, torchrun, mpirun, SkyPilot or a PyTorchJob says this, the machine's rank, the "
            "address and the port.",
            panel=PARALLEL,
            other_names=("nodes",),
            minimum=1,
            maximum=MOST_RANKS,
            on_resume="sharding",
            commands=PLAN_COMMANDS,
        ),
    ] = 1
    machine_rank: Annotated[
        int,
        Opt(help="Which machine this is, from 0.", panel=PARALLEL, minimum=0, maximum=MOST_RANKS, on_resume="harmless"),
    ] = 0
    main_process_ip: Annotated[str, Opt(help="Address of machine 0.", panel=PARALLEL, on_resume="harmless")] = (
        "127.0.0.1"
    )
    main_process_port: Annotated[
        int | None,
        Opt(
            help="Port on machine 0; for a single machine a free one, for several 29500 where nothing says another.",
            panel=PARALLEL,
            minimum=1,
            maximum=65_535,
            on_resume="harmless",
        ),
    ] = None

    output_dir: Annotated[
        Path,
        Opt(
            help="Run directory: options, plan, metrics, checkpoints.",
            panel=OUTPUT,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = Path("output_dir")
    checkpointing_steps: Annotated[
        int,
        Opt(
            help="Steps between checkpoints.",
            panel=OUTPUT,
            unit="steps",
            minimum=1,
            maximum=1e9,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = 50
    checkpoints_total_limit: Annotated[
        int | None,
        Opt(
            help="Keep this many checkpoints; older ones go after a new one is complete.",
            panel=OUTPUT,
            minimum=1,
            maximum=1e6,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    async_checkpoint: Annotated[
        bool,
        Opt(
            help="Train on while a checkpoint is written; it waits in this machine's memory (/dev/shm) meanwhile.",
            panel=OUTPUT,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = False
    max_hours: Annotated[
        float | None,
        Opt(
            help="Save, stop and exit 75 at the first step boundary after this time; vfun resume continues.",
            panel=OUTPUT,
            unit="hours",
            minimum=0,
            maximum=1e6,
            on_resume="harmless",
        ),
    ] = None
    max_restarts: Annotated[
        int,
        Opt(
            help="Start a crashed run over from its newest checkpoint, at most this often.",
            panel=OUTPUT,
            minimum=0,
            maximum=10_000,
            on_resume="harmless",
        ),
    ] = 0
    resume_from_checkpoint: Annotated[
        str | None,
        Opt(
            help="Continue from a checkpoint of the output directory: a path, or 'latest', which begins anew where "
            "none was saved yet.",
            panel=OUTPUT,
            on_resume="harmless",
        ),
    ] = None
    report_to: Annotated[
        str,
        Opt(
            help="Where curves and samples go beside metrics.jsonl; all: to each of these that is installed.",
            panel=OUTPUT,
            choices=(*TRACKERS, "all", "none"),
            refused=dict.fromkeys(
                ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "trackio"),
                "accelerate knows it, and vfun does not write to it",
            ),
            on_resume="harmless",
        ),
    ] = "tensorboard"
    tracker_project_name: Annotated[
        str,
        Opt(help="Project of the run in wandb and swanlab.", panel=OUTPUT, on_resume="harmless"),
    ] = "vfun"
    logging_dir: Annotated[
        str,
        Opt(
            help="Folder of what tensorboard, wandb and swanlab write, from output_dir.",
            panel=OUTPUT,
            on_resume="harmless",
        ),
    ] = "logs"

    memory: Annotated[
        str | None,
        Opt(
            help="Memory of each GPU, such as 80GiB or 24GB, that a run has to fit into; by default what nvidia-smi "
            "says of the smallest one here.",
            panel=FORECAST,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    fit_check: Annotated[
        bool,
        Opt(
            help="Refuse a run that will not fit into the GPUs before it is launched.",
            panel=FORECAST,
            on_resume="harmless",
        ),
    ] = True
    gpu: Annotated[
        str | None,
        Opt(
            help="Name of the GPUs that a run is planned for, such as H100 or 'RTX 4090'; by default those here.",
            panel=FORECAST,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    mfu: Annotated[
        float | None,
        Opt(
            help="Share of the GPUs' peak that a run uses, to tell how long it takes; by default what earlier steps in "
            "output_dir reached, else what benchmarks/gpu_step.py measured on such a GPU, else 0.3.",
            panel=FORECAST,
            above=0,
            maximum=1,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None
    price: Annotated[
        float | None,
        Opt(
            help="Price of an hour of one GPU, to tell what the run costs.",
            panel=FORECAST,
            minimum=0,
            maximum=1e6,
            on_resume="harmless",
            commands=PLAN_COMMANDS,
        ),
    ] = None

    rank: Annotated[
        int, Opt(help="Rank of the LoRA matrices.", panel=LORA, minimum=1, maximum=65_536, commands=LORA_COMMANDS)
    ] = 64
    network_alpha: Annotated[
        float,
        Opt(
            help="LoRA strength: the update is scaled by network_alpha / rank.",
            panel=LORA,
            above=0,
            maximum=1e6,
            commands=LORA_COMMANDS,
        ),
    ] = 32
    target_name: Annotated[
        tuple[str, ...],
        Opt(
            help="Endings of layer names that get adapters, comma-separated; the model's names or the released ones.",
            panel=LORA,
            commands=LORA_COMMANDS,
        ),
    ] = ()
    lora_skip_name: Annotated[
        tuple[str, ...],
        Opt(
            help="Parts of layer names that get no adapter, of those that target_name chooses; comma-separated, the "
            "model's names or the released ones.",
            panel=LORA,
            commands=LORA_COMMANDS,
        ),
    ] = ()
    network_path: Annotated[
        Path | None,
        Opt(
            help="Start from this LoRA: a checkpoint, or a file of peft, diffusers, ComfyUI or the original scripts.",
            panel=LORA,
            commands=LORA_COMMANDS,
        ),
    ] = None
    lora_dropout: Annotated[
        float,
        Opt(help="Chance to drop an input of the adapters.", panel=LORA, minimum=0, below=1, commands=LORA_COMMANDS),
    ] = 0.0
    use_dora: Annotated[
        bool,
        Opt(help="DoRA: train the length of each weight row beside its direction.", panel=LORA, commands=LORA_COMMANDS),
    ] = False
    use_rslora: Annotated[
        bool, Opt(help="Scale by network_alpha / sqrt(rank) instead.", panel=LORA, commands=LORA_COMMANDS)
    ] = False
    base_precision: Annotated[
        str,
        Opt(
            help="How frozen blocks and their like are kept; fp8 and nf4 need a GPU and the single or ddp strategy.",
            panel=LORA,
            choices=BASE_PRECISIONS,
            commands=LORA_COMMANDS,
        ),
    ] = "bf16"

    @property
    def given_weights(self) -> Given:
        """Weights that were named instead of the model directory's."""
        return Given(transformer=self.transformer_path, vae=self.vae_path)

    @property
    def bf16(self) -> bool:
        """Whether the transformer computes in bf16; else in float32."""
        return self.mixed_precision == "bf16"

    @property
    def trained_modules(self) -> tuple[str, ...]:
        """Parts of the names of all that trains, at whatever rate."""
        return (*self.trainable_modules, *self.trainable_modules_low_learning_rate)

    @property
    def compute_bytes(self) -> int:
        """Of a number in that type."""
        return 2 if self.bf16 else 4

    def parts_of(self, ranks: int) -> int:
        """Into how many parts that which so many ranks shard is cut: under hybrid sharding a group of them does."""
        return self.fsdp_shard_size or ranks

    @property
    def holds_out(self) -> bool:
        """Whether there are rows whose loss is computed and on which nothing is trained."""
        return self.validation_meta is not None or self.validation_rows is not None

    @property
    def trackers(self) -> tuple[str, ...]:
        """Where curves go, by name."""
        if self.report_to == "all":
            return tuple(name for name in TRACKERS if find_spec(name) is not None)
        return (self.report_to,) if self.report_to in TRACKERS else ()

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on."""
        given = (
            self.validation_prompts, self.validation_paths, self.validation_image_paths, self.validation_audio_paths,
        )  # fmt: skip
        return self.holds_out or any(given)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values by option name."""
        return {name: plain(value) for name, value in vars(self).items()}

    def absolute(self) -> "RunConfig":
        """The same with every path from the root: what it means wherever it is read."""
        paths: dict[str, Any] = {name: path.absolute() for name, path in vars(self).items() if isinstance(path, Path)}
        for name in LISTS_OF_PATHS:
            paths[name] = tuple(str(at_home(path).absolute()) for path in getattr(self, name))
        sets = tuple(each.over_paths(Path.absolute) for each in self.train_data_meta)
        return replace(self, **paths, train_data_meta=sets)

    def moved(self, before: Path, after: Path) -> "RunConfig":
        """The same with every path below one folder as it is below another."""

        def place(path: Path) -> Path:
            return after / path.relative_to(before) if path.is_relative_to(before) else path

        paths: dict[str, Any] = {name: place(path) for name, path in vars(self).items() if isinstance(path, Path)}
        return replace(self, **paths, train_data_meta=tuple(each.over_paths(place) for each in self.train_data_meta))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The inverse of :meth:`to_json`; an unknown name is a ConfigError."""
        return cls(**{name: parse(name, value, f"the option {name}") for name, value in values.items()})


Declared = tuple[Field[Any], Any, Opt]
"""An option's dataclass field, type and declaration."""


@cache
def options(command: str | None = None) -> Mapping[str, Declared]:
    """Every option (of one command) by name."""
    hints = typing.get_type_hints(RunConfig, include_extras=True)
    found = {}
    for declared in fields(RunConfig):
        kind, opt = get_args(hints[declared.name])
        if command is None or command in opt.commands:
            found[declared.name] = (declared, kind, opt)
    return MappingProxyType(found)


def default_of(name: str) -> Any:
    """The option's own default, before any family's."""
    default = options()[name][0].default
    return None if default is MISSING else default


def effect_on_resume(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> ResumeEffect:
    """What it means for a run that this option has another value, among all options before and now."""
    effect = options()[name][2].on_resume
    if effect == "contents":
        return "trajectory"  # unless they are known to be the same
    if effect != "length":
        return effect
    ends = now["lr_scheduler"] in ENDING_SCHEDULERS and _length(before) != _length(now)
    return "trajectory" if ends else "harmless"


def _length(config: Mapping[str, Any]) -> tuple[str, Any]:
    """What ends a run."""
    name = "num_train_epochs" if config.get("max_train_steps") is None else "max_train_steps"
    return name, config.get(name, default_of(name))


def parse(name: str, value: Any, where: str) -> Any:
    """A value from text, TOML or JSON as the option's type; ``where`` starts the message of an error.

    Raises:
        ConfigError: unknown option, wrong type, out of range, or not one of the choices.
    """
    known = options()
    if name not in known:
        raise ConfigError(
            f"{where}: unknown option {name!r}.{did_you_mean(name, known)}",
            hint="The options: vfun train --help",
        )
    try:
        return _parsed(name, value, where)
    except ConfigError as error:
        error.option = as_flag(name)
        raise


def _parsed(name: str, value: Any, where: str) -> Any:
    _, kind, opt = options()[name]
    if _holds_data_sets(name):
        return parse_data_sets(value, where)
    if opt.verbatim and plain_kind(kind) is str:
        return _as_typed(value, where)
    if opt.verbatim:
        return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
    parsed = _convert(kind, value if opt.switch is None else _switched(value, opt.switch), where)
    if parsed is not None and opt.choices and parsed not in opt.choices and parsed != default_of(name):
        why = f": {opt.refused[parsed]}" if parsed in opt.refused else ""
        near = "" if why else did_you_mean(str(parsed), opt.choices)
        raise ConfigError(f"{where} is {parsed!r}{why}; choose one of: {', '.join(opt.choices)}.{near}")
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise ConfigError(f"{where} is {parsed}; it takes a finite number.")
    for number in parsed if isinstance(parsed, tuple) else (parsed,):
        if isinstance(number, int | float):
            _check_range(number, opt, where)
    return parsed


def _as_typed(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where} is {value!r}; it takes text, in quotes.")
    if odd := odd_sign(value):
        raise ConfigError(f"{where} holds {odd!a}, which no caption has.")
    return value


def _check_range(value: float, opt: Opt, where: str) -> None:
    if opt.minimum is not None and value < opt.minimum:
        raise ConfigError(f"{where} is {value}, the least that makes sense is {_number(opt.minimum)}.")
    if opt.maximum is not None and value > opt.maximum:
        raise ConfigError(f"{where} is {value}, the most that makes sense is {_number(opt.maximum)}.")
    if opt.above is not None and value <= opt.above:
        raise ConfigError(f"{where} is {value}, it must be more than {_number(opt.above)}.")
    if opt.below is not None and value >= opt.below:
        raise ConfigError(f"{where} is {value}, it must be less than {_number(opt.below)}.")


def _switched(value: Any, switch: tuple[str, str]) -> Any:
    """The value that a switch's true or false stands for; any other as it is."""
    on = value if isinstance(value, bool) else _BOOLEAN_WORDS.get(str(value).lower())
    return value if on is None else switch[on]


def plain_kind(kind: Any) -> type:
    """The type of a value that is there: int, float, bool, str, Path or tuple."""
    if get_origin(kind) is types.UnionType:
        kind = next(arm for arm in get_args(kind) if arm is not types.NoneType)
    found: type = get_origin(kind) or kind
    return found


def _convert(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) is types.UnionType and value is None:
        return None
    arms, kind = get_args(kind), plain_kind(kind)
    if kind is tuple:
        items = value if isinstance(value, list | tuple) else (value,)
        parts = (part.strip() for item in items for part in str(item).split(","))
        return tuple(_convert(arms[0], part, where) for part in parts if part)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in _BOOLEAN_WORDS:
            return _BOOLEAN_WORDS[str(value).lower()]
        raise ConfigError(f"{where} is {value!r}; it takes true or false.")
    if isinstance(value, bool):
        raise ConfigError(f"{where} is {value!r}; it takes {_TYPE_WORDS[kind]}.")
    if value == "":
        raise ConfigError(f"{where} is empty; it takes {_TYPE_WORDS[kind]}.", hint="Leave it out.")
    try:
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return possible(value) if kind is Path else kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where} is {value!r}; it takes {_TYPE_WORDS[kind]}.") from None


_BOOLEAN_WORDS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}

_TYPE_WORDS = {int: "a whole number", float: "a number", str: "text", Path: "a path"}


def plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return sets_to_json(value) if value and isinstance(value[0], DataSet) else list(value)
    return value


def names_paths(name: str) -> bool:
    """Whether an option names files or folders."""
    return _holds_data_sets(name) or plain_kind(options()[name][1]) is Path


def in_words(name: str, value: Any) -> str:
    """A value for people, of the option's type or as JSON has it: data sets as they are typed, any other as it is."""
    return ", ".join(map(str, parse_data_sets(value, name))) if _holds_data_sets(name) else str(value)


def typed_entries(name: str, value: Any) -> list[str]:
    """What a list, of the option's type or as JSON has it, is typed as: the texts behind the option, which is repeated
    for each; one for all, with commas, where an entry can hold none.
    """
    if _holds_data_sets(name):
        return [str(each) for each in parse_data_sets(value, name)]
    return [*map(str, value)] if options()[name][2].verbatim else [",".join(map(str, value))]


def _holds_data_sets(name: str) -> bool:
    return DataSet in get_args(options()[name][1])


def over_paths(name: str, value: Any, change: Callable[[Path], Path]) -> Any:
    """A value as JSON has it, of an option that names files or folders, with these changed."""
    if _holds_data_sets(name):
        return sets_over_paths(value, change)
    return str(change(Path(value))) if isinstance(value, str) else value
