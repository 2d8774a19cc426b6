"""The original scripts' flags that are no option of a run: how each is typed, and what becomes of it.

``FLAGS`` has one :class:`Flag` for each, by name with underscores. Together with ``config.options.options()`` and
``CHOOSING_FLAGS`` of ``commands.signature`` it knows every flag that the scripts' parsers declare. What a flag means
with a value, in a family, :func:`meaning` says in words and prints nothing:

* ``same``: its one right value was typed; the run does just that.
* ``idle``: taken without effect, because vfun does it otherwise or needs nothing of it; ``words`` say which.
* ``dead``: taken without effect; it has none in the original scripts either.
* ``refused``: with it a run would be another one than was asked for; ``words`` say why, ``hint`` what to do.

Values that the scripts take for an option of a run and vfun does not are ``Opt.refused`` of that option.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from vfun_cli.config.options import RunConfig
from vfun_cli.errors import ConfigError, as_flag
from vfun_cli.families.spec import FamilySpec

NOISE_LEVELS = 1000
"""Of every released model's schedule."""

LEAVE_OUT = "Leave it out."


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag of the original scripts beside the options of a run."""

    fate: Literal["fixed", "idle", "dead", "refused"]
    """Taken at its one right value alone (see :func:`right_values`), or at any without effect, or at none."""
    why: str = ""
    hint: str = LEAVE_OUT
    switch: bool = False
    """It stands alone; else a value follows."""


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What becomes of a flag that was typed."""

    kind: Literal["same", "idle", "dead", "refused"]
    words: str
    """A sentence that begins with the flag as it is typed. A value that may be a secret is not in it."""
    hint: str | None = None
    """The next step where it is refused."""


def _fixed(why: str) -> Flag:
    return Flag(fate="fixed", why=why)


def _idle(why: str, *, switch: bool = False) -> Flag:
    return Flag(fate="idle", why=why, switch=switch)


def _dead(*, switch: bool = False) -> Flag:
    return Flag(fate="dead", switch=switch)


FLAGS: Mapping[str, Flag] = {
    "boundary_type": _fixed("the model has one expert, for all timesteps"),
    "motion_frames": _fixed("the released model reads so many frames of history"),
    "tokenizer_max_length": _fixed("the model reads so many tokens of a caption"),
    "train_sampling_steps": _fixed("the released models know so many noise levels"),
    "num_hidden_layers_to_skip": _fixed("the model reads this state of its text encoder, counted from the last"),
    "image_embed_interleave": _fixed("the model reads one in so many tokens of the image"),
    "scale_lr": Flag(
        fate="refused",
        switch=True,
        why="multiplies the learning rate by processes, accumulation and batch; here --learning-rate is what the "
        "optimizer gets",
        hint="Leave it out, and type the product as --learning-rate.",
    ),
    "train_text_encoder": Flag(
        fate="refused",
        switch=True,
        why="puts adapters on the text encoder too; here encoders are frozen, and exports hold the transformer alone",
        hint="Leave it out to train the transformer alone.",
    ),
    "config_path": _idle("the model directory's own configuration is used"),
    "use_peft_lora": _idle("LoRA always goes through peft", switch=True),
    "add_full_ref_image_in_self_attention": _idle(
        "the reference is fed wherever the checkpoint has ref_conv", switch=True
    ),
    "keep_all_node_same_token_length": _idle("the plan gives all ranks equal cost anyway", switch=True),
    "abnormal_norm_clip_start": _idle("max_grad_norm holds at every step; no schedule raises or lowers it"),
    "initial_grad_norm_ratio": _idle("max_grad_norm holds from the first step on"),
    "allow_tf32": _idle("what is computed in float32 is computed exactly, and bf16 gains nothing by it", switch=True),
    "auto_tile_batch_size": _idle(
        "no clip is repeated in a batch; --tokens-per-batch fills it with others", switch=True
    ),
    "enable_text_encoder_in_dataloader": _idle(
        "captions are encoded beside the step before, and once with --cache", switch=True
    ),
    "multi_stream": _idle("on a GPU, encoders work beside the step before anyway", switch=True),
    "save_state": _idle("every checkpoint holds the optimizer", switch=True),
    "report_model_info": _idle(
        "metrics.jsonl has the norm of all gradients at each step, not of each weight's", switch=True
    ),
    "enable_xformers_memory_efficient_attention": _idle("torch has such an attention of its own", switch=True),
    "local_rank": _idle("the launcher tells each process its rank"),
    "revision": _idle("nothing is downloaded: the model directory is what it is"),
    "variant": _idle("nothing is downloaded: the model directory is what it is"),
    "non_ema_revision": _idle("nothing is downloaded: the model directory is what it is"),
    "hub_token": _idle("nothing is uploaded or downloaded"),
    "cache_dir": _dead(),
    "hub_model_id": _dead(),
    "image_repeat_in_forward": _dead(),
    "input_perturbation": _dead(),
    "max_train_samples": _dead(),
    "noise_offset": _dead(),
    "not_sigma_loss": _dead(switch=True),
    "prediction_type": _dead(),
    "push_to_hub": _dead(switch=True),
    "random_flip": _dead(switch=True),
    "snr_loss": _dead(switch=True),
}
"""By name, with underscores."""


def right_values(spec: FamilySpec) -> Mapping[str, object]:
    """The one right value of each fixed flag that the family's scripts have."""
    caption = spec.model.captions(spec.model.dims)[0]
    return {"tokenizer_max_length": caption.limit, "train_sampling_steps": NOISE_LEVELS, **spec.fixed_flags}


def meaning(name: str, value: str | bool, spec: FamilySpec, config: RunConfig | None = None) -> Meaning:
    """What becomes of a flag with a value in a family.

    Args:
        name: one of ``FLAGS``.
        value: as it was typed; True for a switch.
        config: the options that it was typed with, where they are known: what it would have done with them.
    """
    flag, typed = FLAGS[name], as_flag(name)
    match flag.fate:
        case "fixed":
            return _meaning_of_fixed(typed, value, flag, right_values(spec).get(name), spec)
        case "idle":
            return Meaning(kind="idle", words=f"{typed} has no effect: {flag.why}.")
        case "dead":
            return Meaning(kind="dead", words=f"{typed} has no effect, as in the original scripts.")
        case "refused":
            hint = _scaled_rate(config) if name == "scale_lr" and config is not None else flag.hint
            return Meaning(kind="refused", words=f"{typed} {flag.why}.", hint=hint)


def _meaning_of_fixed(typed: str, value: str | bool, flag: Flag, right: object, spec: FamilySpec) -> Meaning:
    if right is None:
        return Meaning(kind="idle", words=f"{typed} has no effect: it is no flag of {spec.name}'s scripts.")
    if str(value) == str(right):
        return Meaning(kind="same", words=f"{typed} is {right} in any case.")
    return Meaning(
        kind="refused",
        words=f"{typed} is {value}; for {spec.name} it is {right}: {flag.why}.",
        hint=LEAVE_OUT,
    )


def _scaled_rate(config: RunConfig) -> str:
    """The rate that ``--scale_lr`` would have trained with, as it is typed."""
    factors = (config.num_processes or 1, config.gradient_accumulation_steps, config.train_batch_size)
    rate = config.learning_rate * factors[0] * factors[1] * factors[2]
    product = " x ".join(map(str, factors))
    return f"Leave it out, and type --learning-rate {rate:.6g}: {config.learning_rate:g} x {product}."


def settle(typed: Mapping[str, str | bool], spec: FamilySpec, config: RunConfig) -> list[str]:
    """What to tell of the flags that were typed: a line for each without effect, one for all that are dead.

    Raises:
        ConfigError: one is refused.
    """
    meanings = {name: meaning(name, value, spec, config) for name, value in typed.items()}
    for name, found in meanings.items():
        if found.kind == "refused":
            raise ConfigError(found.words, hint=found.hint, option=as_flag(name))
    lines = [found.words for found in meanings.values() if found.kind == "idle"]
    dead = [name for name, found in meanings.items() if found.kind == "dead"]
    return [*lines, *([_no_effect(dead)] if dead else [])]


def _no_effect(names: Iterable[str]) -> str:
    flags = ", ".join(as_flag(name) for name in names)
    return f"Without effect, as in the original scripts: {flags}."
