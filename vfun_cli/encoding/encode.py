"""From requests to the transformer's inputs: decode what the cache lacks, encode it, assemble."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor

from vfun_cli.encoding.cache import Cache
from vfun_cli.modeling.adapter import AdapterOptions, Conditions, Inputs, ModelAdapter, SampleRequest
from vfun_cli.modeling.encoders.frozen import Encoders, Output
from vfun_cli.modeling.inputs import load_inputs
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.transfer import upload

Add: TypeAlias = Callable[[str, Output], None]
"""Gets an output that a cache lacks, still on the device, by its key."""

NO_SHARED_CALLS: Mapping[str, int] = MappingProxyType({})
"""For ranks that share no encoder."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One clip on its way from the loader to the encoders."""

    inputs: Inputs
    values: dict[str, Any]
    """What the encoders must read, decoded, by the inputs' names."""
    found: dict[str, Output] = field(default_factory=dict)
    """Outputs that were in the cache."""
    keys: dict[str, str] = field(default_factory=dict)
    """Cache keys of the inputs that are encoded now."""


def load(
    adapter: type[ModelAdapter], request: SampleRequest, options: AdapterOptions, cache: Cache | None = None
) -> Sample:
    """Decode of one clip what the cache does not have.

    Raises:
        MetadataError: media that cannot be decoded.
    """
    return prepared(adapter.inputs(request, options), cache)


def prepared(inputs: Inputs, cache: Cache | None = None) -> Sample:
    """A sample of which everything is decoded or found.

    Raises:
        MetadataError: media that cannot be decoded.
    """
    found: dict[str, Output] = {}
    keys: dict[str, str] = {}
    if cache is not None:
        keys = {name: cache.key(each) for name, each in inputs.items() if each.encoder is not None}
        found = {name: output for name, key in keys.items() if (output := cache.read(key)) is not None}
    values = load_inputs({name: each.lazy for name, each in inputs.items() if name not in found})
    return Sample(
        inputs=inputs, values=values, found=found, keys={name: key for name, key in keys.items() if name in values}
    )


def encode(
    adapter: ModelAdapter,
    samples: Sequence[Sample],
    keys: Sequence[SampleKey],
    add: Add | None = None,
    shared_calls: Mapping[str, int] = NO_SHARED_CALLS,
) -> tuple[Tensor, Conditions]:
    """Latents [B, C, F, H, W] float32 and conditions of one micro-batch, on the encoders' device; no gradients.

    ``add`` and ``shared_calls``: see ``outputs_of``.
    """
    return adapter.assemble(outputs_of(adapter.encoders, samples, add, shared_calls), keys)


def outputs_of(
    encoders: Encoders,
    samples: Sequence[Sample],
    add: Add | None = None,
    shared_calls: Mapping[str, int] = NO_SHARED_CALLS,
) -> list[dict[str, Output]]:
    """For each sample the output of each input; an encoder sees the inputs of the whole micro-batch at once.

    Args:
        add: gets what the cache lacks that the samples were loaded with.
        shared_calls: how often each encoder that the ranks share computes on all of them.
    """
    # Those that the ranks share come last: they wait for collectives, and nothing should wait behind them.
    names = sorted(encoders, key=lambda name: name in encoders.shared)
    made = outputs_by(encoders, names, samples, add, shared_calls)
    return [given | by_encoders for given, by_encoders in zip(given_outputs(encoders, samples), made, strict=True)]


def given_outputs(encoders: Encoders, samples: Sequence[Sample]) -> list[dict[str, Output]]:
    """For each sample the outputs that no encoder has to make: those found in a cache, and plain values."""
    return [
        {name: _moved(output, encoders) for name, output in sample.found.items()}
        | {
            name: _moved({"value": value}, encoders)
            for name, value in sample.values.items()
            if sample.inputs[name].encoder is None
        }
        for sample in samples
    ]


def outputs_by(
    encoders: Encoders,
    names: Iterable[str],
    samples: Sequence[Sample],
    add: Add | None = None,
    shared_calls: Mapping[str, int] = NO_SHARED_CALLS,
) -> list[dict[str, Output]]:
    """The part of ``outputs_of`` that these encoders make, one after the other."""
    outputs: list[dict[str, Output]] = [{} for _ in samples]
    for encoder in names:
        places = [
            (index, name)
            for index, sample in enumerate(samples)
            for name in sample.values
            if sample.inputs[name].encoder == encoder
        ]
        made = encoders.run(
            encoder, [samples[index].values[name] for index, name in places], shared_calls.get(encoder, 0)
        )
        for (index, name), output in zip(places, made, strict=True):
            outputs[index][name] = output
            if add is not None:
                add(samples[index].keys[name], output)
    return outputs


def shared_call_counts(encoders: Encoders, samples: Sequence[Sample]) -> list[int]:
    """How often a micro-batch uses each of the encoders that the ranks share."""
    wanted = [sample.inputs[name].encoder for sample in samples for name in sample.values]
    return [wanted.count(name) for name in encoders.shared]


def _moved(output: Output, encoders: Encoders) -> Output:
    return {name: upload(tensor, encoders.device) for name, tensor in output.items()}
