"""Continuing a run: with which options, and whether what changed makes it another run."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vfun_cli import console, families
from vfun_cli.config.options import RunConfig, default_of, effect_on_resume, options
from vfun_cli.config.resolve import Resolved, resolve
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import CheckpointError, ConfigError, did_you_mean
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.records import metadata_digest
from vfun_cli.run.locate import Found

METADATA = "train_data_meta"
ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One option that differs from the run's."""

    name: str
    before: Any
    after: Any
    effect: str


def resolve_as_before(found: Found, given: Mapping[str, Any]) -> tuple[str, FamilySpec, Resolved]:
    """The command, the family and the options of a checkpoint's run, beside what was typed anew.

    Raises:
        CheckpointError: the run's ``run.json`` is missing or damaged.
        ConfigError: what was typed does not go with the run's other options.
    """
    described = found.run.read_run()
    command, spec = described["command"], families.find(described["family"])
    strategy = STRATEGIES.get(given.get("strategy", ""))
    if strategy is not None and not strategy.several_processes:
        given = {"num_processes": 1, **given}
    return command, spec, resolve(command, spec, given, base=_options_of(found, described))


def continuation(
    found: Found, command: str, spec: FamilySpec, resolved: Resolved, *, allow: Sequence[str] = ()
) -> Resolved:
    """The options with which a checkpoint's run goes on, if it stays the same run.

    Args:
        allow: options that may change although they change what is trained.

    Raises:
        CheckpointError: it would be another run.
        ConfigError: ``allow`` names no option.
    """
    described = found.run.read_run()
    described["config"] = _options_of(found, described)
    if (described["command"], described["family"]) != (command, spec.name):
        raise CheckpointError(
            f"{found.checkpoint} belongs to a run of vfun {described['command']} {described['family']}, "
            f"not of vfun {command} {spec.name}.",
            hint=f"vfun resume {shlex.quote(str(found.checkpoint))}",
        )
    resolved = keep_step_size(described, resolved)
    check_resume(found, described, resolved.config, allow)
    return resolved


def changes(before: Mapping[str, Any], after: RunConfig) -> list[Change]:
    """Options that differ, in declaration order; an option the older vfun did not know counts as its default."""
    now = after.to_json()
    found = []
    for name in options():
        earlier = before.get(name, default_of(name))
        effect: str = effect_on_resume(name, before, now)
        if name == ACCUMULATION and step_size(before) == step_size(now):
            effect = "sharding"  # the same steps, cut for another number of processes
        if now[name] != earlier:
            found.append(Change(name=name, before=earlier, after=now[name], effect=effect))
    return found


def check_resume(found: Found, described: Mapping[str, Any], after: RunConfig, allow: Sequence[str]) -> None:
    """Let a continuation pass if it is the same run, or if every difference was allowed by name.

    Args:
        found: the checkpoint.
        described: the ``run.json`` of the run.

    Raises:
        ConfigError: ``allow`` names no option.
        CheckpointError: the continuation would silently be another run.
    """
    allowed = {name.replace("-", "_") for name in allow}
    for name in allowed:
        if name not in options():
            raise ConfigError(f"--allow {name}: there is no such option.{did_you_mean(name, options())}")
    changed = changes(described["config"], after)
    meta = after.train_data_meta
    if meta is not None and meta.is_file() and metadata_digest(meta) != described["metadata_sha256"]:
        changed.append(Change(name=METADATA, before="the file as it was", after="another content", effect="trajectory"))
    refused = [change for change in changed if change.effect == "trajectory" and change.name not in allowed]
    if refused:
        hint = "Leave the options as they were."
        if all(change.name in options("train") for change in refused):  # those that vfun resume takes
            mean_it = _allowing(found, described, after, sorted(allowed), refused)
            hint = f"Leave the options as they were, or say that you mean it: {mean_it}"
        raise CheckpointError(
            f"this would not be the same run: {_list(refused)}. It changes what is trained from here on.", hint=hint
        )
    for change in changed:
        console.warn(f"{change.name} changes from {change.before} to {change.after}.")
    before, now = step_size(described["config"]), step_size(after.to_json())
    if before != now:
        console.warn(
            f"a step now holds {now} micro-batches instead of {before}; the rest of the epoch is planned anew from "
            "the clips that were not trained yet."
        )


def step_size(config: Mapping[str, Any]) -> int:
    """Micro-batches of one optimizer step: processes x accumulation."""
    return int(config["num_processes"]) * int(config[ACCUMULATION])


def keep_step_size(described: Mapping[str, Any], resolved: Resolved) -> Resolved:
    """On another number of processes, accumulate so that a step stays what it was, where that divides.

    Then the continuation takes the very steps of an uninterrupted run. An accumulation that was typed stays.
    """
    config, whole = resolved.config, step_size(described["config"])
    assert config.num_processes is not None
    if config.num_processes == described["config"]["num_processes"] or whole % config.num_processes:
        return resolved
    if resolved.sources.get(ACCUMULATION) == "option":
        return resolved
    config = replace(config, gradient_accumulation_steps=whole // config.num_processes)
    return Resolved(config=config, sources=resolved.sources | {ACCUMULATION: "the run's step size"})


def _options_of(found: Found, described: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a run was started with; its directory may have moved since."""
    return {**described["config"], "output_dir": str(found.run.root)}


def _allowing(
    found: Found, described: Mapping[str, Any], after: RunConfig, allowed: Sequence[str], refused: Sequence[Change]
) -> str:
    """The command that goes on with these options all the same."""
    words = ["vfun", "resume", str(found.checkpoint)]
    for change in changes(described["config"], after):
        kept = change.name == ACCUMULATION and change.effect == "sharding"  # resume does that by itself
        if change.after is not None and not kept and change.name != "resume_from_checkpoint":
            words += _typed(change.name, change.after)
    for name in [*allowed, *(change.name for change in refused)]:
        words += ["--allow", _hyphened(name)]
    return shlex.join(words)


def _typed(name: str, value: Any) -> list[str]:
    """An option as it is typed."""
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{_hyphened(name)}"]
    return [f"--{_hyphened(name)}", ",".join(value) if isinstance(value, list) else str(value)]


def _hyphened(name: str) -> str:
    return name.replace("_", "-")


def _list(found: Sequence[Change]) -> str:
    return ", ".join(f"{change.name} {change.before} -> {change.after}" for change in found)
