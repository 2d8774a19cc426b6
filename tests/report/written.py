"""A run with losses, samples and a plan, as its processes leave it: written in a moment, of a model without weights."""

import json
from pathlib import Path
from typing import Any

from tests.run.small_run import write
from vfun_cli import families
from vfun_cli.config.resolve import resolve
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.report import plan_json
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.run.rundir import RunDir

FAMILY = "cogvideox-fun"
VIDEO = b"\0\0\0\x18ftypmp42 not much of a video"
TRANSFORMER = {
    "_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 48, "attention_head_dim": 64,
    "in_channels": 33, "num_layers": 42, "use_rotary_positional_embeddings": True,
}  # fmt: skip
QUANTILES = [round(0.1 * index, 1) for index in range(1, 10)]


def write_run(root: Path, **given: Any) -> RunDir:
    """A run of ``lora`` that has only just begun: its description and its plan."""
    run, spec = RunDir(root), families.find(FAMILY)
    model = root.parent / "model"
    write(model / "transformer" / "config.json", json.dumps(TRANSFORMER))
    typed = {
        "strategy": "single", "device": "cpu", "output_dir": root, "learning_rate": 3e-4,
        "pretrained_model_name_or_path": model, **given,
    }  # fmt: skip
    resolved = resolve("lora", spec, typed, environ={})
    table = ClipTable.from_columns(width=[640, 512, 480], height=[480, 512, 640], frames=[90, 60, 200], fps=(24, 1))
    plan = RunPlan.of(resolved.config, spec, spec.model.dims, table)
    run.launch().mkdir(parents=True)
    table.save(run.clips())
    write(run.plan_json, json.dumps(plan_json(plan, [plan.first_epoch])))
    write(
        run.run_json,
        json.dumps(
            {
                "schema": 1, "vfun": "1.2.3", "command": "lora", "family": FAMILY, "id": "0123",
                "config": resolved.config.to_json(), "sources": resolved.sources, "metadata_sha256": "0",
                "plan_digest": plan.first_epoch.digest(), "layouts": [],
            }
        ),
    )  # fmt: skip
    return run


def step(number: int, **said: Any) -> dict[str, Any]:
    """What a step records."""
    return {
        "step": number, "total_steps": 40, "epoch": 0, "loss": 1 / number, "learning_rate": 3e-4, "grad_norm": 0.1,
        "seconds": 2.0, "data_wait_share": 0.05, "tokens": 5000, "tokens_per_second": 2500.0,
        "samples_per_second": 0.5, "tflops": 200.0, "mfu": 0.41, "mean_over_max_flops": 0.98, "padding": 0.01,
        "memory_bytes": 3 << 30, "seconds_left": 80.0 - 2 * number, **said,
    }  # fmt: skip


def held_out(number: int, weights: str = "trained") -> dict[str, Any]:
    """What a held-out loss records."""
    losses = [1 - level + 1 / (number + 1) for level in QUANTILES]
    return {
        "event": "held-out", "step": number, "weights": weights, "loss": sum(losses) / len(losses),
        "by_quantile": losses, "quantiles": QUANTILES, "rows": 8, "seconds": 1.5,
    }  # fmt: skip


def write_metrics(run: RunDir, *records: dict[str, Any]) -> None:
    """These lines."""
    write(run.metrics, "".join(f"{json.dumps(record)}\n" for record in records))


def write_sample(run: RunDir, number: int, row: int, *, ema: bool = False, content: bytes = VIDEO, **said: Any) -> Path:
    """A sample and what it says of itself; returns its file."""
    about = {
        "schema": 1, "prompt": f"prompt {row}", "negative_prompt": "", "seed": 42, "steps": 50, "guidance": 6.0,
        "frames": 49, "height": 480, "width": 720, "fps": "16", "row": row, "weights": "ema" if ema else "trained",
        "image": None, "control": None, "audio": None, **said,
    }  # fmt: skip
    name = f"row-{row}{'-ema' * ema}"
    write(run.samples(number) / f"{name}.json", json.dumps(about))
    file = run.samples(number) / f"{name}.mp4"
    if "error" not in said:
        file.write_bytes(content)
    return file
