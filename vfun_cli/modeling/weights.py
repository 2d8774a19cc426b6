"""Weights from a model directory into a module: by name, strictly, without a random initialisation on the way.

    model = empty_model(lambda: Transformer(**config), where=str(folder))
    load_weights(model, safetensors_files(folder), where=str(folder))

A checkpoint that does not fit the model exactly is one ``CheckpointError``. The originals skip such tensors with a
print and train from random numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vfun_cli.checkpoints.given import TRANSFORMER, VAE, typed
from vfun_cli.checkpoints.given_tensors import files_of, is_safetensors, state_dict_of, wrapper_of
from vfun_cli.checkpoints.joint import Locate, split
from vfun_cli.checkpoints.naming import Span
from vfun_cli.checkpoints.released import POINT_AT_RELEASE, refuse_mismatch, weight_files
from vfun_cli.errors import CheckpointError, did_you_mean, first_line
from vfun_cli.lfs import refuse_lfs_pointer
from vfun_cli.modeling.foreign import made_of
from vfun_cli.modeling.lazy_weights import lazy_weights, replace_parameter
from vfun_cli.modeling.pickled import load_pickled
from vfun_cli.typed_json import Check, check_fields, read_object, whole

Module = TypeVar("Module", bound=nn.Module)

LISTED = 10
"""How many offending names an error shows."""


def empty_model(build: Callable[[], Module], *, where: str = "the configuration") -> Module:
    """Build a module with its parameters on the meta device and its buffers real; ``where`` has its configuration.

    Non-persistent buffers (rope tables, position ids) are in no checkpoint, so a module built wholly on meta would
    keep buffers without values. Parameters cost no memory until ``load_weights`` assigns them.

    Raises:
        CheckpointError: no model can be made of the configuration.
    """
    with made_of(where), _parameters_on_meta():
        return build()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter registered inside lands on meta; the tensor it came from is freed at once, never written."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # a tied parameter is on meta already and stays the same object
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def safetensors_files(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """The safetensors files of one model, see :func:`~vfun_cli.checkpoints.released.weight_files`, each opened once.

    Raises:
        CheckpointError: there is none, a shard of the index is missing, or a file is damaged.
    """
    files = weight_files(folder, stem)
    for file in files:
        _open(file)
    return files


def read_json(path: Path, fields: Mapping[str, Check] | None = None) -> dict[str, Any]:
    """A JSON object from a model directory, without numbers that would keep a library busy for ever.

    Raises:
        CheckpointError: there is none, or a value is none that a model can have.
    """
    found = read_object(path, fields, hint=POINT_AT_RELEASE)
    check_fields(found, dict.fromkeys(found, _of_a_model), str(path), hint=POINT_AT_RELEASE)
    return found


_LARGEST_SIZE = whole(-(10**9), 10**9)
_MOST_LAYERS = whole(-1, 10_000)


def _of_a_model(name: str, value: Any) -> None:
    """Whether a value of a configuration, whatever it means, is of a size that a model can have."""
    if isinstance(value, dict):
        for inner, part in value.items():
            _of_a_model(f"{name}.{inner}", part)
    elif isinstance(value, int) and not isinstance(value, bool):
        (_MOST_LAYERS if "layers" in name.rpartition(".")[2] else _LARGEST_SIZE)(name, value)


def require_parts(folder: Path, parts: Sequence[str], *, model: str) -> None:
    """Look for every file and folder of a released directory before the first gigabyte is read.

    Raises:
        CheckpointError: parts are missing; it names all of them.
    """
    missing = [name for name in parts if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a complete {model} directory: no {', '.join(missing)}.",
            hint=f"{POINT_AT_RELEASE} Beside the transformer it holds {', '.join(parts)}.",
        )


def require_same(folder: Path, name: str, wanted: int, found: int, part: str) -> None:
    """Refuse a part of a model that gives another size than its transformer reads.

    Raises:
        CheckpointError: the sizes differ.
    """
    if wanted != found:
        raise CheckpointError(
            f"{folder}: the transformer reads {name} {wanted}, {part} gives {found}.",
            hint="All parts must come from one released model: download them again.",
        )


def model_settings(config: Mapping[str, Any], known: Iterable[str], *, model: str) -> dict[str, Any]:
    """A configuration without the keys of its file format (``_class_name``, …).

    Raises:
        CheckpointError: a key that is not ``known``: it may change what the model computes.
    """
    found = {name: value for name, value in config.items() if not name.startswith("_")}
    known = set(known) - {"self"}
    unknown = sorted(found.keys() - known)
    if unknown:
        raise CheckpointError(
            f"the transformer's config.json has keys that {model} does not know: {', '.join(unknown)}."
            + did_you_mean(unknown[0], known),
            hint=f"Point --pretrained-model-name-or-path at a released {model} model.",
        )
    return found


def read_safetensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the files, one at a time, as stored.

    Raises:
        CheckpointError: a file is damaged.
    """
    for file in files:
        with _open(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                yield name, shard.get_tensor(name)


def load_pth(path: Path) -> dict[str, Tensor]:
    """The state dict of a ``torch.save`` file, memory-mapped, on the CPU. Executes no code from the file.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but tensors by name.
    """
    if not path.is_file():
        raise CheckpointError(
            f"no such weights file: {path}.",
            hint=POINT_AT_RELEASE,
            at=path,
        )
    refuse_lfs_pointer(path)
    return dict(state_dict_of(load_pickled(path, path, mapped=True), path, Tensor))


def load_weights(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor] | Sequence[Path],
    *,
    rename: Callable[[str], str] | None = None,
    dtype: torch.dtype = torch.float32,
    where: str,
    transformer: bool = False,
    given: Path | None = None,
    locate: Locate | None = None,
) -> None:
    """Give every parameter and persistent buffer of ``model`` its tensor. In place; the model may be on meta.

    tensors: (name, tensor) pairs, a mapping, or safetensors files.
    rename: from a name in the checkpoint to the name in the model.
    dtype: what floating-point tensors are cast to; others stay as they are.
    where: the file or folder, for the error message.
    transformer: this is the model that is trained, whose weights ``LazyWeights`` may read later.
    given: what was named instead of ``tensors`` and ``where``, by ``--transformer-path`` or else ``--vae-path``.
    locate: from a layer's name to where another release keeps it, which ``given`` may be of.

    Parameters that the model ties stay tied; the checkpoint may hold either name or both.

    Raises:
        CheckpointError: with all that is missing, unexpected or of another shape.
    """
    if given is not None:
        option = TRANSFORMER if transformer else VAE
        tensors, where = given_tensors(given, option), typed(option, given)
    lazy = lazy_weights() if transformer else None
    first = _first_names(model)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict(keep_vars=True).items()}
    if given is not None and locate is not None:
        tensors = split(dict(_pairs(tensors)), wanted, locate, _taken)
    state: dict[str, Tensor] = {}
    seen: set[str] = set()
    unexpected: list[str] = []
    misshapen: list[str] = []
    for stored_name, tensor in _pairs(tensors):
        name = rename(stored_name) if rename else stored_name
        if name not in wanted:
            unexpected.append(name if name == stored_name else f"{stored_name} (as {name})")
        elif name in seen:
            unexpected.append(f"{name} (a second time)")
        elif tuple(tensor.shape) != wanted[name]:
            misshapen.append(f"{name} is {list(tensor.shape)}, the model has {list(wanted[name])}")
        else:
            state[first[name]] = tensor.to(dtype) if lazy is None and tensor.is_floating_point() else tensor
        seen.add(name)
    covered = {first[name] for name in seen & wanted.keys()}
    missing = [name for name in wanted if first[name] not in covered]
    refuse_mismatch(where, type(model).__name__, missing=missing, unexpected=unexpected, misshapen=misshapen)
    if lazy is not None:
        lazy.defer(model, {name: state.pop(name) for name, _ in model.named_parameters()}, dtype)
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        wanted = {name: shape for name, shape in wanted.items() if first[name] in state}  # buffers
    model.load_state_dict({name: state[first[name]] for name in wanted}, strict=lazy is None, assign=True)
    for name in wanted:
        if first[name] != name:
            replace_parameter(model, name, model.get_parameter(first[name]))
    _refuse_meta(model)


def given_tensors(place: Path, option: str) -> list[tuple[str, Tensor]]:
    """The tensors of weights that an option names, without wrappers in their names; mapped where that is possible.

    Raises:
        CheckpointError: there are none, or a file is damaged; nothing in it is run.
    """
    files = files_of(place, option)
    pairs = list(read_safetensors(files) if is_safetensors(files) else load_pth(files[0]).items())
    wrapper = wrapper_of([name for name, _ in pairs])
    return [(name.removeprefix(wrapper), tensor) for name, tensor in pairs]


def load_diffusers(
    kind: type[Any],
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    transformer: bool = False,
    given: Path | None = None,
    locate: Locate | None = None,
) -> Any:
    """A model of one of diffusers' classes from its folder, on the CPU; of ``given`` weights, as ``load_weights``.

    Raises:
        CheckpointError: ``config.json`` or the safetensors beside it are missing or do not fit.
    """
    config = read_json(folder / "config.json")
    model = empty_model(lambda: kind.from_config(config), where=str(folder / "config.json"))
    files = safetensors_files(folder)
    load_weights(model, files, dtype=dtype, where=str(folder), transformer=transformer, given=given, locate=locate)
    return model


def _taken(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    """Rows of a mapped tensor; only those that do not lie one after another are read now."""
    parts = [tensor[there : there + length] for _, there, length in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pairs(
    tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor] | Sequence[Path],
) -> Iterable[tuple[str, Tensor]]:
    if isinstance(tensors, Mapping):
        return cast(Mapping[str, Tensor], tensors).items()
    if isinstance(tensors, Sequence) and tensors and isinstance(tensors[0], Path):
        return read_safetensors(cast(Sequence[Path], tensors))
    return cast(Iterable[tuple[str, Tensor]], tensors)


def _first_names(model: nn.Module) -> dict[str, str]:
    """For every name of the state dict the first name of the same tensor; they differ for tied parameters."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in model.state_dict(keep_vars=True).items()}


def _refuse_meta(model: nn.Module) -> None:
    """A buffer without values is a mistake in the program, not in the checkpoint."""
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if empty:
        some = ", ".join(empty[:LISTED])
        raise RuntimeError(f"{type(model).__name__} has buffers on meta ({some}): build it with empty_model")


def _open(file: Path) -> safe_open:
    """Opening checks the header and that the file is as long as the header says."""
    refuse_lfs_pointer(file)
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot read {file} ({file.stat().st_size} bytes): {first_line(error)}.",
            hint="The file is incomplete or damaged: download it again.",
            at=file,
        ) from error
