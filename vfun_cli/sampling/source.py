"""What a person means by RUN, CHECKPOINT, EXPORT or MODEL_DIR: the model, and whose weights replace its own.

    source = find_source("checkpoint-500", output_dir=Path("output_dir"), lora=Path("style.safetensors"))
    adapter = load_model(source, LoadOptions(device=device))   # in sampling/weights.py

Nothing is loaded here: what cannot be meant is said in a moment, before gigabytes are read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vfun_cli import families
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.given import Given
from vfun_cli.checkpoints.naming import unchanged
from vfun_cli.checkpoints.state import STATE_FILE
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families import detect, trained
from vfun_cli.families.spec import FamilySpec
from vfun_cli.run import locate
from vfun_cli.run.rundir import RunDir

NAME_MODEL = "Name the directory of the model with --pretrained-model-name-or-path."


@dataclass(frozen=True, kw_only=True)
class Full:
    """Weights of the transformer, all or those that were trained, in the place of the model's."""

    path: Path
    """A checkpoint, or a folder with safetensors."""
    is_checkpoint: bool
    released: Callable[[str], str] = unchanged
    """From its names to released ones or, of an export, to the transformer's."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA over the weights."""

    path: Path
    """A file of any style, a folder with one, or a checkpoint of ``vfun lora``."""
    strength: float | None = None
    """Multiplies the strength that the file states, and is the whole of it for a file that states none."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights of videos come from."""

    path: Path
    """What was named, or found by default."""
    spec: FamilySpec
    model: Path
    """The released directory: configuration, encoders, VAE, scheduler, and the weights that nothing replaces."""
    given: Given = field(default_factory=Given)
    """What of that is read from elsewhere."""
    train_mode: str | None = None
    """Of the run that trained; None: the family's first."""
    full: Full | None = None
    loras: tuple[Lora, ...] = ()
    ema: bool = False
    """Of checkpoints, the moving average of their weights."""


def find_source(
    name: str | None,
    *,
    output_dir: Path,
    model: Path | None = None,
    default_model: Path | None = None,
    lora: Path | None = None,
    strength: float | None = None,
    ema: bool = False,
    train_mode: str | None = None,
    given: Given | None = None,
) -> Source:
    """What is meant by a path or a bare name; by None the LoRA, else the newest checkpoint of ``output_dir``.

    Args:
        model: the model directory, where what is named does not know it or it has moved.
        default_model: the same for what says nothing of its model.
        lora: a LoRA over what is named.
        strength: of that LoRA or, without one, of a LoRA that is named itself.
        train_mode: in the place of the run's.
        given: weights in the place of the model directory's, before those that the run named.

    Raises:
        ConfigError: options that mean nothing here.
        CheckpointError: there is no such thing, it is incomplete, or its model is unknown or not there.
    """
    if name is None and lora is not None:
        name, lora = str(lora), None
    found = _find(name, output_dir, model, default_model)
    loras = [*found.loras, *([Lora(path=_existing(lora, output_dir))] if lora is not None else [])]
    if ema and not any((path / STATE_FILE).is_file() for path in (found.path, *(each.path for each in loras))):
        raise ConfigError(f"--ema: {found.path} is no checkpoint, which could hold a moving average.", hint="Drop it.")
    if strength is not None:
        if not loras:
            raise ConfigError(
                f"--lora-strength: {found.path} is no LoRA, and --lora names none.", hint="Name its file."
            )
        loras[-1] = replace(loras[-1], strength=strength)
    detect.read_dims(found.spec, found.model)  # what is not there or another family's is said now
    given = (given or Given()).before(found.given)
    return replace(found, train_mode=train_mode or found.train_mode, loras=tuple(loras), ema=ema, given=given)


def _find(name: str | None, output_dir: Path, model: Path | None, default_model: Path | None) -> Source:
    path = None if name is None else locate.existing(name, output_dir)
    record = None if path is None else _record_of(path)
    if path is None or (record is None and _is_trained(path, output_dir)):
        return _checkpoint(trained.find(name, output_dir=output_dir, model=model, default_model=default_model))
    if record is None and model is None and (fitting := detect.fitting(path)):
        return Source(path=path, spec=families.find(fitting[0]), model=path)
    return _export(path, record or {}, model, default_model)


def _is_trained(path: Path, output_dir: Path) -> bool:
    """Whether a path is a run's directory or a checkpoint, whole or not, ours or of the original scripts."""
    return (
        manifest.step_of(path.absolute()) is not None
        or bool(manifest.numbered(path))
        or RunDir(path).run_json.exists()
        or locate.original_checkpoint(str(path), output_dir=output_dir) is not None
    ) and path.is_dir()


def _checkpoint(found: trained.Trained) -> Source:
    trained.require_model(found.path, found.model)
    return Source(
        path=found.path,
        spec=found.spec,
        model=found.model,
        given=found.given,
        train_mode=found.train_mode,
        full=None if found.is_lora else Full(path=found.path, is_checkpoint=True, released=found.released),
        loras=(Lora(path=found.path),) if found.is_lora else (),
    )


def _record_of(path: Path) -> dict[str, Any] | None:
    """What an export says of itself, which a file of it may stand for."""
    from vfun_cli.checkpoints.export import read_record  # with numpy: not for what is not there

    if path.is_dir():
        return read_record(path)
    record = read_record(path.parent)
    return record if record is not None and path.name in record["files"] else None


def _export(path: Path, record: dict[str, Any], model: Path | None, default_model: Path | None) -> Source:
    """Weights that were written by ``export-bf16``, or by others for a model that is named."""
    from vfun_cli.checkpoints.lora_files import holds_adapter

    stated = Path(record["model"]) if record.get("model") else None
    directory = model or stated or default_model
    if directory is None:
        raise CheckpointError(f"{path} does not say to which model its weights belong.", hint=NAME_MODEL)
    trained.require_model(path, directory)
    spec = _family_of(path, record, directory)
    inside = spec.model.transformer_dir(path)
    folder = inside if path.is_dir() and inside.is_dir() else path
    is_lora = holds_adapter(folder)
    return Source(
        path=path,
        spec=spec,
        model=directory,
        given=Given.of(record),
        train_mode=record.get("train_mode"),
        full=None if is_lora else Full(path=folder, is_checkpoint=False),
        loras=(Lora(path=path),) if is_lora else (),
    )


def _family_of(path: Path, record: dict[str, Any], model: Path) -> FamilySpec:
    """The family that an export states or, of weights without such a statement, the model's.

    Raises:
        CheckpointError: the directory holds no model of a known family.
    """
    from vfun_cli.checkpoints.export import RECORD

    if record.get("family"):
        return families.stated_in(path / RECORD, record["family"])
    fitting = detect.fitting(model)
    if not fitting:
        raise CheckpointError(f"{model} holds no model of a known family.", hint=NAME_MODEL)
    return families.find(fitting[0])


def _existing(lora: Path, output_dir: Path) -> Path:
    path = locate.existing(str(lora), output_dir)
    if path is None:
        raise CheckpointError(f"there is no LoRA {lora}, neither here nor in {output_dir}.", hint="Name its file.")
    return path


def told_strengths(source: Source) -> list[str]:
    """How strong the LoRA files of a source are taken to be, and why, for people; a checkpoint's is its run's.

    Raises:
        CheckpointError: one is damaged.
    """
    from vfun_cli.checkpoints.lora_files import read_adapter

    files = [lora for lora in source.loras if not (lora.path / STATE_FILE).is_file()]
    return [
        read_adapter(lora.path).told_strength()
        + ("" if lora.strength is None else f" --lora-strength multiplies it by {lora.strength:g}.")
        for lora in files
    ]
