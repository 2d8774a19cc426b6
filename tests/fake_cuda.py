"""A made-up CUDA device for machines without one: whatever makes the host and the device wait for each other raises.

Inside ``made_up_cuda()`` a tensor on torch's ``meta`` device says that it lies on ``cuda:0``, and what is asked for on
CUDA is made on ``meta``: shapes and types are right, there are no values, and a forward and backward pass takes
milliseconds. Tensors of the host stay real, so that draws, keys and pages of a cache have their values. Move a model
there by ``model.to("meta")`` before, or by ``model.to("cuda")`` inside.

``HostTraffic`` is raised, at the line that does it, by

- an operation on a tensor of each side (elementwise ones take a number of the host as an argument, at no cost);
- a copy to the device from memory that is not pinned, or one that is not asked to be ``non_blocking``;
- a copy to the host other than a ``non_blocking`` one into pinned memory;
- ``torch.tensor(..., device="cuda")`` and its kin, and a list as an index, which are copied from pageable memory;
- reading a value: ``item``, ``tolist``, ``bool``, and shapes that depend on values (``nonzero``, a mask as an index);
- ``synchronize`` of the device, a stream or an event.

Streams and events order nothing here. Nothing of this is known to the code under test.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDA, META = torch.device("cuda", 0), torch.device("meta")
FROM_HOST_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
READS = (Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__)
DEVICE_OF, IS_CUDA, IS_META = (getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_meta"))
ON_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class HostTraffic(Exception):
    """Host and device waited for each other."""


@contextmanager
def made_up_cuda() -> Iterator[torch.device]:
    """The device ``cuda:0``, with nothing behind it."""
    pinned = _Pinned()
    stand_ins = {
        "Event": _Event, "Stream": _Stream, "current_stream": _Stream, "stream": lambda stream: nullcontext(),
        "synchronize": _waits, "max_memory_allocated": lambda device=None: 0,
        "current_device": lambda: 0, "set_device": lambda device: None,
    }  # fmt: skip
    with (
        mock.patch.multiple(torch.cuda, **stand_ins),
        mock.patch.object(Tensor, "record_stream", lambda tensor, stream: None),
        _Traffic(pinned),
        _Labels(pinned),
    ):
        yield CUDA


def _waits(*_: Any, **__: Any) -> None:
    raise HostTraffic("the host waits until the device has done what it was given")


class _Event:
    def __init__(self, **_: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...

    synchronize = elapsed_time = _waits


class _Stream:
    def __init__(self, device: Any = None, **_: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...

    synchronize = _waits


class _Pinned:
    """Tensors of the host whose memory is pinned; kept, so that no other gets their address."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> Tensor:
        self.tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.tensors


class _Labels(TorchFunctionMode):
    """What Python sees of a tensor: ``meta`` is called CUDA, and the other way round."""

    def __init__(self, pinned: _Pinned) -> None:
        self.pinned = pinned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is torch.device:
            return func(*args, **kwargs)
        if func == DEVICE_OF:
            found = func(*args)
            return CUDA if found == META else found
        if func in (IS_CUDA, IS_META):
            return args[0].is_meta and func == IS_CUDA
        if func is Tensor.get_device:
            return 0 if args[0].is_meta else -1
        if func is Tensor.is_pinned:
            return first in self.pinned
        if func is Tensor.pin_memory:
            return self.pinned.add(args[0].clone())
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], CUDA)
        if func in READS and first is not None and first.is_meta:
            raise HostTraffic(f"{func.__name__} reads a value of the device")
        args, kwargs = tuple(map(_unlabelled, args)), {name: _unlabelled(value) for name, value in kwargs.items()}
        on_device = torch.device(kwargs.get("device") or "cpu") == META
        if func in FROM_HOST_DATA and on_device and not any(isinstance(each, Tensor) for each in args[:1]):
            raise HostTraffic(f"{func.__name__} copies to the device from pageable memory")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and first.is_meta and _has_list(args[1]):
            raise HostTraffic("a list as an index is copied to the device from pageable memory")
        if func is Tensor.copy_:  # seen here where it hides from what torch really does
            refuse_waiting_copy(args[1], args[0].device.type, args[0], kwargs.get("non_blocking"), self.pinned)
        pins = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        return self.pinned.add(result) if pins else result


def _has_list(index: Any) -> bool:
    return any(isinstance(each, list) for each in (index if isinstance(index, tuple) else (index,)))


def _unlabelled(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return META
    return META if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class _Traffic(TorchDispatchMode):
    """What torch really does, that of a backward pass included."""

    def __init__(self, pinned: _Pinned) -> None:
        super().__init__()
        self.pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            tensors = list(_tensors((*args, *kwargs.values())))
            device = [each for each in tensors if each.is_meta]
            host = [each for each in tensors if not each.is_meta]
            if func is aten._to_copy.default:
                target = kwargs.get("device") or tensors[0].device
                refuse_waiting_copy(tensors[0], target.type, None, kwargs.get("non_blocking"), self.pinned)
            elif func is aten.copy_.default:
                into, source = tensors
                non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
                refuse_waiting_copy(source, into.device.type, into, non_blocking, self.pinned)
                if source.is_meta and not into.is_meta:
                    return into
            elif device and _depends_on_values(func, args, kwargs):
                raise HostTraffic(f"{func} depends on values of the device")
            elif device and host and (any(each.dim() for each in host) or not _takes_numbers(func)):
                raise HostTraffic(f"{func} is given {[tuple(each.shape) for each in host]} of the host")
            return func(*args, **kwargs)


def refuse_waiting_copy(source: Tensor, target: str, into: Tensor | None, non_blocking: Any, pinned: _Pinned) -> None:
    if source.is_meta and target != "meta" and not (non_blocking and into is not None and into in pinned):
        raise HostTraffic("a copy to the host waits; copy into pinned memory, non_blocking")
    if not source.is_meta and target == "meta" and not (non_blocking and source in pinned):
        raise HostTraffic("a copy to the device from pageable memory, or one that is not non_blocking, waits")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _depends_on_values(func: Any, args: Any, kwargs: Any) -> bool:
    if func is aten.index.Tensor:
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return any(tag in func.tags for tag in ON_VALUES) and kwargs.get("output_size") is None


def _takes_numbers(func: Any) -> bool:
    """Whether CUDA passes a tensor without dimensions on the host as an argument of the kernel."""
    return torch.Tag.pointwise in func.tags or func in (aten.fill_.Tensor, aten.masked_fill.Tensor)
