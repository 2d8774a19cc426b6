"""Whose LoRA file it is, by its keys and header, and how strong where neither alphas nor a configuration say it.

Read in the programs themselves:

| program | keys | strength |
|---|---|---|
| finetrainers | diffusers'; ``lora_config`` in the header | lora_alpha / r of the header |
| diffusers | ``transformer.<layer>.lora_A.weight``; maybe ``lora_adapter_metadata`` | of the header, else 1 |
| DiffSynth-Studio | ``<layer>.lora_A.default.weight`` | 1: its alpha is its rank, its loader multiplies by nothing |
| diffusion-pipe, ai-toolkit, ComfyUI | ``diffusion_model.<layer>.lora_A.weight`` | 1: they force alpha to the rank |
| musubi-tuner, kohya | ``lora_unet_<layer>.lora_down.weight``, ``alpha`` | alpha / rank; 1 without alphas |
| VideoX-Fun, EasyAnimate | ``lora_unet__<layer>.lora_down.weight``, ``alpha`` | alpha / rank |
| the same with peft | ``<layer>.lora_A.weight``, ``lora_unet__`` without alphas | not in the file |
| peft | ``base_model.model.<layer>.lora_A.weight`` | of the ``adapter_config.json`` beside it |
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FINETRAINERS_METADATA = "lora_config"
DIFFUSERS_METADATA = "lora_adapter_metadata"
"""Keys of the safetensors header under which a configuration of peft lies."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the files of a trainer look, and what it and its loader take where a file states no strength."""

    trainer: str
    key: re.Pattern[str]
    """Of the start of a key."""
    header: str | None = None
    """A key of the header that such a file has."""
    strength: float | None = None
    """None: nobody can tell."""
    because: str = ""
    """Why that, for people."""


LAYOUTS = (
    Layout(trainer="finetrainers", key=re.compile(""), header=FINETRAINERS_METADATA),
    Layout(
        trainer="diffusers",
        key=re.compile(r"transformer\."),
        strength=1.0,
        because="which loaders of such files take where no alpha is stated",
    ),
    Layout(
        trainer="ComfyUI's style (diffusion-pipe, ai-toolkit)",
        key=re.compile(r"diffusion_model\."),
        strength=1.0,
        because="which loaders of such files take where no alpha is stated",
    ),
    Layout(trainer="the original scripts", key=re.compile("lora_unet__")),
    Layout(
        trainer="musubi-tuner or kohya's scripts",
        key=re.compile("lora_unet_"),
        strength=1.0,
        because="which its loader takes where no alpha is stated",
    ),
    Layout(trainer="peft", key=re.compile(r"base_model\.model\.")),
    Layout(
        trainer="DiffSynth-Studio",
        key=re.compile(r".+\.lora_[AB]\.default\.weight"),
        strength=1.0,
        because="as it trains with an alpha that equals the rank",
    ),
)
"""The first that fits counts."""

ANY = Layout(trainer="the original scripts with peft", key=re.compile(""))
"""Keys without a prefix: bare names of layers."""


def layout_of(names: Iterable[str], header: Mapping[str, str]) -> Layout:
    """The layout of a file, from the names of its tensors and its header."""
    found = list(names)
    return next((each for each in LAYOUTS if _fits(each, found, header)), ANY)


def _fits(layout: Layout, names: Iterable[str], header: Mapping[str, str]) -> bool:
    stated = layout.header is None or layout.header in header
    return stated and any(layout.key.match(name) for name in names)
