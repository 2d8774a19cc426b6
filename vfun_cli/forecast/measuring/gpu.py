"""A GPU for machines without one: tensors without values, computed by the kernels that CUDA would choose.

torch computes shapes and types of what lies on its ``meta`` device, and nothing else, so that a pass of a 14B model
takes no memory and no time. Where an operation has a kernel of its own on CUDA, ``meta`` would take the parts that it
is made of elsewhere, which keep far more for the backward pass: the scores of all heads, 40 x 36,000 x 36,000 of a
Wan-S2V block, where a fused kernel keeps a number a row.

FakeTensorMode, which knows CUDA, cannot go backward on a torch that has none: autograd asks for the device's streams.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

DEVICE = torch.device("meta")

aten = torch.ops.aten


@contextmanager
def made_up_gpu() -> Iterator[torch.device]:
    """Inside, attention and RMS norms on this device are the kernels of CUDA."""
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", _attention),
        mock.patch.object(functional, "rms_norm", _rms_norm),
    ):
        yield DEVICE


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch chooses on CUDA: flash attention, or memory-efficient attention where there is a mask or float32."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(groups, -3) for each in (key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return _first(aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale))
    bias = attn_mask
    if bias is not None:
        bias = bias.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return _first(
        aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )
    )


def _first(found: Sequence[Tensor]) -> Tensor:
    return found[0]


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """One kernel where input and weight have one type, which keeps its input and a float32 number a row."""
    if weight is None or weight.dtype != input.dtype:
        return torch.rms_norm(input, list(normalized_shape), weight, eps)
    normalised: Tensor = _RMSNorm.apply(input, weight)
    return normalised


class _RMSNorm(torch.autograd.Function):
    """What the fused kernel is given, keeps and gives; no values."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight, input.new_empty(*input.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        input, weight, _ = ctx.saved_tensors
        return torch.empty_like(input), torch.empty_like(weight)
