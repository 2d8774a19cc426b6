"""What the modules of a model compute in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Types = dict[str, list[tuple[set[torch.dtype], set[torch.dtype]]]]


def noted(model: nn.Module) -> Types:
    """By each module's name, the floating types that enter it and those that leave it, call by call."""
    types: Types = {}

    def floating(values: Any) -> set[torch.dtype]:
        return {each.dtype for each in tree_leaves(values) if isinstance(each, Tensor) and each.is_floating_point()}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            types.setdefault(name, []).append((floating((args, kwargs)), floating(output)))

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name), with_kwargs=True)
    return types
