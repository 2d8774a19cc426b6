"""What is done to every transformer block before a strategy wraps the model: recomputation and compilation.

Both replace the block's ``forward``, not the block: its class, its names in a state dict and the hooks by which FSDP
gathers its weights stay where they are, outside of what is recomputed or compiled.
"""

import shutil
from collections.abc import Callable, Collection
from functools import cache, wraps
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from vfun_cli.errors import EnvironmentFault, first_line

aten = torch.ops.aten

KEPT_PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_fused_attention_overrideable.default,
    }
)
"""What selective checkpointing keeps: the results of matrix products and attention, nearly all of a block's FLOPs.
Norms, modulation, rotations, activations and casts, nearly all of its tensors, are computed again."""


VARIANTS = 8
"""Graphs of one kind of block, at most, whatever the shapes: a block may get its tokens as a view or not, one clip or
several, an attention mask or none. EasyAnimate's last block has no text half, a forward without gradients is another.
Six are the most seen: CogVideoX with both numbers of clips, once without gradients."""

EXACT: tuple[tuple[str, Any, str], ...] = (
    ("triton.mix_order_reduction", False, "2.10"),
    ("cpp.max_horizontal_fusion_size", 1, "2.9"),
)
"""Fusions of inductor that torch (2.13) gets wrong, switched off: the setting, its value, the torch that first has it.

The first: on GPUs, where normalised and modulated tokens are reduced over two axes in one kernel, gradients of the
modulation are not written at all, as reported for Wan 2.1 (pytorch issue 193061, torch 2.10 to 2.13). The second: on
CPUs, the gradient of a block's input is off by 2 to 20 % in float32 (measured: EasyAnimate, HunyuanVideo).
"""


def find_blocks(transformer: nn.Module, block_classes: Collection[str]) -> list[nn.Module]:
    """The transformer's blocks in order."""
    return [module for module in transformer.modules() if type(module).__name__ in block_classes]


def checkpoint_blocks(transformer: nn.Module, block_classes: Collection[str], how: str) -> None:
    """``block``: keep what enters a block and compute it again; ``selective``: keep its products; ``none``: all."""
    if how == "block":
        cast(Any, transformer).enable_gradient_checkpointing()
    elif how == "selective":
        for block in find_blocks(transformer, block_classes):
            block.forward = MethodType(_recomputed(cast(MethodType, block.forward).__func__), block)


@cache
def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """One function for all blocks of a kind: torch 2.9 compiles anew for each other one that it meets."""

    @wraps(forward)
    def run(*arguments: Any, **named: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=_selective_contexts, **named)

    return run


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT_PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(transformer: nn.Module, block_classes: Collection[str], *, backend: str = "inductor") -> None:
    """Compile each kind of block once, for every shape; blocks of a kind share what is compiled.

    Whatever cannot be compiled, or is compiled more often than ``VARIANTS`` explain, ends the run: nothing falls back
    to slow execution unseen.

    Raises:
        EnvironmentFault: no C++ compiler where one is needed, or a torch that lacks a setting of ``EXACT``.
    """
    if backend == "inductor":
        require_compiler("--compile")
    import torch._dynamo.config as limits
    import torch.fx.experimental._config as shapes

    limits.fail_on_recompile_limit_hit = True
    limits.recompile_limit = VARIANTS * len(block_classes)
    limits.accumulated_recompile_limit = limits.recompile_limit
    # Otherwise as many tokens as the hidden size, say, would count as equal by design, and the next shape as another.
    shapes.use_duck_shape = False
    settings = exact_settings() if backend == "inductor" else None
    for block in find_blocks(transformer, block_classes):
        block.forward = torch.compile(block.forward, backend=backend, options=settings, fullgraph=True, dynamic=True)


def exact_settings() -> dict[str, Any]:
    """``EXACT`` as this torch's inductor takes it.

    Raises:
        EnvironmentFault: a setting is gone: what it switches off may be there under another name.
    """
    import torch._inductor as inductor

    settings = {name: value for name, value, since in EXACT if torch.__version__ >= since}
    gone = sorted(settings.keys() - set(inductor.list_options()))
    if gone:
        raise EnvironmentFault(
            "--compile leaves out what torch's compiler gets wrong, and torch "
            f"{torch.__version__} has no setting {', '.join(gone)}.",
            hint="Train without --compile, or install an older torch.",
        )
    return settings


def require_compiler(option: str) -> None:
    """Refuse to compile without a C++ compiler: torch.compile would fail deep in the first step.

    Args:
        option: that asks for it.

    Raises:
        EnvironmentFault: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    install = f"Install g++ (or set CXX), or train without {option}."
    try:
        compiler = get_cpp_compiler()
    except Exception as error:
        raise EnvironmentFault(f"{option} needs a C++ compiler: {first_line(error)}.", hint=install) from error
    if shutil.which(compiler) is None:
        raise EnvironmentFault(f"{option} needs a C++ compiler, and {compiler} is not there.", hint=install)
