"""In which type what is computed: one policy for every strategy, stated in docs/numerics.md (Precision).

Nothing is autocast: autocast returns float32 from norms on CUDA and bfloat16 on a CPU, and FSDP and ZeRO, whose weights
are in the compute dtype where they are used, would compute otherwise than one process does. So one process and DDP use
weights as those do: FSDP by its own policy (training/strategy.py), DeepSpeed by keeping bfloat16 weights, and
``use_in`` for masters that are whole. Inputs are cast by the trainer; what a family computes in float32 its code casts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES


def compute_dtype(config: RunConfig) -> torch.dtype:
    """What the transformer computes in, and what frozen weights are kept in."""
    return torch.bfloat16 if config.bf16 else torch.float32


def kept_dtype(config: RunConfig, *, trained: bool) -> torch.dtype:
    """What a weight of the transformer is read in. DeepSpeed makes its float32 masters itself, of what it is given."""
    masters = trained and STRATEGIES[config.strategy].wrapper != "deepspeed"
    return torch.float32 if masters else compute_dtype(config)


def use_in(dtype: torch.dtype, transformer: nn.Module) -> None:
    """Let float32 weights that train be used as copies in ``dtype``; gradients flow back to the float32 ones.

    Copies are made when a layer of a list (a transformer block) begins its forward pass, and let go when it ends, so
    that a block that is computed again for its gradient has them only then: 2 bytes for each weight of one block.
    What lies outside of lists is copied once a pass and kept by the graph to the end of the backward pass, as FSDP
    keeps its root.

    To be called when the weights to train are chosen; ``prepare_blocks`` places it among recomputation and compilation.
    """
    layers = _layers(transformer)
    for module, left_out in [(transformer, tuple(layers)), *((layer, ()) for layer in layers.values())]:
        weights = tuple(
            name
            for name, weight in module.named_parameters()
            if weight.requires_grad and weight.dtype != dtype and not name.startswith(left_out)
        )
        if weights:
            forward = cast(MethodType, module.forward).__func__
            module.forward = MethodType(_with_copies(forward, weights, dtype), module)


def is_weight(tensor: Tensor) -> bool:
    """Whether it is a weight, a copy of one that ``use_in`` made, or a view of either."""
    owner = tensor if tensor._base is None else tensor._base
    made_by = owner.grad_fn
    if isinstance(owner, nn.Parameter) or made_by is None:
        return isinstance(owner, nn.Parameter)
    return made_by.name() == "ToCopyBackward0" and hasattr(made_by.next_functions[0][0], "variable")


def _layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """Of the lists outside of other lists, which are called one by one; by how the names of their weights begin."""
    found, rest = dict[str, nn.Module](), [("", transformer)]
    while rest:
        path, module = rest.pop()
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                found |= {f"{path}{name}.{index}.": layer for index, layer in child.named_children()}
            else:
                rest.append((f"{path}{name}.", child))
    return found


@cache
def _with_copies(forward: Callable[..., Any], weights: Sequence[str], dtype: torch.dtype) -> Callable[..., Any]:
    """One function for all layers of a kind: torch 2.9 compiles anew for each other one that it meets."""

    @wraps(forward)
    def run(module: nn.Module, *arguments: Any, **named: Any) -> Any:
        with _copies(module, weights, dtype):
            return forward(module, *arguments, **named)

    return run


@contextmanager
def _copies(module: nn.Module, weights: Sequence[str], dtype: torch.dtype) -> Iterator[None]:
    # In the dictionary itself: as an attribute a module takes nothing but a Parameter, which would cut the graph.
    paths = [weight.rpartition(".") for weight in weights]
    places = [(module.get_submodule(path)._parameters, name) for path, _, name in paths]
    masters = [parameters[name] for parameters, name in places]
    for (parameters, name), master in zip(places, masters, strict=True):
        parameters[name] = master.to(dtype)  # type: ignore[union-attr, assignment]
    try:
        yield
    finally:
        for (parameters, name), master in zip(places, masters, strict=True):
            parameters[name] = master
