"""What may change between a run and its continuation when the processes change."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.started import Place, exports, step
from vfun_cli import families
from vfun_cli.config.options import LR_SCHEDULERS, RunConfig, options, plain_kind
from vfun_cli.config.resolve import Resolved, resolve
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.launch import resume_check
from vfun_cli.run.contents import SCHEME
from vfun_cli.run.locate import Found
from vfun_cli.run.rundir import RunDir

BEFORE = RunConfig(strategy="fsdp", device="cpu", num_processes=4, gradient_accumulation_steps=1)

FOUND = Found(run=RunDir(Path("my run")), checkpoint=Path("my run/checkpoint-2"), step=2)


RUN = resume_check.Earlier(found=FOUND, described={"config": BEFORE.to_json()})


def resolved(config: RunConfig, **sources: str) -> Resolved:
    return Resolved(config=config, sources=sources)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_fewer_processes_accumulate_to_the_same_step(processes: int, accumulation: int) -> None:
    after = resolved(replace(BEFORE, strategy="zero3", num_processes=processes))
    kept = resume_check.keep_step_size(RUN, after)
    assert kept.config.gradient_accumulation_steps == accumulation
    resume_check.check_options(RUN, kept, ())


def test_a_step_that_cannot_stay_the_same_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    kept = resume_check.keep_step_size(RUN, resolved(replace(BEFORE, num_processes=3)))
    assert kept.config.gradient_accumulation_steps == 1
    resume_check.check_options(RUN, kept, ())
    said = " ".join(capsys.readouterr().err.split())
    assert "a step now holds 3 micro-batches instead of 4" in said
    assert "planned anew" in said


def test_another_accumulation_on_the_same_processes_is_another_run() -> None:
    after = resolved(replace(BEFORE, gradient_accumulation_steps=2))
    with pytest.raises(CheckpointError, match="gradient_accumulation_steps 1 -> 2"):
        resume_check.check_options(RUN, after, ())
    resume_check.check_options(RUN, after, ["gradient-accumulation-steps"])


def test_an_accumulation_that_was_typed_stays_and_so_do_the_steps_of_as_many_processes() -> None:
    typed = resolved(replace(BEFORE, num_processes=2), gradient_accumulation_steps="option")
    assert resume_check.keep_step_size(RUN, typed) == typed
    same = resolved(replace(BEFORE, gradient_accumulation_steps=2))
    assert resume_check.keep_step_size(RUN, same) == same


def test_the_hint_is_the_whole_command_that_goes_on_all_the_same() -> None:
    after = replace(BEFORE, learning_rate=0.5, uniform_sampling=not BEFORE.uniform_sampling, max_train_steps=9)
    with pytest.raises(CheckpointError) as caught:
        resume_check.check_options(RUN, resolved(after), ["uniform-sampling"])
    switch = "--uniform-sampling" if after.uniform_sampling else "--no-uniform-sampling"
    command = str(caught.value.hint).partition("mean it: ")[2]
    changed = ["--learning-rate", "0.5", switch, "--max-train-steps", "9"]
    allowed = ["--allow", "learning-rate", "--allow", "uniform-sampling"]
    assert sorted(shlex.split(command)) == sorted(["vfun", "resume", "my run/checkpoint-2", *changed, *allowed])


@pytest.mark.parametrize("scheduler", LR_SCHEDULERS)
@pytest.mark.parametrize("length", [{"max_train_steps": 12}, {"num_train_epochs": 7}])
def test_a_longer_run_is_another_where_its_learning_rates_depend_on_the_end(
    scheduler: str, length: dict[str, int]
) -> None:
    before = replace(BEFORE, lr_scheduler=scheduler, max_train_steps=9 if "max_train_steps" in length else None)
    run = resume_check.Earlier(found=FOUND, described={"config": before.to_json()})
    after = resolved(replace(before, **length))
    if scheduler.startswith("constant"):
        resume_check.check_options(run, after, ())
        return
    (name,) = length
    with pytest.raises(
        CheckpointError, match=rf"{name} .*--lr-scheduler {scheduler} .* falls until the last"
    ) as caught:
        resume_check.check_options(run, after, ())
    assert f"--{name.replace('_', '-')} {length[name]} --allow {name.replace('_', '-')}" in str(caught.value.hint)
    resume_check.check_options(run, after, [name])


@pytest.mark.parametrize(("before", "after"), [(None, Path("cache")), (Path("cache"), None)])
def test_a_cache_changes_nothing_of_a_run_that_goes_on(before: Path | None, after: Path | None) -> None:
    spec = families.find("wan-s2v")
    first = resolve("train", spec, {"cache": before} if before else {}, environ={})
    run = resume_check.Earlier(
        found=FOUND, described={"config": first.config.to_json(), "command": "train", "family": "wan-s2v"}
    )
    again = resolve("train", spec, {"cache": after} if after else {}, environ={})
    kept = resume_check.continuation(run, "train", spec, again)
    assert (kept.config.cache, kept.config.cache_variants) == (after, 4 if before else None)
    if after is not None:
        *_, resumed = resume_check.resolve_as_before(run, {"cache": after})
        assert resume_check.continuation(run, "train", spec, resumed).config.cache_variants is None


@pytest.mark.parametrize(("began_with_units", "precision"), [(True, "bf16"), (False, "no")])
def test_a_run_keeps_its_precision_on_another_processor(
    began_with_units: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, given, units = families.find("wan-s2v"), {"device": "cpu"}, [began_with_units]
    monkeypatch.setattr("vfun_cli.devices.multiplies_bf16", lambda: units[0])
    settled = resolve("train", spec, given, environ={})
    for _ in range(3):  # the second and third time, it was kept before
        described = {"config": settled.config.to_json(), "sources": settled.sources, "command": "train"}
        run = resume_check.Earlier(found=FOUND, described={**described, "family": spec.name})
        units[0] = not began_with_units
        settled = resume_check.continuation(run, "train", spec, resolve("train", spec, given, environ={}))
        assert settled.config.mixed_precision == precision
        *_, resumed = resume_check.resolve_as_before(run, {})
        assert resumed.config.mixed_precision == precision
    other = {"bf16": "no", "no": "bf16"}[precision]
    with pytest.raises(CheckpointError, match=f"mixed_precision {precision} -> {other}"):
        typed = resolve("train", spec, {**given, "mixed_precision": other}, environ={})
        resume_check.continuation(run, "train", spec, typed)


def test_where_a_run_was_started_says_nothing_of_where_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, at = families.find("wan-s2v"), Place(machines=4, machine=0, each=1, address="gpu001")
    for way in (exports(at), step(at)):
        first = resolve("train", spec, {"device": "cpu"}, environ=way, starts=True)
        described = {"config": first.config.to_json(), "sources": first.sources, "command": "train"}
        run = resume_check.Earlier(found=FOUND, described={**described, "family": spec.name})
        *_, alone = resume_check.resolve_as_before(run, {})
        assert (alone.config.num_machines, alone.config.main_process_port) == (1, None)
        with monkeypatch.context() as patch:
            for name, value in exports(Place(machines=2, machine=1, each=1, address="gpu007")).items():
                patch.setenv(name, value)
            *_, again = resume_check.resolve_as_before(run, {})
        assert (again.config.num_machines, again.config.machine_rank) == (2, 1)
        assert (again.config.main_process_ip, again.sources["num_machines"]) == ("gpu007", "$WORLD_SIZE")


def test_what_follows_from_a_changed_option_changes_with_it() -> None:
    spec = families.find("hunyuanvideo-t2v")
    first = resolve("train", spec, {"video_sample_size": 512, "image_sample_size": None}, environ={})
    described = {"config": first.config.to_json(), "sources": first.sources, "command": "train", "family": spec.name}
    run = resume_check.Earlier(found=FOUND, described=described)
    *_, again = resume_check.resolve_as_before(run, {"video_sample_size": 256})
    assert again.config.image_sample_size == 256
    with pytest.raises(CheckpointError, match=r"same run: video_sample_size 512 -> 256\. It"):
        resume_check.check_options(run, again, ())
    resume_check.check_options(run, again, ["video-sample-size"])


ALLOWED_TO_CHANGE = {"harmless", "sharding", "length", "contents"}
OTHERS: dict[str, Any] = {
    "strategy": "zero2", "num_processes": 4, "train_mode": "control", "trainable_modules": "proj_out",
    "resume_from_checkpoint": "latest", "optimizer_args": ["amsgrad=true"], "fix_sample_size": "480,832",
}  # fmt: skip
"""Where not every other value goes with the rest of a run."""
BESIDE: dict[str, dict[str, Any]] = {
    "num_machines": {"main_process_port": 29500},
    "machine_rank": {"num_machines": 2, "main_process_port": 29500},
    "cache_variants": {"cache": "latents"},
    "validation_steps": {"validation_prompts": ["a cat"]},
    "validation_epochs": {"validation_prompts": ["a cat"]},
    "base_precision": {"strategy": "ddp", "device": "cuda"},
    "stream_blocks": {"strategy": "ddp"},
    "lr_num_cycles": {"lr_scheduler": "cosine_with_restarts"},
    "lr_power": {"lr_scheduler": "polynomial"},
    "logit_mean": {"weighting_scheme": "logit_normal", "uniform_sampling": False},
    "logit_std": {"weighting_scheme": "logit_normal", "uniform_sampling": False},
    "mode_scale": {"weighting_scheme": "mode", "uniform_sampling": False},
    "motion_sub_loss_ratio": {"motion_sub_loss": True},
    "noise_share_in_frames_ratio": {"noise_share_in_frames": True},
    "lr_min_ratio": {"lr_scheduler": "cosine"},
}
"""What an option needs to have another value: both are given."""


def another(name: str, value: Any) -> Any:
    """A valid value of an option that is not this one."""
    _, kind, opt = options()[name]
    plain = plain_kind(kind)
    if name in OTHERS:
        return OTHERS[name]
    if opt.choices:
        return next(choice for choice in opt.choices if choice != value)
    if plain is bool:
        return not value
    if plain is int:
        return (value or 0) + 1
    if plain is float:
        return value / 2 if value else 0.5
    return f"other-{name}"


def run_of(command: str, scheduler: str) -> resume_check.Earlier:
    """A run on two processes under FSDP that noted what it reads."""
    given = {"strategy": "fsdp", "device": "cpu", "num_processes": 2, "lr_scheduler": scheduler, "max_train_steps": 9}
    settled = resolve(command, families.find("wan-fun-control"), given, environ={})
    contents = {name: f"{SCHEME}:as it was" for name, (_, _, opt) in options().items() if opt.on_resume == "contents"}
    described = {"command": command, "family": "wan-fun-control", "config": settled.config.to_json(),
                 "sources": settled.sources, "contents": contents}  # fmt: skip
    return resume_check.Earlier(found=FOUND, described=described)


@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
@pytest.mark.parametrize("name", [name for name in options() if name not in ("loss_type", "optimizer")])
def test_a_changed_option_does_what_its_declaration_says(
    name: str, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfun_cli.devices.gpu_count", lambda: 2)
    lora = "train" not in options()[name][2].commands
    run = run_of("lora" if lora else "train", scheduler)
    given = BESIDE.get(name, {}) | {name: another(name, run.config[name])}
    passes = options()[name][2].on_resume in ALLOWED_TO_CHANGE
    if name == "max_train_steps" and scheduler == "cosine":
        passes = False
    command, spec, settled = resume_check.resolve_as_before(run, given)
    if passes:
        resume_check.continuation(run, command, spec, settled)
    else:
        with pytest.raises(CheckpointError, match=f"not be the same run: .*{name} "):
            resume_check.continuation(run, command, spec, settled)
        resume_check.continuation(run, command, spec, settled, allow=[name, *BESIDE.get(name, {})])


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"optimizer": "adamw"}, {"optimizer": "torch.optim.RAdam"}, "optimizer adamw, which means nothing to torch"),
        (
            {"optimizer": "came", "strategy": "ddp"},
            {"optimizer": "adamw"},
            "came, which means nothing to adamw",
        ),
        ({"optimizer": "adamw8bit"}, {"strategy": "ddp"}, "adamw8bit as 4 processes under fsdp .* for 4 under ddp"),
        ({"optimizer": "adamw8bit"}, {"num_processes": 2}, "adamw8bit as 4 processes under fsdp .* for 2 under fsdp"),
        ({"optimizer": "adamw8bit", "strategy": "ddp"}, {"num_processes": 2}, None),
        ({"optimizer": "came", "strategy": "ddp"}, {"strategy": "single", "num_processes": 1}, None),
        ({"optimizer": "torch.optim.RAdam"}, {"strategy": "zero3", "num_processes": 2}, None),
    ],
)
def test_no_optimizer_goes_on_from_what_it_cannot_read(
    before: dict[str, Any], now: dict[str, Any], said: str | None
) -> None:
    """Whatever is allowed: there is nothing to go on from."""
    first = replace(BEFORE, **before)
    found = replace(FOUND, run=RunDir(Path("my run")), checkpoint=Path("my run/checkpoint-2"))
    run = resume_check.Earlier(found=found, described={"config": first.to_json()})
    if said is None:
        resume_check.require_same_optimizer(run, replace(first, **now))
        return
    with pytest.raises(ConfigError, match=said) as caught:
        resume_check.require_same_optimizer(run, replace(first, **now))
    assert caught.value.exit_code == 2 and "Go on with --" in str(caught.value.hint)
