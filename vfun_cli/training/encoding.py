"""From requests to what the transformer reads: cook what is missing, encode it, put it together."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vfun_cli.training.adapter import Conditions, Inputs, ModelAdapter, SampleRequest
from vfun_cli.training.encoders.frozen import Encoders, Output
from vfun_cli.training.randomness import SampleKey
from vfun_cli.training.recipes import cook


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One clip on its way from the loader to the encoders."""

    inputs: Inputs
    values: dict[str, Any]
    """What the encoders must read, decoded, by the inputs' names."""
    found: dict[str, Output] = field(default_factory=dict)
    """What needs no encoder any more."""


def load(adapter: type[ModelAdapter], request: SampleRequest, options: Mapping[str, Any]) -> Sample:
    """Decode one clip. Raises MetadataError for media that cannot be decoded."""
    return prepared(adapter.inputs(request, options))


def prepared(inputs: Inputs) -> Sample:
    """A sample with everything decoded. Raises MetadataError for media that cannot be."""
    return Sample(inputs=inputs, values=cook({name: each.recipe for name, each in inputs.items()}))


def encode(adapter: ModelAdapter, samples: Sequence[Sample], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
    """Latents [B, C, F, H, W] float32 and conditions of one micro-batch, on the encoders' device; no gradients."""
    return adapter.assemble(outputs_of(adapter.encoders, samples), keys)


def outputs_of(encoders: Encoders, samples: Sequence[Sample]) -> list[dict[str, Output]]:
    """For each sample the output of each input; an encoder sees the inputs of the whole micro-batch at once."""
    outputs: list[dict[str, Output]] = [
        {name: _moved(output, encoders) for name, output in sample.found.items()} for sample in samples
    ]
    jobs: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for index, sample in enumerate(samples):
        for name, value in sample.values.items():
            encoder = sample.inputs[name].encoder
            if encoder is None:
                outputs[index][name] = _moved({"value": value}, encoders)
            else:
                jobs[encoder].append((index, name))
    for encoder, places in jobs.items():
        made = encoders.run(encoder, [samples[index].values[name] for index, name in places])
        for (index, name), output in zip(places, made, strict=True):
            outputs[index][name] = output
    return outputs


def _moved(output: Output, encoders: Encoders) -> Output:
    return {name: tensor.to(encoders.device, non_blocking=True) for name, tensor in output.items()}
