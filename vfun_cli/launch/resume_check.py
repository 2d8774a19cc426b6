"""The resume gate: what changed between a run and its continuation, and whether that makes it another run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vfun_cli import console
from vfun_cli.config.options import RunConfig, default_of, options
from vfun_cli.config.resolve import Resolved
from vfun_cli.errors import CheckpointError, ConfigError, did_you_mean
from vfun_cli.plan.planning import metadata_digest

METADATA = "train_data_meta"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One option that differs from the run's."""

    name: str
    before: Any
    after: Any
    effect: str


def changes(before: Mapping[str, Any], after: RunConfig) -> list[Change]:
    """Options that differ, in declaration order; an option the older vfun did not know counts as its default."""
    now = after.to_json()
    found = []
    for name, (_, _, opt) in options().items():
        earlier = before.get(name, default_of(name))
        effect: str = opt.on_resume
        if name == "gradient_accumulation_steps" and step_size(before) == step_size(now):
            effect = "layout"  # the same steps, cut for another number of processes
        if now[name] != earlier:
            found.append(Change(name=name, before=earlier, after=now[name], effect=effect))
    return found


def check_resume(described: Mapping[str, Any], after: RunConfig, allow: Sequence[str]) -> None:
    """Let a continuation pass if it is the same run, or if every difference was allowed by name.

    Args:
        described: the ``run.json`` of the run.

    Raises:
        ConfigError: ``allow`` names no option.
        CheckpointError: the continuation would silently be another run.
    """
    allowed = {name.replace("-", "_") for name in allow}
    for name in allowed:
        if name not in options():
            raise ConfigError(f"--allow {name}: no such option.{did_you_mean(name, options())}")
    found = changes(described["config"], after)
    meta = after.train_data_meta
    if meta is not None and meta.is_file() and metadata_digest(meta) != described["metadata_sha256"]:
        found.append(Change(name=METADATA, before="the file as it was", after="another content", effect="trajectory"))
    refused = [change for change in found if change.effect == "trajectory" and change.name not in allowed]
    if refused:
        flags = " ".join(f"--allow {change.name.replace('_', '-')}" for change in refused)
        raise CheckpointError(
            f"this would not be the same run: {_list(refused)}. It changes what is trained from here on.",
            hint=f"Leave the options as they were, or say that you mean it: {flags}",
        )
    for change in found:
        console.warn(f"{change.name} changes from {change.before} to {change.after}.")
    before, now = step_size(described["config"]), step_size(after.to_json())
    if before != now:
        console.warn(
            f"a step now holds {now} micro-batches instead of {before}; the rest of the epoch is planned anew from "
            "the clips that were not trained yet."
        )


def step_size(config: Mapping[str, Any]) -> int:
    """Micro-batches of one optimizer step: processes x accumulation."""
    return int(config["num_processes"]) * int(config["gradient_accumulation_steps"])


def keep_step_size(described: Mapping[str, Any], resolved: Resolved, given: Mapping[str, Any]) -> Resolved:
    """On another number of processes, accumulate so that a step stays what it was, where that divides.

    Then the continuation takes the very steps of an uninterrupted run.
    """
    config, accumulation = resolved.config, "gradient_accumulation_steps"
    whole = step_size(described["config"])
    assert config.num_processes is not None
    if accumulation in given or whole % config.num_processes:
        return resolved
    config = replace(config, gradient_accumulation_steps=whole // config.num_processes)
    return Resolved(config=config, sources=resolved.sources | {accumulation: "the run's step size"})


def _list(found: Sequence[Change]) -> str:
    return ", ".join(f"{change.name} {change.before} -> {change.after}" for change in found)
