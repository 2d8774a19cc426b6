"""A cached run trains on the same losses as one that encodes at every step."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import FAMILIES, LiveModel
from trainer_parts import Parts, loaded

from vfun_cli.encoding.cache import Cache
from vfun_cli.encoding.encode import encode, load, outputs_of
from vfun_cli.families import adapter_of
from vfun_cli.modeling.captions import CaptionOptions
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.training.model import adapter_options
from vfun_cli.training.precision import use_in

LIVE = Callable[[str], LiveModel]
TEXTS = ("text", "pooled", "encoder_hidden_states")
"""Inputs that are a caption alone, of one family or another."""
CAPTIONS = ("a red circle moves", "waves")
"""Of two lengths: a text encoder that pads one to the other's length would give it other numbers."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "precision"),
    [
        *((family, "bf16") for family in FAMILIES),
        *(pytest.param(family, "no", marks=[pytest.mark.long] * (family != "wan-s2v")) for family in FAMILIES),
    ],
)
def test_losses_from_a_full_cache_are_those_of_encoding_at_every_step(
    family: str, precision: str, live_model: LIVE, tmp_path: Path
) -> None:
    """The cache is filled clip by clip, as ``vfun cache`` does it; the step reads two clips at once."""
    live = live_model(family)
    config = replace(live.config, mixed_precision=precision)
    kind, options = adapter_of(live.spec), adapter_options(config, live.spec, torch.device("cpu"))
    requests = [live.request(row, 4, 64, 64) for row in range(len(CAPTIONS))]
    requests = [
        replace(request, record={**request.record, "text": caption})
        for request, caption in zip(requests, CAPTIONS, strict=True)
    ]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    setting = replace(options, compute_dtype=dtype)
    encoders = kind.encoders_of(setting)
    cache = Cache.for_encoders(tmp_path / "cache", encoders)
    for request in requests:
        outputs_of(encoders, [load(kind, request, options, cache)], cache.write)

    model, losses = live.transformer(), {}
    for weight in model.parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.to(dtype)
    use_in(dtype, model)
    for name, found in (("encoded", None), ("cached", cache)):
        (tmp_path / name).mkdir()
        adapter: Any = copy.copy(live.adapter)
        adapter.encoders = kind.encoders_of(setting)
        parts = Parts(tmp_path / name, model, live, adapter, live.objective, mixed_precision=precision, cache=found)
        micro_batch = loaded(0, requests, [load(kind, request, options, found) for request in requests])
        with torch.no_grad():
            losses[name] = float(parts.trainer.loss(model, micro_batch)[0])
        assert bool(adapter.encoders.loaded) == (found is None)
    assert losses["cached"] == losses["encoded"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_adds_to_the_cache_what_filling_it_ahead_does(family: str, live_model: LIVE, tmp_path: Path) -> None:
    live = live_model(family)
    kind, options = adapter_of(live.spec), adapter_options(live.config, live.spec, torch.device("cpu"))
    request = live.request(0, 4, 64, 64)
    ahead, beside = (Cache.for_encoders(tmp_path / name, live.adapter.encoders) for name in ("ahead", "beside"))
    sample = load(kind, request, options, ahead)
    outputs_of(live.adapter.encoders, [sample], ahead.write)
    parts = Parts(tmp_path, live.transformer(), live, live.adapter, live.objective, cache=beside)
    parts.trainer.total_steps = 1
    parts.trainer.train(iter([loaded(0, [request], [load(kind, request, options, beside)])]), 0)
    assert len(sample.keys) >= 2
    for key in sample.keys.values():
        torch.testing.assert_close(beside.read(key), ahead.read(key), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_captions_from_a_full_cache_are_those_of_encoding_at_every_step(
    family: str, live_model: LIVE, tmp_path: Path
) -> None:
    """Six epochs of a clip with three captions and two variants: two captions and the empty one are ever read."""
    live = live_model(family)
    kind, encoders = adapter_of(live.spec), live.adapter.encoders
    options = replace(adapter_options(live.config, live.spec, torch.device("cpu")), caption_dropout=0.4)
    several = {**live.request(0, 4, 64, 64).record, "text": ["a, red, circle", "moves, waves", "a sentence"]}
    drawn = CaptionOptions(prefix="ohwx", suffix="film", shuffle_tags=True)
    requests = [
        replace(
            live.request(0, 4, 64, 64), record=several, captions=drawn,
            key=SampleKey(seed=2, epoch=epoch, row=0, variants=2),
        )
        for epoch in range(6)
    ]  # fmt: skip
    cache = Cache.for_encoders(tmp_path, encoders)
    for request in requests:
        outputs_of(encoders, [load(kind, request, options, cache)], cache.write)

    read = set()
    for request in requests:
        plain, found = load(kind, request, options), load(kind, request, options, cache)
        assert not found.keys, "it is all there"
        read |= {each.lazy.value for name, each in found.inputs.items() if name in TEXTS}
        for one, other in zip(
            encode(live.adapter, [plain], [request.key]), encode(live.adapter, [found], [request.key]), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert read == {request.caption for request in requests} | {""} and len(read) == 3
