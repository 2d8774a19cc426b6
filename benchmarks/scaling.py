"""How training scales, by simulation: measured times of every bucket, replayed through our schedule and another.

Run from the repository root: ``python benchmarks/scaling.py``. Each distinct shape of an epoch is trained (forward and
backward) by a small Wan-Fun transformer on this machine's CPU; a step takes as long as its slowest rank. Communication
is left out: what is compared is waiting for each other. ``independent draws`` gives every rank a micro-batch of the
same plan by chance, as the original scripts do.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from plan_sets import mixed_set
from record import parser, write_result

from vfun_cli.families.spec import ClipShape
from vfun_cli.families.wan_fun_control import IMAGE_TOKENS, SPEC
from vfun_cli.families.wan_fun_control.transformer import WanFunControlTransformer
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.schedule import EpochPlan, plan_epoch

RANKS = (8, 64, 512)
ROWS = 100_000
REPEATS = 2
HALVED = {"video_sample_size": 128, "image_sample_size": 512, "token_sample_size": 256, "video_sample_n_frames": 49}
"""The published sizes halved, so that a CPU can measure them."""
MODEL = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 48, "out_channels": 16, "text_dim": 32,
    "freq_dim": 32, "ffn_dim": 256, "num_layers": 2, "image_dim": 32, "added_kv_proj_dim": 64,
}  # fmt: skip
TEXT_ROWS = 16
"""Rows of text: few, so that the video decides as it does in a large model."""


def step_seconds(model: Any, frames: int, height: int, width: int) -> float:
    """CPU seconds of forward and backward on one clip, the least of some repeats."""
    latents = torch.randn(1, 48, *SPEC.plan.latent_shape(ClipShape(frames=frames, height=height, width=width)))
    text, image = torch.randn(1, TEXT_ROWS, 32), torch.randn(1, IMAGE_TOKENS, 32)
    found = []
    for _ in range(REPEATS):
        started = time.process_time()
        model(latents, torch.tensor([500.0]), text, image).square().mean().backward()
        found.append(time.process_time() - started)
    return min(found)


def efficiency(seconds: np.ndarray, slots: np.ndarray) -> float:
    """Mean over slowest rank's time, over all steps; slots are [steps, ranks] of micro-batch numbers."""
    times = seconds[slots]
    return float(times.mean() / times.max(axis=1).mean())


def shapes_of(plan: EpochPlan) -> np.ndarray:
    """[micro-batches, 3]"""
    return np.stack([plan.frames, plan.height, plan.width], axis=1)


def main() -> None:
    """Measure, replay, print and write."""
    given = parser("scaling", __doc__).parse_args()
    rows, ranks = (20, RANKS[:1]) if given.smoke else (ROWS, RANKS)
    sizes = {**HALVED, "video_sample_n_frames": 9} if given.smoke else HALVED
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = WanFunControlTransformer(has_reference=False, **MODEL).train()
    table = mixed_set(rows, images=0.3)
    dims = SPEC.model.read_dims({**MODEL, "in_dim": 48, "dim": 64})
    plans = {
        number: plan_epoch(SPEC, dims, table, PlanOptions.pick(SPEC.defaults.train, **sizes, world_size=number), 0)
        for number in ranks
    }
    measured: dict[tuple[int, ...], float] = {}
    for shape in np.unique(np.concatenate([shapes_of(plan) for plan in plans.values()]), axis=0).tolist():
        measured[tuple(shape)] = step_seconds(model, *shape)
    print(f"{len(measured)} shapes, {min(measured.values()):.4f} to {max(measured.values()):.4f} s")
    results, rng = [], np.random.default_rng(0)
    for number, plan in plans.items():
        seconds = np.array([measured[tuple(shape)] for shape in shapes_of(plan).tolist()])
        draws = rng.integers(0, len(seconds), plan.steps.shape)
        line = {
            "world_size": number,
            "steps": plan.num_steps,
            "our_schedule": round(efficiency(seconds, plan.steps), 4),
            "independent_draws": round(efficiency(seconds, draws), 4),
        }
        line["faster_by"] = round(line["our_schedule"] / line["independent_draws"], 2)
        results.append(line)
        print(line)
    times = sorted(measured.values())
    write_result(
        given,
        {
            "measured": "a small model on a CPU, forward and backward, least of 2; not a GPU",
            "model": MODEL,
            "sizes": sizes,
            "rows": rows,
            "shapes": len(measured),
            "seconds_of_a_shape": {"least": round(times[0], 4), "median": round(times[len(times) // 2], 4),
                                   "most": round(times[-1], 4)},
            "results": results,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
