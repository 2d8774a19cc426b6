"""Where each option's value comes from: option > environment > vfun.toml > the family's default."""

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfun_cli import devices
from vfun_cli.config import lora as lora_options
from vfun_cli.config.options import DEFAULT_VARIANTS, RunConfig, default_of, options, parse
from vfun_cli.errors import ConfigError, did_you_mean
from vfun_cli.families.spec import FamilySpec

SETTINGS_FILE = "vfun.toml"


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A configuration and, for every option, where its value came from."""

    config: RunConfig
    sources: dict[str, str]


def resolve(
    command: str,
    spec: FamilySpec,
    given: Mapping[str, Any],
    *,
    demo: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    directory: Path = Path(),
) -> Resolved:
    """Settle every option for one command.

    Args:
        given: options from the command line, by name, only those that were typed.
        demo: the embedded default, which replaces everything but typed options.
        base: values of an earlier run's ``run.json``; then neither environment nor vfun.toml is read.

    Raises:
        ConfigError: an unknown name, a value of the wrong type, a combination that cannot work.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = [("default", {name: default_of(name) for name in options()})]
    if base is not None:
        layers.append(("run.json", base))
    else:
        layers.append((f"{spec.name} default", spec.defaults))
        if command == "lora":
            layers.append((f"{spec.name} LoRA default", spec.lora_defaults))
        layers += _file_layers(directory / SETTINGS_FILE, spec.name)
        layers += _environment_layers(environ)
    if demo is not None:
        layers.append(("demo", demo))
    layers.append(("option", given))

    strategy = next((layer["strategy"] for _, layer in reversed(layers) if "strategy" in layer), "auto")
    if base is None and strategy in spec.strategy_defaults:
        layers.insert(2, (f"{spec.name} {strategy} default", spec.strategy_defaults[strategy]))

    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        for name, value in layer.items():
            values[name] = parse(
                name, value, f"--{name.replace('_', '-')}" if source == "option" else f"{source}: {name}"
            )
            sources[name] = source
    if "default" in sources["train_data_dir"] and "default" not in sources["train_data_meta"]:
        values["train_data_dir"] = values["train_data_meta"].parent
        sources["train_data_dir"] = "folder of train_data_meta"
    if values["image_sample_size"] is None:
        values["image_sample_size"] = values["video_sample_size"]
        sources["image_sample_size"] = "video_sample_size"
    if values["cache"] is not None and values["cache_variants"] is None:
        values["cache_variants"] = DEFAULT_VARIANTS
        sources["cache_variants"] = "default with a cache"
    _settle_placement(values, sources)
    if command == "lora":
        values["target_name"] = lora_options.translate_targets(spec, values["target_name"])
        lora_options.check(spec, values)
    _check(command, spec, values)
    return Resolved(config=RunConfig(**values), sources=sources)


def _file_layers(path: Path, family: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Top-level keys hold for every family, a ``[family]`` table for one."""
    if not path.is_file():
        return
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    flat = {name: value for name, value in content.items() if not isinstance(value, dict)}
    yield str(path), _known(flat, str(path))
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    from vfun_cli.families import FAMILIES

    for name, table in tables.items():
        if name not in FAMILIES:
            raise ConfigError(
                f"{path}: table [{name}] is no family.{did_you_mean(name, FAMILIES)}",
                hint=f"Families: {', '.join(FAMILIES)}.",
            )
        known = _known(table, f"{path} [{name}]")
        if name == family:
            yield f"{path} [{name}]", known


def _check_speed(values: Mapping[str, Any]) -> None:
    """Options that only some strategies can follow."""
    strategy = values["strategy"]
    for name in ("fsdp_prefetch", "fsdp_reduce_dtype"):
        if strategy != "fsdp" and values[name] != default_of(name):
            raise ConfigError(f"{name} is about FSDP; the strategy is {strategy}.", hint="Drop it, or add --fsdp.")
    if values["compile"] and strategy.startswith("zero3"):
        raise ConfigError(
            "compile cannot be combined with ZeRO-3, which gathers each layer's weights in the middle of a block.",
            hint="Choose --fsdp, which gathers whole blocks, or drop --compile.",
        )
    if values["compile"] and values["base_precision"] != "bf16":
        raise ConfigError("compile and a quantised base cannot be combined.", hint="Drop one of them.")


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
    for name, (_, _, opt) in options().items():
        for variable in opt.variables:
            if environ.get(variable):
                yield f"${variable}", {name: environ[variable]}
    for variable, value in environ.items():
        if variable.startswith("VFUN_"):
            name = variable.removeprefix("VFUN_").lower()
            if name not in options():
                raise ConfigError(
                    f"${variable} names no option.{did_you_mean(name, options())}", hint=f"unset {variable}"
                )
            yield f"${variable}", {name: value}


def _settle_placement(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Fill in device, strategy and number of processes where they were left to us."""
    gpus = devices.gpu_count()
    for name, open_value in (("device", "auto"), ("strategy", "auto"), ("num_processes", None)):
        if values[name] == open_value:
            sources[name] = "this machine"
    if values["device"] == "auto":
        values["device"] = "cuda" if gpus else "cpu"
    if values["strategy"] == "auto":
        several = values["num_processes"] or values["num_machines"] * (gpus if values["device"] == "cuda" else 1)
        values["strategy"] = "ddp" if several > 1 else "single"
    if values["num_processes"] is None:
        each = 1 if values["strategy"] == "single" else (gpus if values["device"] == "cuda" else 2)
        values["num_processes"] = each * values["num_machines"]


def _check(command: str, spec: FamilySpec, values: Mapping[str, Any]) -> None:
    """Combinations that no single option can refuse."""
    if values["strategy"] == "single" and values["num_processes"] > 1:
        raise ConfigError(
            f"strategy 'single' with num_processes {values['num_processes']}.",
            hint="Drop one of them, or choose --ddp, --fsdp, --zero2 or --zero3.",
        )
    if values["num_processes"] % values["num_machines"]:
        raise ConfigError(
            f"num_processes {values['num_processes']} does not divide by num_machines {values['num_machines']}.",
            hint="num_processes counts all machines together.",
        )
    if values["machine_rank"] >= values["num_machines"]:
        raise ConfigError(
            f"machine_rank {values['machine_rank']} of {values['num_machines']} machines: ranks count from 0."
        )
    if values["num_machines"] > 1 and values["main_process_port"] is None:
        raise ConfigError("several machines need the port to meet at.", hint="Add --main-process-port 29500.")
    if values["use_ema"] and values["strategy"] not in ("single", "ddp"):
        raise ConfigError(
            f"use_ema needs whole weights on a rank; strategy {values['strategy']} shards them.",
            hint="Drop --use-ema, or choose --ddp.",
        )
    _check_speed(values)
    spec.check_options(values)  # first: a family says why
    mode = values["train_mode"]
    if mode is not None and mode not in spec.train_modes:
        known = ", ".join(spec.train_modes) or "none: leave --train-mode out"
        raise ConfigError(
            f"{spec.name} has no train mode {mode!r}.{did_you_mean(mode, spec.train_modes)} Its modes: {known}."
        )
    if values["loss_type"] is not None and "loss_type" not in spec.defaults:
        raise ConfigError(f"{spec.name} has no choice of loss_type.", hint="Leave --loss-type out.")
    image = values["control_ref_image"]
    if image != default_of("control_ref_image") and image not in spec.reference_images:
        raise ConfigError(f"{spec.name} has no choice of control_ref_image.", hint="Leave --control-ref-image out.")
    if not values["trainable_modules"]:
        raise ConfigError("trainable_modules is empty: nothing would be trained.", hint='Use "." for everything.')


def setting(name: str, environ: Mapping[str, str], directory: Path) -> Any:
    """One option from the environment or vfun.toml, for commands that know no family yet; None where neither has it."""
    value = None
    for _, layer in [*_file_layers(directory / SETTINGS_FILE, ""), *_environment_layers(environ)]:
        value = layer.get(name, value)
    return value
