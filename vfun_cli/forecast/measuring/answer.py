"""A question about a step, answered."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from vfun_cli import families
from vfun_cli.config.options import RunConfig, default_of
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.measuring.encoders import decode_peak, encode_peak, encoder_weights
from vfun_cli.forecast.measuring.model import (
    Weight,
    blank_options,
    layers_alike,
    moved_by_streaming,
    weights_of,
)
from vfun_cli.forecast.measuring.passes import Held, measure, predict_peak
from vfun_cli.forecast.measuring.state import kept
from vfun_cli.forecast.request import Batch, Measured, Question
from vfun_cli.training.streaming import Moved


def answer(question: Question) -> Measured:
    """Measure it.

    Raises:
        ConfigError: options that choose nothing.
        CheckpointError: no model can be made of the configuration.
    """
    config, stated = RunConfig.from_json(question.config), json.dumps(question.stated)
    model = Model(family=question.family, stated=stated, lora=question.lora)
    weights = _weights(model, _unplaced(config))
    moved, state = _moved(model, config), kept(config, weights, question.ranks)
    return Measured(
        **asdict(replace(state, weights=state.weights - moved.host + moved.ring)),
        streamed=moved.host,
        **asdict(_held(model, _alike_placed(config), question.batch)),
        **_units(weights),
        predict=_predict(model, _alike_placed(config), question.batch) if question.samples else 0,
        decode=_decode(question.family, config.bf16, question.batch) if question.samples else 0,
        encode=_encode(question.family, config.bf16, config.vae_mini_batch, question.batch),
        encoders=_encoders(model, question.model_dir),
        parameters=sum(weight.numel for weight in weights),
        trained=sum(weight.numel for weight in weights if weight.trained),
    )


@dataclass(frozen=True)
class Model:
    """A model as a key: settings are compared that differ in little, and most of the answer stays."""

    family: str
    stated: str
    """The JSON of its ``config.json``."""
    lora: bool

    @property
    def parts(self) -> tuple[FamilySpec, dict[str, Any]]:
        """The family, and the configuration."""
        return families.find(self.family), json.loads(self.stated)


def _unplaced(config: RunConfig) -> RunConfig:
    """What decides which weights there are, whatever the strategy."""
    return replace(config, strategy="single", gradient_checkpointing=default_of("gradient_checkpointing"))


def _alike_placed(config: RunConfig) -> RunConfig:
    """What decides what a pass holds: of the strategy, whether each rank has all masters."""
    return replace(config, strategy="single" if STRATEGIES[config.strategy].whole_weights else "fsdp")


@cache
def _weights(model: Model, config: RunConfig) -> list[Weight]:
    spec, stated = model.parts
    return weights_of(spec, config, stated, lora=model.lora)


@cache
def _held(model: Model, config: RunConfig, batch: Batch) -> Held:
    spec, stated = model.parts
    alike = layers_alike(spec, stated, _weights(model, _unplaced(config)))
    return measure(spec, config, stated, batch, lora=model.lora, alike=alike)


@cache
def _moved(model: Model, config: RunConfig) -> Moved:
    spec, stated = model.parts
    return moved_by_streaming(spec, config, stated)


@cache
def _predict(model: Model, config: RunConfig, batch: Batch) -> int:
    spec, stated = model.parts
    return predict_peak(spec, config, stated, batch, lora=model.lora)


@cache
def _decode(family: str, bf16: bool, batch: Batch) -> int:
    config, spec = RunConfig(mixed_precision="bf16" if bf16 else "no"), families.find(family)
    return decode_peak(spec, blank_options(spec, config, spec.model.released), batch)


@cache
def _encode(family: str, bf16: bool, mini_batch: int, batch: Batch) -> int:
    config = RunConfig(mixed_precision="bf16" if bf16 else "no", vae_mini_batch=mini_batch)
    spec = families.find(family)
    return encode_peak(spec, blank_options(spec, config, spec.model.released), batch)


@cache
def _encoders(model: Model, model_dir: str | None) -> dict[str, int]:
    spec, stated = model.parts
    return encoder_weights(spec, blank_options(spec, RunConfig(), stated), model_dir)


def _units(weights: Sequence[Weight]) -> Mapping[str, int]:
    """Numbers of the heaviest unit that FSDP gathers, a block as a rule, and of what lies outside of them."""
    inside, trained = Counter[str](), Counter[str]()
    for weight in weights:
        inside[weight.block] += weight.numel
        trained[weight.block] += weight.numel * weight.trained
    heaviest = max(filter(None, inside), key=lambda block: inside[block], default=None)
    return {
        "largest_block": 0 if heaviest is None else inside[heaviest],
        "trained_in_block": 0 if heaviest is None else trained[heaviest],
        "outside": inside[""],
        "trained_outside": trained[""],
    }
