"""Weights that stay in their mapped files until it is known where they will live and in which type.

    lazy = LazyWeights()
    with lazy.transformer():
        adapter = Adapter.from_pretrained(options)   # the transformer's parameters are placeholders of mapped files
    lazy.to_meta(transformer)                             # they take a cast, or sharding, without memory

Then whole weights come one parameter at a time, or each rank reads its own rows of them:

    for parameter in lazy.placed(transformer, device): ...
    load_shards(fully_shard(transformer), files, device)

A mapped file is in the page cache once for all ranks of a machine, so that together they hold one copy of the model,
and a rank gives back the pages of each tensor that it has read. Loading first and placing afterwards takes a whole
float32 copy for each rank.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vfun_cli.modeling.mapped import give_back
from vfun_cli.modeling.shards import rows_before


class LazyWeights:
    """Parameters without values, and the mapped tensors that have them. Empty unless ``transformer`` was entered."""

    def __init__(self) -> None:
        self.stored: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def transformer(self) -> Iterator[None]:
        """Inside, ``load_weights(transformer=True)`` registers mapped tensors here instead of reading them."""
        token = _LAZY.set(self)
        try:
            yield
        finally:
            _LAZY.reset(token)

    def defer(self, model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Make every parameter a placeholder of its tensor in ``state``, which is cast to ``dtype`` when it is read.

        A placeholder is one zero expanded to the parameter's shape: on the CPU, because peft puts an adapter where its
        layer is, and an adapter drawn on meta would have no values.
        """
        placeholders: dict[int, nn.Parameter] = {}
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            placeholder = placeholders.get(id(parameter))  # a tied parameter stays one
            if placeholder is None:
                zero = torch.zeros((), dtype=dtype if state[name].is_floating_point() else state[name].dtype)
                placeholder = nn.Parameter(zero.expand(parameter.shape), requires_grad=parameter.requires_grad)
                placeholders[id(parameter)] = placeholder
                self.stored[placeholder] = state[name]
            replace_parameter(model, name, placeholder)

    def to_meta(self, model: nn.Module) -> None:
        """Turn the placeholders into parameters on meta, which take a cast without memory."""
        moved = dict(_replaced(model, self._on_meta))
        self.stored = {moved[parameter]: tensor for parameter, tensor in self.stored.items()}

    def _on_meta(self, parameter: nn.Parameter) -> Tensor:
        if parameter not in self.stored:
            return parameter.detach()
        return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")

    def value(self, parameter: nn.Parameter, device: torch.device) -> Tensor:
        """A parameter's values on ``device``, in its type: its own, or read from the file."""
        if parameter not in self.stored:
            return parameter.detach().to(device)
        return _read(self.stored[parameter], parameter.dtype, device)

    def placed(self, model: nn.Module, device: torch.device) -> Iterator[nn.Parameter]:
        """Give each parameter its values on ``device`` and yield it; the next is read when the next is asked for."""
        return (new for _, new in _replaced(model, lambda parameter: self.value(parameter, device)))

    @contextmanager
    def materialized(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        """Inside, a module has its weights on ``device``: one layer's at a time is little."""
        own = dict(module.named_parameters())
        for name, parameter in own.items():
            value = self.value(parameter, device)
            replace_parameter(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        try:
            yield
        finally:
            for name, parameter in own.items():
                replace_parameter(module, name, parameter)

    def by_name(self, model: nn.Module) -> dict[str, Tensor]:
        """The mapped tensors by the name of their parameter; sharding replaces parameters and keeps names."""
        return {
            name: self.stored[parameter] for name, parameter in model.named_parameters() if parameter in self.stored
        }


NOT_LAZY = LazyWeights()
"""For a model that has its weights."""


def lazy_weights() -> LazyWeights | None:
    """Where ``load_weights`` registers a transformer's weights; None outside of ``LazyWeights.transformer``."""
    return _LAZY.get()


@torch.no_grad()
def load_shards(model: nn.Module, files: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a sharded model on meta its memory, and each shard its rows of the mapped tensor. In place."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for name, parameter in model.named_parameters():
        if name not in files:
            continue
        assert isinstance(parameter, DTensor)
        stored, shard = files[name], parameter.to_local()
        first = rows_before(parameter)
        shard.copy_(_read(stored[first : first + len(shard)], shard.dtype, device))


def replace_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put another parameter in the place of that name."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)


def _replaced(
    model: nn.Module, values: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Put another parameter in the place of each, tied ones stay one; yields the old and the new."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, old in model.named_parameters(remove_duplicate=False):
        names.setdefault(old, []).append(name)
    waiting = deque(names.items())
    del names  # so that an old one that had values lets them go before the next has new ones
    while waiting:
        old, places = waiting.popleft()
        new = nn.Parameter(values(old), requires_grad=old.requires_grad)
        for name in places:
            replace_parameter(model, name, new)
        yield old, new


def _read(stored: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of a mapped tensor. It moves as it is stored and is cast there, so that the host holds no copy of it."""
    moved = stored.to(device)
    read = moved.to(dtype, copy=moved is stored)
    give_back(stored)
    return read


_LAZY: ContextVar[LazyWeights | None] = ContextVar("lazy weights", default=None)
