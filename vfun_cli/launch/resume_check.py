"""Continuing a run: with which options, and whether what changed makes it another run.

Options are compared as they were given, before anything is read; what a run reads is compared by its contents, wherever
it lies, once it has been checked.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vfun_cli import console, families
from vfun_cli.config import cluster, optimizers
from vfun_cli.config.options import (
    RunConfig,
    default_of,
    effect_on_resume,
    in_words,
    names_paths,
    options,
    over_paths,
    plain_kind,
    typed_entries,
)
from vfun_cli.config.resolve import FOLLOWS, HERE, OPTION, Resolved, is_default, resolve
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import CheckpointError, ConfigError, as_flag, did_you_mean
from vfun_cli.families.spec import FamilySpec
from vfun_cli.launch.job import Job
from vfun_cli.plan.sets import rows_digest
from vfun_cli.run import locate
from vfun_cli.run.contents import METADATA, SCHEME, what_changed
from vfun_cli.run.locate import Found

ACCUMULATION = "gradient_accumulation_steps"
VARIANTS = "cache_variants"
KEPT = (VARIANTS, "mixed_precision")
"""Options that follow from others when a run begins, and belong to it from then on."""
RUNS_OWN = "the run's"
"""Their source in a continuation."""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The run of a checkpoint as it was launched last."""

    found: Found
    described: Mapping[str, Any]
    """Its ``run.json``, with paths that are valid now."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Its options."""
        config: Mapping[str, Any] = self.described["config"]
        return config

    @property
    def contents(self) -> Mapping[str, str]:
        """Digests of what it read, by option; empty where it was launched by a vfun that noted none."""
        noted: Mapping[str, str] = self.described.get("contents", {})
        return {name: digest for name, digest in noted.items() if digest.startswith(f"{SCHEME}:")}

    def follows(self, name: str) -> bool:
        """Whether an option was not given, but followed from another."""
        return name in FOLLOWS and self._source(name) in (FOLLOWS[name][1], RUNS_OWN)

    def let_go(self, name: str) -> bool:
        """Whether the next launch finds an option anew: it followed from another, or from how that one was started."""
        if name == "num_processes" and self._source(name) == HERE:
            return self.let_go("num_machines")
        return self.follows(name) or cluster.is_told(name, self._source(name))

    def _source(self, name: str) -> str:
        source: str = self.described.get("sources", {}).get(name, "")
        return source


@dataclass(frozen=True, kw_only=True)
class Change:
    """One option that differs from the run's, or whose contents do."""

    name: str
    before: Any
    after: Any
    effect: str
    words: str

    def record(self, step: int) -> dict[str, Any]:
        """What ``run.json`` keeps of a change that was allowed."""
        return {"step": step, "option": self.name, "before": self.before, "after": self.after}


def earlier_run(found: Found) -> Earlier:
    """What is known of the run of a checkpoint.

    Raises:
        CheckpointError: its ``run.json`` is missing or damaged, or an option in it has a value that it cannot have.
    """
    described = found.run.read_run()
    try:
        RunConfig.from_json(described["config"])
    except ConfigError as error:
        raise CheckpointError(f"{found.run.run_json} is damaged: {error.message}", hint=error.hint) from None
    return Earlier(found=found, described={**described, "config": _placed(found, described)})


def resolve_as_before(run: Earlier, given: Mapping[str, Any]) -> tuple[str, FamilySpec, Resolved]:
    """The command, the family and the options of an earlier run, beside what was typed anew.

    Raises:
        ConfigError: what was typed does not go with the run's other options.
    """
    command = run.described["command"]
    spec = families.stated_in(run.found.run.run_json, run.described["family"])
    strategy = STRATEGIES.get(given.get("strategy", ""))
    if strategy is not None and not strategy.several_processes:
        given = {"num_processes": 1, **given}
    kept = {name: value for name, value in run.config.items() if name in KEPT or not run.let_go(name)}
    return command, spec, resolve(command, spec, given, base=kept, starts=True)


def continuation(
    run: Earlier, command: str, spec: FamilySpec, resolved: Resolved, *, allow: Sequence[str] = ()
) -> Resolved:
    """The options with which a run goes on, if by them it stays the same run.

    Args:
        allow: options that may change although they change what is trained.

    Raises:
        CheckpointError: it would be another run.
        ConfigError: ``allow`` names no option, or the optimizer cannot go on from what the checkpoint holds.
    """
    locate.require_own(run.found)
    before, checkpoint = run.described, run.found.checkpoint
    if (before["command"], before["family"]) != (command, spec.name):
        raise CheckpointError(
            f"{checkpoint} belongs to a run of vfun {before['command']} {before['family']}, "
            f"not of vfun {command} {spec.name}.",
            hint=f"vfun resume {shlex.quote(str(checkpoint))}",
        )
    resolved = keep_followers(run, keep_step_size(run, resolved))
    require_same_optimizer(run, resolved.config)
    check_options(run, resolved, allow)
    return resolved


def changes(run: Earlier, resolved: Resolved) -> list[Change]:
    """Options that differ, in declaration order; an option the older vfun did not know counts as its default.

    One that only follows from another changed option is no change of its own.
    """
    now, unknown = resolved.config.absolute().to_json(), RunConfig().to_json()
    found = {}
    for name in options():
        earlier = run.config.get(name, unknown[name])
        if names_paths(name):
            earlier = over_paths(name, earlier, Path.absolute)
        if now[name] == earlier:
            continue
        effect: str = effect_on_resume(name, run.config, now)
        if name == ACCUMULATION and step_size(run.config) == step_size(now):
            effect = "sharding"  # the same steps, cut for another number of processes
        if name in run.contents and now[name] is not None:
            effect = "harmless"  # a path: what lies there is compared by its contents
        words = f"{name} {in_words(name, earlier)} -> {in_words(name, now[name])}"
        found[name] = Change(name=name, before=earlier, after=now[name], effect=effect, words=words)
    followers = {name for name, (origin, words) in FOLLOWS.items()
                 if origin in found and resolved.sources.get(name) == words}  # fmt: skip
    return [change for name, change in found.items() if name not in followers]


def require_same_optimizer(run: Earlier, config: RunConfig) -> None:
    """Refuse what nobody can allow: another optimizer than the checkpoint's, or one that cannot be sharded otherwise.

    Raises:
        ConfigError: with both.
    """
    before, now = run.config.get("optimizer", default_of("optimizer")), config.optimizer
    checkpoint = run.found.checkpoint
    if before != now:
        raise ConfigError(
            f"{checkpoint} holds the state of optimizer {before}, which means nothing to {now}.",
            hint=f"Go on with --optimizer {before}, or begin a new run from the weights: "
            f"vfun export-bf16 {shlex.quote(str(checkpoint))}",
            option="--optimizer",
        )
    saved, asked = optimizers.cut_by(run.config), optimizers.cut_by(config.to_json())
    if not optimizers.carries_over(optimizers.find(now), saved, asked):
        shards = run.config.get("fsdp_shard_size")
        groups = "" if shards is None else f" --fsdp-shard-size {shards}"
        raise ConfigError(
            f"{checkpoint} holds the state of optimizer {now} as {saved[0]} cut it over {saved[1]} processes; it "
            f"cannot be cut anew over {asked[1]} under {asked[0]}.",
            hint=f"Go on with --strategy {saved[0]} --num-processes {run.config['num_processes']}{groups}.",
            option="--strategy",
        )


def check_options(run: Earlier, resolved: Resolved, allow: Sequence[str]) -> None:
    """Let a continuation pass if its options make it the same run, or if every difference was allowed by name.

    Raises:
        ConfigError: ``allow`` names no option.
        CheckpointError: the continuation would silently be another run.
    """
    for name in _named(allow):
        if name not in options():
            raise ConfigError(f"--allow {name}: there is no such option.{did_you_mean(name, options())}")
    changed = changes(run, resolved)
    _refuse(run, resolved, changed, allow)
    for change in changed:
        if change.effect == "harmless" and cluster.is_told(change.name, resolved.sources.get(change.name, "")):
            continue  # where a job runs is nobody's change
        was, is_now = (in_words(change.name, value) for value in (change.before, change.after))
        console.warn(f"{change.name} changes from {was} to {is_now}.")
    before, now = step_size(run.config), step_size(resolved.config.to_json())
    if before != now:
        console.warn(
            f"a step now holds {now} micro-batches instead of {before}; the rest of the epoch is planned anew from "
            "the clips that were not trained yet."
        )


def with_same_contents(run: Earlier, job: Job, allow: Sequence[str] = ()) -> Job:
    """The job that continues a run, if what it reads is what the run began with; it notes what ``allow`` let pass.

    Raises:
        CheckpointError: other data or another model, which nobody allowed.
    """
    changed = list(_changed_contents(run, job))
    _refuse(run, job.resolved, changed, allow)
    for change in changed:
        console.warn(f"{change.words}.")
    if job.contents and not run.contents:
        console.hint(
            "The run was launched by an earlier vfun, which noted nothing of the model's and the media's contents: "
            "whether they are the same is not known."
        )
    passed = [change for change in (*changes(run, job.resolved), *changed) if change.effect == "trajectory"]
    records = [change.record(run.found.step) for change in passed]
    return replace(job, allowed=[*run.described.get("allowed", ()), *records])


def _changed_contents(run: Earlier, job: Job) -> Iterator[Change]:
    """What the run reads and is not what it began with."""
    config = job.config
    noted, now = run.contents, {name: each.digest for name, each in job.contents.items()}
    if METADATA not in noted:
        noted = {METADATA: run.described["metadata_sha256"]}
        now = {METADATA: rows_digest(config.train_data_meta)}
    for name, before in noted.items():
        if name in now and before != now[name]:  # what is not named any more is a changed option
            how = what_changed(run.found.run.contents(), name, before, job.contents[name])
            words = f"{name} {in_words(name, getattr(config, name))}: {how}"
            yield Change(name=name, before=before, after=now[name], effect="trajectory", words=words)


def _refuse(run: Earlier, resolved: Resolved, changed: Sequence[Change], allow: Sequence[str]) -> None:
    """Refuse what would make it another run, unless it is allowed by name.

    Raises:
        CheckpointError: with the command that goes on all the same.
    """
    refused = [change for change in changed if change.effect == "trajectory" and change.name not in _named(allow)]
    if not refused:
        return
    hint = "Leave it as it was."
    if all(change.name in options("train") for change in refused):  # those that vfun resume takes
        names = [*sorted(_named(allow)), *(change.name for change in refused)]
        hint = f"Leave it as it was, or say that you mean it: {_command(run, resolved, names)}"
    because = ""
    if any(options()[change.name][2].on_resume == "length" for change in refused):
        because = (
            f" With --lr-scheduler {resolved.config.lr_scheduler} the learning rate falls until the last step, so "
            "that every rate depends on how long the run is."
        )
    raise CheckpointError(
        f"this would not be the same run: {', '.join(change.words for change in refused)}. "
        f"It changes what is trained from here on.{because}",
        hint=hint,
    )


def _named(allow: Sequence[str]) -> set[str]:
    return {name.replace("-", "_") for name in allow}


def step_size(config: Mapping[str, Any]) -> int:
    """Micro-batches of one optimizer step: processes x accumulation."""
    return int(config["num_processes"]) * int(config[ACCUMULATION])


def keep_step_size(run: Earlier, resolved: Resolved) -> Resolved:
    """On another number of processes, accumulate so that a step stays what it was, where that divides.

    Then the continuation takes the very steps of an uninterrupted run. An accumulation that was typed stays.
    """
    config, whole = resolved.config, step_size(run.config)
    assert config.num_processes is not None
    if config.num_processes == run.config["num_processes"] or whole % config.num_processes:
        return resolved
    if resolved.sources.get(ACCUMULATION) == OPTION:
        return resolved
    config = replace(config, gradient_accumulation_steps=whole // config.num_processes)
    return Resolved(config=config, sources=resolved.sources | {ACCUMULATION: "the run's step size"})


def keep_followers(run: Earlier, resolved: Resolved) -> Resolved:
    """With or without a cache, what the encoders see is drawn as before; on any processor, the precision stays.

    What was given stays.
    """
    kept = {name: run.config.get(name, default_of(name)) for name in KEPT if _is_open(run, resolved, name)}
    sources = dict.fromkeys(kept, RUNS_OWN)
    return Resolved(config=replace(resolved.config, **kept), sources=resolved.sources | sources)


def _is_open(run: Earlier, resolved: Resolved, name: str) -> bool:
    """Whether nobody gave an option that follows from another, at this launch or at the run's own."""
    source = resolved.sources.get(name, "")
    return source in ("default", FOLLOWS[name][1]) or (is_default(source) and run.follows(name))


def _placed(found: Found, described: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run. If its directory was moved or copied, what lay beside it may have been so too.

    Then the things at the new place are its things: their contents are compared anyway.
    """
    config, root = dict(described["config"]), found.run.root.absolute()
    was = Path(described.get("run_dir", root))
    if root != was:

        def place(path: Path) -> Path:
            beside = Path(os.path.normpath(root / os.path.relpath(path, was)))
            return beside if path.is_absolute() and beside.exists() else path

        for name in filter(names_paths, options().keys() & config.keys()):
            config[name] = over_paths(name, config[name], place)
    return {**config, "output_dir": str(found.run.root)}


def _command(run: Earlier, resolved: Resolved, allowed: Sequence[str]) -> str:
    """The command that goes on with these options all the same."""
    words = ["vfun", "resume", str(run.found.checkpoint)]
    for change in changes(run, resolved):
        kept = change.name == ACCUMULATION and change.effect == "sharding"  # resume does that by itself
        if change.after is not None and not kept and change.name != "resume_from_checkpoint":
            words += _typed(change.name, change.after)
    for name in allowed:
        words += ["--allow", as_flag(name).removeprefix("--")]
    return shlex.join(words)


def _typed(name: str, value: Any) -> list[str]:
    """An option as it is typed."""
    if isinstance(value, bool):
        return [as_flag(name if value else f"no_{name}")]
    entries = typed_entries(name, value) if plain_kind(options()[name][1]) is tuple else [str(value)]
    return [word for entry in entries for word in (as_flag(name), entry)]
