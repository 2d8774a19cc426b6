"""Where each option's value comes from: option > environment > vfun.toml > the family's default."""

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vfun_cli import console, devices
from vfun_cli.config import cluster
from vfun_cli.config.checks import check
from vfun_cli.config.datasets import DataSet
from vfun_cli.config.lora import translate_targets
from vfun_cli.config.options import DEFAULT_VARIANTS, RunConfig, default_of, options, parse
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import ConfigError, as_flag, did_you_mean
from vfun_cli.families.spec import FamilySpec
from vfun_cli.files import open_bounded
from vfun_cli.metadata.records import root_of

SETTINGS_FILE = "vfun.toml"
LARGEST_TOML = 1 << 20
"""Bytes: all options with comments are a hundredth of it."""

DATA_TABLES = "data"
"""Key of tables that name the data sets, one each."""

OPTION = "option"
"""The layer of what was typed."""

HERE = "this machine"
"""The source of what was left open and follows from the machine; a reason worth a word comes after a colon."""

CHOOSING_SIZES = ("random_hw_adapt", "training_with_video_token_length")
"""Options of clips that have several sizes."""

FOLLOWS: Mapping[str, tuple[str, str]] = {
    "train_data_dir": ("train_data_meta", "folder of train_data_meta"),
    "image_sample_size": ("video_sample_size", "video_sample_size"),
    "cache_variants": ("cache", "default with a cache"),
    "main_process_port": ("num_machines", "default with several machines"),
    "mixed_precision": ("device", f"{HERE}: its processor has no units for bf16"),
    **dict.fromkeys(CHOOSING_SIZES, ("fix_sample_size", "fix_sample_size")),
}
"""Options that follow from another where nothing was said: which one, and what their source is called then."""

Layer = tuple[str, Mapping[str, Any]]
"""Its name, and the values that it has."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A configuration and, for every option, where its value came from."""

    config: RunConfig
    sources: dict[str, str]

    @property
    def said(self) -> set[str]:
        """Options that somebody has set for this launch: typed, exported or written down."""
        return {name for name, source in self.sources.items() if is_said(source)}

    def settled(self, options: Mapping[str, Any], why: str) -> "Resolved":
        """With values of options that were left open. ``why``: their source from now on."""
        return Resolved(config=replace(self.config, **options), sources={**self.sources, **dict.fromkeys(options, why)})


def resolve(
    command: str,
    spec: FamilySpec,
    given: Mapping[str, Any],
    *,
    demo: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    starts: bool = False,
    environ: Mapping[str, str] = os.environ,
    directory: Path = Path(),
    gpus_there: int | None = None,
) -> Resolved:
    """Settle every option for one command.

    Args:
        given: options from the command line, by name, only those that were typed.
        demo: the embedded default, which replaces everything but typed options.
        base: values of an earlier run's ``run.json``; then neither environment nor vfun.toml is read for others.
        starts: whether the command starts processes: then the environment also tells where, see ``config.cluster``.
        gpus_there: of each machine that the command is meant for, if that is not this one.

    Raises:
        ConfigError: an unknown name, a value of the wrong type, a combination that cannot work.
    """
    said = _said_layers(spec, given, demo=demo, base=base, environ=environ, directory=directory)
    placed = _machine_layers(said, base, environ) if starts else []
    if base is not None:
        layers = [("default", _own_defaults()), ("run.json", base), *placed, *said]
    else:
        strategy, preset = _last_word(said, "strategy", "auto"), _last_word(said, "preset", None)
        defaults = _default_layers(command, spec, strategy, None if preset is None else str(preset))
        layers = [*defaults, *placed, *said]
    config, sources = _merge(layers)
    config = _settle_placement(config, sources, gpus_there)
    if starts and config.device == "cuda":
        _require_gpus_of_all(cluster.read(environ).local_ranks)
    config = _fill_in(config, sources)
    if command == "lora":
        config = replace(config, target_name=translate_targets(spec, config.target_name))
    check(config, spec, command=command)
    return Resolved(config=config, sources=sources)


def is_default(source: str) -> bool:
    """Whether a value with this source is vfun's or a family's default."""
    return source.endswith("default")


def is_said(source: str) -> bool:
    """Whether somebody has set a value with this source for this launch: typed, exported or written it down."""
    return source == OPTION or source.startswith("$") or SETTINGS_FILE in source


def family_defaults(command: str, spec: FamilySpec, strategy: str, preset: str | None = None) -> RunConfig:
    """What a command of a family trains with where nothing is said but the strategy and the preset."""
    config, _ = _merge(_default_layers(command, spec, strategy, preset))
    return config


def _default_layers(command: str, spec: FamilySpec, strategy: str, preset: str | None) -> list[Layer]:
    """What holds where nothing is said, the weakest first.

    Raises:
        ConfigError: the family has no such preset.
    """
    defaults = spec.defaults
    layers: list[Layer] = [
        ("default", _own_defaults()),
        (f"{spec.name} default", defaults.train),
    ]
    if strategy in defaults.by_strategy:
        layers.append((f"{spec.name} {strategy} default", defaults.by_strategy[strategy]))
    if command == "lora":
        layers.append((f"{spec.name} LoRA default", defaults.lora))
    if preset is not None:
        if preset not in defaults.presets:
            raise ConfigError(
                f"{spec.name} has no preset {preset!r}.{did_you_mean(preset, defaults.presets)}",
                hint=f"Its presets: {', '.join(defaults.presets)}.",
                option="--preset",
            )
        moved = defaults.presets[preset]
        layers.append((f"{spec.name} {preset} default", moved.train))
        if command == "lora":
            layers.append((f"{spec.name} {preset} LoRA default", moved.lora))
    return layers


def _own_defaults() -> dict[str, Any]:
    """Those of the options themselves, before any family's."""
    return {name: default_of(name) for name in options()}


def _said_layers(
    spec: FamilySpec,
    given: Mapping[str, Any],
    *,
    demo: Mapping[str, Any] | None,
    base: Mapping[str, Any] | None,
    environ: Mapping[str, str],
    directory: Path,
) -> list[Layer]:
    """What somebody said, the weakest first."""
    said: list[Layer] = []
    if base is None:
        said += [*_file_layers(directory / SETTINGS_FILE, spec.name), *_environment_layers(environ)]
    if demo is not None:
        said.append(("demo", demo))
    return [*said, (OPTION, given)]


def _machine_layers(said: Sequence[Layer], base: Mapping[str, Any] | None, environ: Mapping[str, str]) -> list[Layer]:
    """Where the environment finds the machines of the job, as far as nobody said it.

    Raises:
        ConfigError: it contradicts itself or what was said, or asks for several processes of a strategy that has one.
    """
    typed = {
        name: (parse(name, layer[name], _place(source, name)), _place(source, name))
        for source, layer in said
        for name in cluster.OPTIONS
        if name in layer
    }
    chosen = [("run.json", base or {}), *said]
    job = cluster.read(environ)
    if "num_machines" not in typed and (notice := cluster.outside_of_step(environ)) is not None:
        console.hint(notice)
    strategy = str(_last_word(chosen, "strategy", "auto"))
    if strategy in STRATEGIES and not STRATEGIES[strategy].several_processes:
        _refuse_several(strategy, job, environ)
    found = cluster.settle(job, typed, environ, counts_gpus=_last_word(chosen, "device", "auto") != "cpu")
    layers: list[Layer] = [(each.variables, {name: each.value}) for name, each in found.items()]
    if base is not None and "num_machines" in found and found["num_machines"].value != base.get("num_machines"):
        layers.insert(0, (HERE, {"num_processes": None}))  # so many were those of other machines
    return layers


def _refuse_several(strategy: str, job: cluster.Job, environ: Mapping[str, str]) -> None:
    for name in ("num_machines", "num_processes"):
        if name in job.stated and job.stated[name][0].value != 1:
            found, source = job.stated[name]
            raise ConfigError(
                f"strategy {strategy} trains in one process, and {found.variables} makes {name} {found.value}.",
                hint="Choose --ddp, --fsdp, --zero2 or --zero3, or leave out what does not belong to this job: "
                f"{source.left_out(environ)} before the command.",
                option="--strategy",
            )


def _require_gpus_of_all(ranks: int) -> None:
    """Refuse to start the ranks of a machine from a process that sees its own GPU alone."""
    if 0 < devices.gpu_count() < ranks:
        raise ConfigError(
            f"{ranks} ranks of this machine were started, and the first, which does the work of all, sees "
            f"{devices.gpu_count()} GPUs.",
            hint="Start one task a machine (srun --ntasks-per-node=1), or show each all GPUs (srun --gpu-bind=none).",
        )


def _place(source: str, name: str) -> str:
    """Where a value was said, in words."""
    return as_flag(name) if source == OPTION else f"{source}: {name}"


def _last_word(layers: Sequence[Layer], name: str, otherwise: Any) -> Any:
    """The strongest value of an option that decides which defaults hold."""
    return next((layer[name] for _, layer in reversed(layers) if name in layer), otherwise)


def _merge(layers: Sequence[Layer]) -> tuple[RunConfig, dict[str, str]]:
    """The strongest value of each option, and the name of its layer."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        for name, value in layer.items():
            values[name], sources[name] = parse(name, value, _place(source, name)), source
    return RunConfig(**values), sources


def _fill_in(config: RunConfig, sources: dict[str, str]) -> RunConfig:
    """Values that follow from others where nothing was said; notes their sources."""
    found: dict[str, Any] = {}
    if config.train_data_meta and not is_default(sources["train_data_meta"]):
        typed = sources["train_data_dir"] == OPTION
        stated = None if is_default(sources["train_data_dir"]) else config.train_data_dir
        roots = [root_of_set(each, stated, typed=typed) for each in config.train_data_meta]
        if len(roots) > 1:
            sets = zip(config.train_data_meta, roots, strict=True)
            config = replace(config, train_data_meta=tuple(replace(each, root=root) for each, root in sets))
            root = stated
        else:
            (root,) = roots
        if root != config.train_data_dir or stated is None:
            found["train_data_dir"] = root
    if config.num_machines > 1 and config.main_process_port is None:
        found["main_process_port"] = cluster.DEFAULT_PORT
    if config.image_sample_size is None:
        found["image_sample_size"] = config.video_sample_size
    if config.cache is not None and config.cache_variants is None:
        found["cache_variants"] = DEFAULT_VARIANTS
    if config.device == "cpu" and is_default(sources["mixed_precision"]) and not devices.multiplies_bf16():
        found["mixed_precision"] = "no"
    if config.fix_sample_size:
        found |= dict.fromkeys(CHOOSING_SIZES, False)
        typed_too = [name for name in CHOOSING_SIZES if is_said(sources[name]) and getattr(config, name)]
        if typed_too:  # as the original scripts type and take them
            console.warn(f"fix_sample_size gives every clip one size: no effect of {' and '.join(typed_too)}.")
    sources.update({name: FOLLOWS[name][1] for name in found})
    return replace(config, **found)


def root_of_set(data: DataSet, stated: Path | None, *, typed: bool) -> Path:
    """The same of a data set, whose own root counts before what is stated of all."""
    return data_root(data.meta, data.root or stated, typed=typed or data.root is not None)


def data_root(meta: Path, stated: Path | None, *, typed: bool) -> Path:
    """The folder that the paths in metadata start from; tells where a folder of media makes what was typed useless.

    Args:
        stated: what somebody said, typed or not.
    """
    root = root_of(meta, stated)
    if typed and stated is not None and root.absolute() != stated.absolute():
        console.warn(f"{meta} is a folder: its files are known by their paths from there, not from {stated}.")
    return root


def _file_layers(path: Path, family: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Top-level keys hold for every family, a ``[family]`` table for one."""
    content = _read_toml(path)
    flat = {name: value for name, value in content.items() if not isinstance(value, dict) or name == DATA_TABLES}
    yield str(path), _known(_with_data_tables(flat, str(path)), str(path))
    tables = {name: value for name, value in content.items() if name not in flat}
    from vfun_cli.families import FAMILIES

    for name, table in tables.items():
        if name not in FAMILIES:
            raise ConfigError(
                f"{path}: table [{name}] is no family.{did_you_mean(name, FAMILIES)}",
                hint=f"Families: {', '.join(FAMILIES)}.",
            )
        known = _known(_with_data_tables(table, f"{path} [{name}]"), f"{path} [{name}]")
        if name == family:
            yield f"{path} [{name}]", known


def _with_data_tables(layer: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """With the ``[[data]]`` tables of a layer as what they are: the data sets of ``train_data_meta``."""
    if DATA_TABLES not in layer:
        return layer
    tables, others = layer[DATA_TABLES], {name: value for name, value in layer.items() if name != DATA_TABLES}
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(
            f"{source}: {DATA_TABLES} is {tables!r}; it takes tables, one a set.",
            hint='Write [[data]], and below it meta = "…".',
        )
    if {"train_data_meta", "train-data-meta"} & others.keys():
        raise ConfigError(f"{source} has both train_data_meta and [[data]] tables.", hint="Keep one of them.")
    return {**others, "train_data_meta": tables}


def _read_toml(path: Path) -> dict[str, Any]:
    """Its tables and keys; none where there is no such file."""
    try:
        with open_bounded(path, LARGEST_TOML) as file:
            return tomllib.loads(file.read().decode("utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}.", hint="Correct that, or start vfun in another folder."
        ) from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or a number of thousands of digits
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{path} is not valid TOML: {why}.") from None


def _known(layer: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    names = {name.replace("-", "_"): value for name, value in layer.items()}
    for name in names:
        if name not in options():
            raise ConfigError(
                f"{source}: unknown key {name!r}.{did_you_mean(name, options())}",
                hint="docs/options.md lists the keys.",
            )
    return names


def _environment_layers(environ: Mapping[str, str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The variables that say something: an empty one is how a shell unsets."""
    stated = {variable: value for variable, value in environ.items() if value.strip()}
    for name, (_, _, opt) in options().items():
        for variable in opt.variables:
            if variable in stated:
                yield f"${variable}", {name: stated[variable]}
    for variable, value in stated.items():
        if variable.startswith("VFUN_"):
            name = variable.removeprefix("VFUN_").lower()
            if name not in options():
                raise ConfigError(
                    f"${variable} names no option.{did_you_mean(name, options())}", hint=f"unset {variable}"
                )
            yield f"${variable}", {name: value}


def _settle_placement(config: RunConfig, sources: dict[str, str], gpus_there: int | None) -> RunConfig:
    """Device, strategy and number of processes where they were left to us; notes their sources."""
    gpus = devices.gpu_count() if gpus_there is None else gpus_there
    for name, value, open_value in (
        ("device", config.device, "auto"),
        ("strategy", config.strategy, "auto"),
        ("num_processes", config.num_processes, None),
    ):
        if value == open_value:
            sources[name] = HERE
    device = config.device if config.device != "auto" else ("cuda" if gpus else "cpu")
    strategy = config.strategy
    if strategy == "auto":
        several = config.num_processes or config.num_machines * (gpus if device == "cuda" else 1)
        strategy = "ddp" if several > 1 else "single"  # where that does not fit, its forecast chooses another
    processes = config.num_processes
    if processes is None:
        each = (gpus if device == "cuda" else 2) if STRATEGIES[strategy].several_processes else 1
        processes = each * config.num_machines
    return replace(config, device=device, strategy=strategy, num_processes=processes)


def setting(name: str, environ: Mapping[str, str], directory: Path) -> Any:
    """One option from the environment or vfun.toml, for commands that know no family yet; None where neither has it.

    Raises:
        ConfigError: the value is none for this option.
    """
    value = None
    for source, layer in [*_file_layers(directory / SETTINGS_FILE, ""), *_environment_layers(environ)]:
        if name in layer:
            value = parse(name, layer[name], f"{source}: {name}")
    return value
