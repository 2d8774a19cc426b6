"""A question about a step, answered."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.forecast.measuring.encoders import encode_peak, encoder_weights
from vfun_cli.forecast.measuring.model import Weight, blank_options, block_names, layers_alike, weights_of
from vfun_cli.forecast.measuring.passes import measure
from vfun_cli.forecast.measuring.state import kept
from vfun_cli.forecast.request import Measured, Question


def answer(question: Question) -> Measured:
    """Measure it.

    Raises:
        ConfigError: options that choose nothing.
        CheckpointError: no model can be made of the configuration.
    """
    spec, config = families.find(question.family), RunConfig.from_json(question.config)
    weights = weights_of(spec, config, question.stated, lora=question.lora)
    options = blank_options(spec, config, question.stated)
    alike = layers_alike(spec, question.stated, weights)
    held = measure(spec, config, question.stated, question.batch, lora=question.lora, alike=alike)
    return Measured(
        **asdict(kept(config, weights, question.ranks)),
        **asdict(held),
        **_units(weights, block_names(spec, config, question.stated)),
        encode=encode_peak(spec, options, question.batch),
        encoders=encoder_weights(spec, options, question.model_dir),
        parameters=sum(weight.numel for weight in weights),
        trained=sum(weight.numel for weight in weights if weight.trained),
    )


def _units(weights: Sequence[Weight], blocks: Sequence[str]) -> Mapping[str, Any]:
    """Numbers of the heaviest block and of what lies outside of blocks."""
    inside: dict[str, int] = defaultdict(int)
    trained: dict[str, int] = defaultdict(int)
    starts = tuple(f"{block}." for block in blocks)
    for weight in weights:
        block = ".".join(weight.name.split(".")[:2]) if weight.name.startswith(starts) else ""
        inside[block] += weight.numel
        trained[block] += weight.numel * weight.trained
    heaviest = max((block for block in inside if block), key=lambda block: inside[block], default="")
    return {
        "largest_block": inside[heaviest] if heaviest else 0,
        "trained_in_block": trained[heaviest] if heaviest else 0,
        "outside": inside[""],
        "trained_outside": trained[""],
    }
