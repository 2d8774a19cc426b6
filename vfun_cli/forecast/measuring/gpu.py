"""Devices for machines without them: tensors without values, computed by the kernels that a GPU or a CPU would choose.

torch computes shapes and types of what lies on its ``meta`` device, and nothing else, so that a pass of a 14B model
takes no memory and no time. Where an operation has a kernel of its own on CUDA, ``meta`` would take the parts that it
is made of elsewhere, which keep far more for the backward pass: the scores of all heads, 40 x 36,000 x 36,000 of a
Wan-S2V block, where a fused kernel keeps a number a row.

FakeTensorMode, which knows CUDA, cannot go backward on a torch that has none: autograd asks for the device's streams.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from vfun_cli.forecast.measuring.tracker import memory, tensors_in

DEVICE = torch.device("meta")

Device = Callable[[], AbstractContextManager[torch.device]]
"""Where a pass runs: inside, operations on the device are the kernels of what it stands for."""

aten = torch.ops.aten


@contextmanager
def made_up_gpu() -> Iterator[torch.device]:
    """Inside, attention and RMS norms on this device are the kernels of CUDA."""
    with mock.patch.object(functional, "rms_norm", _rms_norm), _made_up(_on_cuda):
        yield DEVICE


@contextmanager
def made_up_cpu() -> Iterator[torch.device]:
    """Inside, attention on this device is the kernel of CPUs. Of RMS norms they have none, and nor has ``meta``."""
    with _made_up(_on_cpus):
        yield DEVICE


@contextmanager
def cpu() -> Iterator[torch.device]:
    """The real one."""
    yield torch.device("cpu")


@contextmanager
def _made_up(kernel: "Kernel") -> Iterator[None]:
    attention = _scaled_dot_product_attention(kernel)
    with mock.patch.object(functional, "scaled_dot_product_attention", attention), _Remembered():
        yield


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None], Sequence[Tensor]]
"""Of query, key, value, mask, dropout, whether it is causal, scale: the output, and what its gradients need."""


def _scaled_dot_product_attention(kernel: Kernel) -> Callable[..., Tensor]:
    """torch's function of that name, by this kernel."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            key, value = _for_all_heads(query, key), _for_all_heads(query, value)
        mask = None if attn_mask is None else attn_mask.to(query.dtype)
        return kernel(query, key, value, mask, dropout_p, is_causal, scale)[0]

    return attention


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Sequence[Tensor]:
    """As torch chooses there: flash attention, or memory-efficient attention where there is a mask or float32."""
    if mask is None and query.dtype != torch.float32:
        flash: Sequence[Tensor] = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout, causal, scale=scale
        )
        return flash
    bias = None if mask is None else mask.expand(*query.shape[:-1], key.shape[-2])
    efficient: Sequence[Tensor] = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout, causal, scale=scale
    )
    return efficient


def _on_cpus(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Sequence[Tensor]:
    """As torch chooses there: flash attention, which has a kernel for every type, and for masks."""
    flash: Sequence[Tensor] = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, causal, attn_mask=mask, scale=scale
    )
    return flash


def _for_all_heads(query: Tensor, few: Tensor) -> Tensor:
    return few.repeat_interleave(query.shape[-3] // few.shape[-3], -3)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """One kernel where input and weight have one type, which keeps its input and a float32 number a row."""
    if weight is not None and weight.dtype != input.dtype:
        return torch.rms_norm(input, list(normalized_shape), weight, eps)
    normalised: Tensor = _RMSNorm.apply(input, weight)
    return normalised


class _RMSNorm(torch.autograd.Function):
    """What the fused kernel is given, keeps and gives; no values."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight, input.new_empty(*input.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        input, weight, _ = ctx.saved_tensors
        return torch.empty_like(input), None if weight is None else torch.empty_like(weight)


class _Remembered(TorchDispatchMode):
    """What came of an operation is made again without asking torch, which finds shapes and types in Python: 0.2 ms for
    each of some 10,000 operations of a measurement, in which layers and passes are alike.
    """

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Run the operation, or make what came of the same one."""
        named = named or {}
        if not _makes_new(operation):
            return operation(*arguments, **named)
        key = operation, _alike(arguments), _alike(named.items())
        recipe = _recipes.get(key)
        if recipe is not None:
            return recipe()
        found = operation(*arguments, **named)
        if key not in _recipes:
            _recipes[key] = _recipe(found, arguments)
        return found


_recipes: dict[Any, Callable[[], Any] | None] = {}
"""How to make the results of each operation on what is alike; a thousand of a few hundred bytes for each question."""


@cache
def _makes_new(operation: Any) -> bool:
    """Whether it is said to be no view, and nothing in place."""
    schema = getattr(operation, "_schema", None)
    return schema is not None and all(each.alias_info is None for each in (*schema.arguments, *schema.returns))


def _alike(given: Any) -> Any:
    """What shape and type of the results may depend on, to be compared. Numbers differ by their types, too."""
    if isinstance(given, Tensor):
        return given.shape, given.stride(), given.dtype, given.device
    if isinstance(given, (str, int, float, complex, type(None))):
        return type(given), given
    return tuple(map(_alike, given)) if hasattr(given, "__iter__") else given


def _recipe(found: Any, arguments: Any) -> Callable[[], Any] | None:
    """None where a result is no memory of its own: ``_unsafe_view`` is a view all the same."""
    results, recipe = tensors_in((found,)), _copier(found)
    own = set(map(memory, results))
    sizes = [each.untyped_storage().nbytes() for each in results]
    apart = len(own) == len(results) and own.isdisjoint(map(memory, tensors_in(arguments)))
    return recipe if apart and sizes == [each.untyped_storage().nbytes() for each in tensors_in((recipe(),))] else None


def _copier(found: Any) -> Callable[[], Any]:
    """Makes the like of it."""
    if isinstance(found, Tensor):
        return partial(torch.empty_strided, found.shape, found.stride(), dtype=found.dtype, device=found.device)
    if isinstance(found, (tuple, list)):
        copiers, kind = [_copier(each) for each in found], type(found)
        return lambda: kind(copier() for copier in copiers)
    return lambda: found
