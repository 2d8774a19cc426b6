"""Runs of the integration tests: what to train, launched once per strategy and kept for the whole session."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests import jobs
from vfun_cli import families
from vfun_cli.checkpoints import manifest
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.launch.job import decide
from vfun_cli.launch.start import write_launch_files, write_plan
from vfun_cli.run.locate import Found
from vfun_cli.run.rundir import RunDir, write_atomically

ROOT = Path(__file__).parents[2]
STRATEGIES = ("single", "ddp", "fsdp", "zero2", "zero3")
"""Of the matrix."""
COMMANDS = ("train", "lora")
STEPS = {"train": 8, "lora": 6}
LEARNING_RATES = {"train": 4e-3, "lora": 1e-2}
LAUNCH_TIMEOUT = 1500
"""Seconds; a launch of all families takes about a minute on two quiet cores."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of the matrix."""

    name: str
    family: str
    strategy: str
    command: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)
    resume_from: str | None = None
    """Name of an earlier run of the same launch, continued from its checkpoint at half the steps."""

    @property
    def folder(self) -> Path:
        return Path("runs") / self.strategy / self.name

    def checkpoint(self) -> Path | None:
        """What the run continues from."""
        if self.resume_from is None:
            return None
        return RunDir(Path("runs") / self.strategy / self.resume_from).checkpoint(STEPS[self.command] // 2)

    def last_checkpoint(self) -> Path:
        """Where the run ended."""
        return RunDir(self.folder).checkpoint(STEPS[self.command])


CLIP_NORM = 1e-3

_FP32 = {"mixed_precision": "no", "max_train_steps": 6}
_AVERAGED = {"use_ema": True, "ema_decay": 0.5}
_SUBSET = {"trainable_modules": "self_attn", "max_train_steps": 3, **_AVERAGED}
_CLIPPED = {"max_grad_norm": CLIP_NORM, "max_train_steps": 1, "gradient_accumulation_steps": 2}
_UNCLIPPED = {"max_grad_norm": 0, "max_train_steps": 1}
_ONCE = {"max_train_steps": 1}
_UNTRAINED = {"max_train_steps": 0}
_BROKEN = {"max_train_steps": 3, "checkpointing_steps": 1}
BROKEN = "broken"
"""A run in which a rank's gradients turn to NaN in the second step, though its loss is a number; it has to fail."""
# Rounding grows where AdamW divides by little: adapters are compared while their gradients have a size.
_LORA_FP32 = {"mixed_precision": "no", "max_train_steps": 6, "adam_epsilon": 1e-4}

HELD_OUT = "held-out"
"""A run of the matrix that validates, too, also by the moving average, and cannot make a sample of one of its rows."""
_HELD_OUT = {
    "validation_meta": "vfun-demo/wan-s2v/data/held-out.json",
    "validation_steps": STEPS["train"] // 2,
    "validation_sampling_steps": 1,
}
HELD_OUT_ROWS = 2
BROKEN_ROW = 1
"""It is followed by the control clip CUT_OFF where a video of it is to be made; the second rank has no other."""
CUT_OFF = Path("vfun-demo/wan-s2v/data/cut-off.mp4")
FIVE = "five"
"""A run that looks at five rows, which two ranks cannot share evenly, and encodes what it needs for that."""
_FIVE = {**_HELD_OUT, "validation_meta": "vfun-demo/wan-s2v/data/five.json", "max_train_steps": 0, "cache": None}

STREAMED = "lora-streamed"
"""Adapters on blocks of which one stays on the device; the losses of the matrix, looked at from outside, too."""
_STREAMED = {STREAMED: {**_HELD_OUT, "stream_blocks": 1}}

ASKED = "asked"
"""A run with another density of timesteps, loss and noise than its family's."""
_ASKED = {
    ASKED: {
        **_FP32,
        "max_train_steps": 3,
        "weighting_scheme": "logit_normal",
        "uniform_sampling": False,
        "motion_sub_loss": True,
        "noise_share_in_frames": True,
    }
}

_IN_FLOAT32 = {"fp32": _FP32, "lora-fp32": _LORA_FP32}
_ONCE_IN_FLOAT32 = {"fp32": {**_FP32, **_ONCE}, "lora-fp32": {**_LORA_FP32, **_ONCE}}
_EVERYWHERE = {
    "subset": _SUBSET,
    "clipped": _CLIPPED,
    "unclipped": _UNCLIPPED,
    "untrained": _UNTRAINED,
    BROKEN: _BROKEN,
}
_IN_MATRIX = {**_EVERYWHERE, HELD_OUT: {**_HELD_OUT, **_AVERAGED, "max_train_steps": 6}}

# Beside the matrix, one family under the options that a strategy could get wrong on its own; `lora-` trains adapters.
# Offload keeps elsewhere what ZeRO-3 has: it is outside of the matrix, and has no runs but these and a step of each
# family.
EXTRAS: dict[str, dict[str, dict[str, Any]]] = {
    "single": {
        **_IN_FLOAT32,
        **_IN_MATRIX,
        **_STREAMED,
        **_ASKED,
    },
    "ddp": {**_IN_FLOAT32, **_IN_MATRIX, **_STREAMED, **_ASKED, FIVE: _FIVE},
    "fsdp": {
        **_IN_FLOAT32,
        **_IN_MATRIX,
        FIVE: _FIVE,
        "prefetched": {**_FP32, "fsdp_prefetch": 1},
        "reduced-in-bf16": {**_FP32, "fsdp_reduce_dtype": "bf16"},
    },
    "zero2": {**_ONCE_IN_FLOAT32, **_IN_MATRIX},
    "zero3": {**_ONCE_IN_FLOAT32, **_IN_MATRIX, FIVE: _FIVE},
    "zero3-offload": {**_ONCE_IN_FLOAT32, **_EVERYWHERE},
}


def straight(family: str, strategy: str, command: str = "train") -> Run:
    """All steps in one go."""
    return Run(name=f"{command}-{family}", family=family, strategy=strategy, command=command)


def first_step(family: str, strategy: str, command: str = "train") -> Run:
    """The straight run, or a step of it where the strategy is outside of the matrix."""
    run = straight(family, strategy, command)
    return run if strategy in STRATEGIES else replace(run, name=f"once-{run.name}", options=_ONCE)


def resumed(first: Run) -> Run:
    """The second half of a run again, from its checkpoint in the middle."""
    return replace(first, name=f"{first.name}-resumed", resume_from=first.name)


def resumed_too(run: Run) -> bool:
    """Every family under one strategy, which shards its weights; one family under every strategy."""
    return run.strategy == "fsdp" or run.family == "wan-s2v"


def unlearning(family: str) -> Run:
    """Adapters that stay what they were: the losses that the draws of a run, full or LoRA, have on their own."""
    options = {"learning_rate": 0, "max_train_steps": max(STEPS.values())}
    return replace(straight(family, "single", "lora"), name=f"unlearning-{family}", options=options)


def extra(name: str, strategy: str) -> Run:
    """One of EXTRAS."""
    command = "lora" if name.startswith("lora-") else "train"
    return Run(name=name, family="wan-s2v", strategy=strategy, command=command, options=EXTRAS[strategy][name])


def all_runs(strategy: str) -> list[Run]:
    """Everything that one launch trains."""
    runs = [first_step(family, strategy, command) for command in COMMANDS for family in families.FAMILIES]
    if strategy in STRATEGIES:
        runs += [resumed(run) for run in runs if resumed_too(run)]
    if strategy == "single":
        runs += [unlearning(family) for family in families.FAMILIES]
    extras = [extra(name, strategy) for name in EXTRAS[strategy]]
    return runs + extras + [resumed(run) for run in extras if run.name == HELD_OUT]


def memorised(family: str, command: str = "train") -> dict[str, Any]:
    """Options that train one clip of the demo over and over, at the smallest size.

    No process decodes beside the trainer: to start one for each of 20 runs takes as long as all of their steps.
    """
    return {
        "train_data_meta": f"vfun-demo/{family}/data/one-clip.json",
        "video_sample_size": 64,
        "image_sample_size": 64,
        "token_sample_size": 64,
        "video_sample_n_frames": 8 if family == "wan-s2v" else 9,
        "dataloader_num_workers": 0,
        "max_train_steps": STEPS[command],
        "checkpointing_steps": STEPS[command] // 2,
        "lr_scheduler": "constant",
        "learning_rate": LEARNING_RATES[command],
        "cache_variants": 4,
        "mixed_precision": "bf16",  # on every processor
    }


def together(strategy: str) -> dict[str, Any]:
    """One process takes the two micro-batches of a step itself, so that all strategies train on the same."""
    return {"gradient_accumulation_steps": 2 if strategy == "single" else 1}


def prepare_demo() -> None:
    """The demo of every family in the working directory, with a one-clip metadata file and another one of rows to
    validate on beside each.
    """
    for spec in families.FAMILIES.values():
        layer = demo_default.make(spec)
        rows = json.loads(Path(layer["train_data_meta"]).read_text(encoding="utf-8"))
        videos = [row for row in rows if row["type"] == "video"]
        Path(layer["train_data_dir"], "one-clip.json").write_text(json.dumps(videos[:1]), encoding="utf-8")
        five = [videos[0] | {"text": f"{videos[0]['text']} {number}"} for number in range(5)]
        for name, count in (("held-out", HELD_OUT_ROWS), ("five", 5)):
            Path(layer["train_data_dir"], f"{name}.json").write_text(json.dumps(five[:count]), encoding="utf-8")
    CUT_OFF.write_bytes((CUT_OFF.parent / "control/00000001.mp4").read_bytes()[:2000])


def write_run(run: Run) -> Path:
    """Everything that ``vfun train`` writes before it starts the processes; the path of run.json.

    All runs share one cache, which saves half of their time. What a cache changes is tested in ``test_cache.py``.
    """
    spec = families.find(run.family)
    given = {
        **memorised(run.family, run.command),
        **together(run.strategy),
        "cache": Path("cache"),
        **run.options,
        "strategy": run.strategy,
        "output_dir": run.folder,
    }
    resolved = resolve(run.command, spec, given, demo=demo_default.make(spec), environ={})
    checkpoint, found = run.checkpoint(), None
    if checkpoint is not None and checkpoint.exists():
        found = Found(run=RunDir(checkpoint.parent), checkpoint=checkpoint, step=manifest.step_of(checkpoint) or 0)
    job = decide(run.command, spec, resolved, found=found)
    write_plan(job)
    write_launch_files(job)
    if checkpoint is not None:  # of the same layout where this launch has yet to write it: nothing to tell but its path
        write_atomically(job.run_json, json.dumps(job.description() | {"resume": str(checkpoint.absolute())}))
    return job.run_json.absolute()


def launch(runs: Sequence[Run]) -> None:
    """Train the runs of one strategy inside one launch, in order.

    Raises:
        AssertionError: a run failed; the message ends with the launch's output.
    """
    files = [write_run(run) for run in runs]
    list_file = Path("runs") / f"{runs[0].strategy}-{runs[0].name}.json".replace("/", "-")
    list_file.write_text(json.dumps([str(path) for path in files]), encoding="utf-8")
    argv = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(RunDir(files[0].parent).launch() / "accelerate.yaml"),
        "-m", "tests.integration.worker", str(list_file.absolute()),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=LAUNCH_TIMEOUT, check=False)
    if done.returncode:
        logs = "".join(path.read_text(errors="replace")[-3000:] for path in Path("runs").rglob("error-rank-*.json"))
        raise AssertionError(f"launch of {list_file} failed\n{done.stderr[-6000:]}\n{logs}")


def losses(run: Run) -> list[float]:
    """Loss of each step."""
    return jobs.losses(RunDir(run.folder))
