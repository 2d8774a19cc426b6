"""What is done to every transformer layer before a strategy wraps the model: recomputation, offload and compilation.

A layer is what a transformer hands to its checkpointing function: a block, and in Wan-S2V the audio injection after
it. Compilation replaces a block's ``forward``, not the block: its class, its names in a state dict and the hooks by
which FSDP gathers its weights stay where they are, outside of what is compiled. There recomputation must be part of
what is compiled; elsewhere it goes around whole layers.
"""

import shutil
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial, wraps
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from vfun_cli.errors import EnvironmentFault, first_line
from vfun_cli.training.offload import Offload, alias, unchanged

aten = torch.ops.aten

MATRIX_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})

ATTENDED = ({"query", "key", "value"}, {"q", "k", "v"})
"""Names of the first three arguments of an attention, in any order, in every kernel of torch's
``scaled_dot_product_attention`` and in those of other packages. Its backward begins with the gradient."""


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


def find_layers(transformer: nn.Module, block_classes: Collection[str]) -> list[tuple[nn.Module, ...]]:
    """The blocks in order, each with what the model runs behind it as a part of its layer (``behind_block``)."""
    behind = getattr(transformer, "behind_block", lambda index: ())
    return [(block, *behind(index)) for index, block in enumerate(find_blocks(transformer, block_classes))]


def checkpoint_blocks(
    transformer: nn.Module,
    block_classes: Collection[str],
    how: str,
    *,
    compiled: bool = False,
    injections: Collection[str] = (),
    offload: bool = False,
) -> None:
    """Decide what of a layer stays for its backward pass; all else is computed again.

    Args:
        how: ``block``: what enters the layer; ``attention``: also what its self-attention gave; ``selective``: also
            what all of its attentions and matrix products gave; ``none``: everything, and nothing is computed again.
        compiled: the blocks will be compiled. A compiler keeps single results only of what it sees computed again, so
            this goes into the blocks then, and into ``injections``, from which a layer's other part is made.
        offload: let what stays go to the host's memory and come back (``Offload``).
    """
    keeps, blocks = KEPT.get(how), find_blocks(transformer, block_classes)
    moved = Offload(transformer, len(blocks)) if offload else None
    run: Callable[..., Any] | None = None
    if compiled and keeps is not None:
        for module in [*blocks, *find_blocks(transformer, injections)]:
            module.forward = MethodType(_recomputed(cast(MethodType, module.forward).__func__, how), module)
    elif how != "none":
        run = partial(checkpoint, use_reentrant=False)
        if keeps is not None:
            pack, unpack = (_hold, _held) if moved is None else (moved.pack, moved.unpack)
            run = partial(run, context_fn=lambda: _keeping(keeps, pack, unpack))
    if moved is not None:
        run = partial(moved.run, run or _call)
    if run is not None:
        cast(Any, transformer).enable_gradient_checkpointing(run)


def _call(layer: Callable[..., Any], *arguments: Any) -> Any:
    return layer(*arguments)


@cache
def is_attention(operation: Any) -> bool:
    """Whether an operation of torch computes attention, forward."""
    schema = getattr(operation, "_schema", None)
    return schema is not None and {argument.name for argument in schema.arguments[:3]} in ATTENDED


def _is_product(operation: Any, arguments: Sequence[Any]) -> bool:
    return operation in MATRIX_PRODUCTS or is_attention(operation)


def _is_self_attention(operation: Any, arguments: Sequence[Any]) -> bool:
    """As many keys as queries. Text, sound and pictures that are attended to have other numbers of tokens; should one
    have the same by chance, a little more is kept."""
    return is_attention(operation) and arguments[0].shape == arguments[1].shape


KEPT: dict[str, Callable[[Any, Sequence[Any]], bool]] = {"selective": _is_product, "attention": _is_self_attention}
"""By the name of a choice, the operations whose results are kept. Attention gives, beside its output, what its backward
pass needs (log-sum-exp, state of random numbers).

``selective``: nearly all of a layer's FLOPs. Norms, modulation, rotations, activations and casts, nearly all of its
tensors, are computed again. ``attention``: of Wan-S2V at 36,000 tokens 0.37 GB a layer instead of 4.34, for 55 % of the
FLOPs of its forward pass.
"""


def _keeping(
    keeps: Callable[[Any, Sequence[Any]], bool], pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """For the forward pass and for computing it again: results that are kept in between.

    torch's own pair keeps tensors where they are, out of reach of an offload, and lately (2.13) refuses a second pass
    with more operations than the first, as where FSDP gathers weights that were there at first.
    """
    results: deque[tuple[Any, Any]] = deque()

    class Keep(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            result = operation(*arguments, **(named or {}))
            if keeps(operation, arguments):
                results.append((operation, tree_map_only(Tensor, lambda each: _Packed(pack(alias(each))), result)))
            return result

    class Give(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            if not keeps(operation, arguments):
                return operation(*arguments, **(named or {}))
            kept, result = results.popleft()
            assert kept is operation, f"{operation} is computed again where {kept} was"
            return tree_map(lambda each: unpack(each.value) if isinstance(each, _Packed) else each, result)

    return Keep(), Give()


class _Packed:
    """What a tensor was packed as, a leaf to ``tree_map`` whatever it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _hold(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _held(held: tuple[Tensor, int]) -> Tensor:
    return unchanged(*held)


@cache
def _recomputed(forward: Callable[..., Any], how: str) -> Callable[..., Any]:
    """One function for all blocks of a kind: torch 2.9 compiles anew for each other one that it meets."""
    contexts = _COMPILED[how]

    @wraps(forward)
    def run(*arguments: Any, **named: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **named)

    return run


def _policy(how: str, context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    kept = KEPT[how](operation, arguments)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(partial(_policy, "selective"))


def _attention_contexts() -> Any:
    return create_selective_checkpoint_contexts(partial(_policy, "attention"))


_COMPILED = {"selective": _selective_contexts, "attention": _attention_contexts}
"""The only pairs that torch's compiler takes are torch's own, made by functions of a module."""


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
