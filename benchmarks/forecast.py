"""What a forecast says of Wan2.2-S2V, beside what was counted by hand, and how long it takes.

    python benchmarks/forecast.py

36,000 tokens (80 frames of 640 x 640). By hand: from the shapes of one block, before the forecast was there.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from record import parser, write_result

from vfun_cli import families
from vfun_cli.config.resolve import family_defaults
from vfun_cli.forecast.ask import Measurer, measuring
from vfun_cli.forecast.memory import GIB, memory
from vfun_cli.forecast.request import Batch, Question

SPEC = families.find("wan-s2v")
HEAVY = Batch(frames=80, height=640, width=640)
SMALL = Batch(frames=80, height=320, width=320)
"""9,000 tokens."""
FULL: dict[str, tuple[dict[str, Any], str]] = {
    "fsdp": ({"strategy": "fsdp"}, "58 (at most 70)"),
    "fsdp, accumulation 2": ({"strategy": "fsdp", "gradient_accumulation_steps": 2}, "> 110"),
    "fsdp, selective": ({"strategy": "fsdp", "gradient_checkpointing": "selective"}, "> 220"),
    "fsdp, none": ({"strategy": "fsdp", "gradient_checkpointing": "none"}, "> 360"),
    "fsdp, attention": ({"strategy": "fsdp", "gradient_checkpointing": "attention"}, "72"),
    "fsdp, activation offload": ({"strategy": "fsdp", "activation_offload": True}, ""),
    "zero3": ({"strategy": "zero3"}, "62"),
    "zero2": ({"strategy": "zero2"}, "86"),
    "zero3-offload": ({"strategy": "zero3-offload"}, "33"),
    "ddp": ({"strategy": "ddp"}, ""),
}
"""Full fine-tunes on 8 GPUs, and GiB of each by hand."""
LORA: dict[str, tuple[dict[str, Any], Batch, str]] = {
    "bf16": ({}, HEAVY, "62"),
    "fp8": ({"base_precision": "fp8"}, HEAVY, ""),
    "nf4": ({"base_precision": "nf4"}, HEAVY, "42"),
    "nf4, 9,000 tokens, cache": ({"base_precision": "nf4", "cache": Path("cache")}, SMALL, "24"),
    "bf16, streamed, cache": ({"stream_blocks": 0, "cache": Path("cache")}, HEAVY, ""),
    "nf4, streamed, offloaded, cache": (
        {"base_precision": "nf4", "stream_blocks": 0, "activation_offload": True, "cache": Path("cache")}, HEAVY, "",
    ),
}  # fmt: skip
"""LoRA of rank 64 on one GPU."""


def row(measurer: Measurer, options: dict[str, Any], batch: Batch, ranks: int, by_hand: str) -> dict[str, Any]:
    """GiB of a run's phases and of what its binding phase holds."""
    lora = ranks == 1
    given = {"strategy": "single", "device": "cuda", "num_processes": ranks, **options}
    config = replace(family_defaults("lora" if lora else "train", SPEC, "fsdp"), **given)
    question = Question.of(SPEC.name, config, SPEC.model.released, ranks, batch, lora=lora)
    began = time.perf_counter()
    measured = measurer.ask(question)
    seconds = time.perf_counter() - began
    found = memory(config, SPEC, measured, ranks)
    return {
        "gib": round(found.peak / GIB, 1), "by_hand": by_hand, "phase": found.binding,
        "parts": {name: round(size / GIB, 1) for name, size in found.parts[found.binding].items()},
        "seconds": round(seconds, 2),
    }  # fmt: skip


def main() -> None:
    given = parser("forecast", __doc__).parse_args()
    some = slice(0, 1 if given.smoke else None)
    with measuring(keeps=False, knows=False) as measurer:
        full = {name: row(measurer, options, HEAVY, 8, hand) for name, (options, hand) in list(FULL.items())[some]}
        lora = {
            name: row(measurer, options, batch, 1, hand) for name, (options, batch, hand) in list(LORA.items())[some]
        }
    for title, rows in (("full, 8 GPUs", full), ("LoRA of rank 64, one GPU", lora)):
        print(f"\n{title}: GiB of a GPU", file=sys.stderr)
        for name, found in rows.items():
            hand = f"by hand {found['by_hand']:16}"
            print(
                f"  {name:32} {found['gib']:7.1f}  {hand} {found['seconds']:5.1f} s  {found['parts']}", file=sys.stderr
            )
    write_result(given, {"full": full, "lora": lora})


if __name__ == "__main__":
    main()
