"""The training step on one GPU at real width: tokens/s, MFU, peak memory, the first size that does not fit, a profile.

    python benchmarks/gpu_step.py                      # both families, as many blocks as fit
    python benchmarks/gpu_step.py --device cpu --tiny  # the same path at toy width, to see that it runs

The transformer has the released width and fewer blocks; its weights are random, which costs as much as trained ones.
The clips are real files read through the family's own inputs and the demo's small encoders, once, as a full cache has
them, and in one row inside the step; accelerator and steps are the trainer's own.
MFU is stated against the data sheet and against this card's measured matrix product.
Published anchors: 33 % for Wan 14B on 128 Hopper GPUs, 18 to 23 % for plain FSDP. The aim: 45 %.
"""

import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from record import parser, write_result

from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.encoding.encode import Sample, outputs_of, prepared
from vfun_cli.families import adapter_of
from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.adapter import SampleRequest
from vfun_cli.modeling.media import writing
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.weights import read_json
from vfun_cli.plan.flops import Costs
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.data.loader import LoadedBatch, MicroBatch
from vfun_cli.training.meter import peak_flops, trained_share
from vfun_cli.training.metrics import Metrics
from vfun_cli.training.model import adapter_options, prepare_blocks, prepare_state
from vfun_cli.training.objectives import make_objective
from vfun_cli.training.optim import choose_trainable
from vfun_cli.training.strategy import make_accelerator
from vfun_cli.training.trainer import Trainer
from vfun_cli.training.validation import Validation

WIDTHS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "wan-s2v": (
        {"dim": 5120, "ffn_dim": 13824, "num_heads": 40},
        {"dim": 64, "ffn_dim": 128, "num_heads": 4},
        40,
    ),
    "cogvideox-fun": (
        {"num_attention_heads": 48, "attention_head_dim": 64, "use_rotary_positional_embeddings": True},
        {"num_attention_heads": 2, "attention_head_dim": 32, "use_rotary_positional_embeddings": True},
        42,
    ),
}
"""Released and toy width by the keys of the configuration, and the released number of blocks."""

SHAPES = {"real": ((48, 512, 512), (80, 640, 640)), "tiny": ((8, 64, 64),)}
"""Frames, height, width; one frame more where the family counts so."""
PROFILED = ("block", True)
MODES = [
    ("block", False), PROFILED, ("attention", False), ("none", False), ("none", True), ("selective", False),
    ("selective", True),
]  # fmt: skip
"""Checkpointing and compile, what matters most first."""
WARM_UP, STEPS, STEADY = 2, 8, 10.0
"""Steps before the clock starts, at most so many under it, and seconds after which fewer will do."""
SQUARES = range(640, 2049, 128)
"""Sides of the clips of 80 frames among which the first one that does not fit is sought."""
BYTES_A_WEIGHT = 18
"""float32 weight, gradient and two moments, and the bf16 copy that is used."""
SHARE_FOR_WEIGHTS = 0.6


def matrix_ceiling(device: torch.device) -> float:
    """FLOP/s of a bf16 product of 8192 x 8192 matrices, the best of ten."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        wait(device)
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        wait(device)
        best = min(best, (time.perf_counter() - began) / 5)
    return 2 * size**3 / best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def graphs() -> int:
    """How many graphs were compiled up to now."""
    return int(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()


def write_clip(folder: Path, frames: int, size: int) -> dict[str, Any]:
    """A video with sound and control, long and large enough."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.random((frames, 3, size, size), dtype=np.float32)) * 2 - 1
    for name in ("clip.mp4", "control.mp4"):
        writing.write_video(folder / name, pixels, Fraction(16))
    writing.write_wav(
        folder / "sound.wav", rng.standard_normal(frames * 1000, dtype=np.float32) / np.float32(10), 16000
    )
    return {
        "file_path": str(folder / "clip.mp4"), "control_file_path": str(folder / "control.mp4"),
        "audio_path": str(folder / "sound.wav"), "text": "waves roll in", "type": "video",
    }  # fmt: skip


class Bench:
    """One family at one width: its clips, encoded once, and a trainer for each mode."""

    def __init__(self, family: str, device: str, tiny: bool, folder: Path) -> None:
        self.spec: FamilySpec = families.find(family)
        folder.mkdir()
        given = {"strategy": "single", "device": device, "mixed_precision": "bf16", "max_train_steps": 10**6}
        given |= {"lr_scheduler": "constant", "gradient_accumulation_steps": 1}
        given |= {"report_to": "none", "output_dir": folder / "run", "checkpointing_steps": 10**6}
        self.config: RunConfig = resolve(
            "train", self.spec, given, demo=demo_default.make(self.spec), environ={}
        ).config
        self.device = torch.device(device)
        self.adapter = adapter_of(self.spec).from_pretrained(adapter_options(self.config, self.spec, self.device))
        wide, narrow, self.most_blocks = WIDTHS[family]
        stated = read_json(adapter_options(self.config, self.spec, self.device).model_dir / self.spec.model.config_file)
        own = {name: value for name, value in stated.items() if not name.startswith("_") and name != "model_type"}
        self.kind, self.settings = type(self.adapter.transformer), own | (narrow if tiny else wide)
        self.record = write_clip(folder, 200, 64 if tiny else 640)
        self.folder = folder
        self.blocks = self.blocks_that_fit()

    def blocks_that_fit(self) -> int:
        """By the memory of their weights, gradients and moments."""
        with torch.device("meta"):
            counts = [
                sum(p.numel() for p in self.kind(**self.settings | {"num_layers": n}).parameters()) for n in (4, 5)
            ]
        if self.device.type != "cuda":
            return 4
        room = torch.cuda.get_device_properties(self.device).total_memory * SHARE_FOR_WEIGHTS / BYTES_A_WEIGHT
        return int(min(self.most_blocks, max(4, 4 + (room - counts[0]) // (counts[1] - counts[0]))))

    @cache  # noqa: B019 (a handful of shapes of two models)
    def loaded(self, shape: tuple[int, int, int], inline: bool = False) -> LoadedBatch:
        """A micro-batch of one clip, as a full cache has it; ``inline``: as it is encoded inside the step."""
        frames, height, width = shape
        frames += self.spec.plan.first_frame_alone
        fields = {field.name for field in self.spec.fields} | {"text", "type"}
        for row in range(20):
            request = SampleRequest(
                key=SampleKey(seed=1, epoch=0, row=row), kind="video", frames=frames, height=height, width=width,
                record={name: value for name, value in self.record.items() if name in fields}, stride=1,
                total_frames=200, fps=(16, 1),
            )  # fmt: skip
            inputs = adapter_of(self.spec).inputs(request, adapter_options(self.config, self.spec, self.device))
            if "history" not in inputs:  # a dropped history shortens the sequence of Wan-S2V
                break
        sample = prepared(inputs)
        if not inline:
            sample = Sample(inputs=inputs, values={}, found=outputs_of(self.adapter.encoders, [sample])[0])
        return LoadedBatch(batch=MicroBatch(epoch=0, step=0, index=0, requests=(request,)), samples=[sample])

    def trainer(self, checkpointing: str, compiled: bool) -> Trainer:
        settings = self.settings | {"num_layers": self.blocks}
        with self.device:
            torch.manual_seed(0)
            transformer = self.kind(**settings)
        config, dims = self.config, self.spec.model.read_dims(settings)
        self.adapter.transformer = transformer
        choose_trainable(transformer, (".",), self.spec.model.modules_without_gradient(dims))
        plan: Any = SimpleNamespace(spec=self.spec)
        prepare_blocks(replace(config, gradient_checkpointing=checkpointing, compile=compiled), plan, transformer)
        accelerator = make_accelerator(config)
        assert config.pretrained_model_name_or_path is not None
        costs = Costs(spec=self.spec, dims=dims, share=trained_share(transformer))
        idle: Any = SimpleNamespace(reason=lambda: 0)
        return Trainer(
            config=config, accelerator=accelerator, adapter=self.adapter, checkpointer=idle, ledger=idle, stop=idle,
            state=prepare_state(config, self.spec, self.adapter, accelerator), cache=None, total_steps=10**6,
            objective=make_objective(
                self.spec.model.objective, self.spec.model.objective_options, config.pretrained_model_name_or_path
            ),
            description={}, validation=Validation(iter(()), []),
            metrics=Metrics(
                RunDir(self.folder), config, costs=costs, peak_flops=None, device=self.device, writes=False,
                first_step=0, total_steps=10**6,
            ),
        )  # fmt: skip

    def measure(
        self, shape: tuple[int, int, int], checkpointing: str, compiled: bool, steps: int = STEPS, inline: bool = False
    ) -> dict[str, Any]:
        """Seconds of a step in steady state and what follows from it; ``does_not_fit`` instead of numbers."""
        free(self.device)
        row = {"shape": list(shape), "checkpointing": checkpointing, "compile": compiled, "inline": inline}
        began = time.perf_counter()
        try:
            loaded = self.loaded(shape, inline)
            trainer = self.trainer(checkpointing, compiled)
            for number in range(WARM_UP):
                trainer.enqueue(number, [replace_key(loaded, number)])
            wait(self.device)
            made, warm, number = time.perf_counter() - began, graphs(), WARM_UP
            began = time.perf_counter()
            while number < WARM_UP + steps and (number < WARM_UP + 2 or time.perf_counter() - began < STEADY):
                trainer.enqueue(number, [replace_key(loaded, number)])
                number += 1
                if not number % 2:  # so that the clock is worth asking; one wait in two steps costs next to nothing
                    wait(self.device)
            wait(self.device)
        except torch.OutOfMemoryError:
            return {**row, "does_not_fit": True}
        seconds = (time.perf_counter() - began) / (number - WARM_UP)
        request = loaded.batch.requests[0]
        cost = trainer.metrics.costs.of(request.frames, request.height, request.width)
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        return {
            **row,
            "tokens": cost.tokens,
            "seconds_until_steady": round(made, 1),
            "steps": number - WARM_UP,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(cost.tokens / seconds),
            "tflops": float(f"{cost.flops / seconds / 1e12:.4g}"),
            "peak_memory_bytes": memory,
            "recompiled_after_warm_up": graphs() - warm,
        }

    def first_too_large(self) -> dict[str, Any]:
        """The smallest square of 80 frames that does not fit with block checkpointing, by bisection."""
        fits, too_large = -1, len(SQUARES)
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            row = self.measure((80, SQUARES[middle], SQUARES[middle]), "block", False, steps=1)
            fits, too_large = (fits, middle) if "does_not_fit" in row else (middle, too_large)
        return {
            "largest_side_that_fits": SQUARES[fits] if fits >= 0 else None,
            "side": SQUARES[too_large] if too_large < len(SQUARES) else None,
        }

    def profile(self, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
        """What the device spends its time on in the profiled mode: the fifteen largest."""
        from torch.profiler import ProfilerActivity, profile

        free(self.device)
        loaded, trainer = self.loaded(shape), self.trainer(*PROFILED)
        for number in range(WARM_UP):
            trainer.enqueue(number, [loaded])
        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
            trainer.enqueue(WARM_UP, [loaded])
            wait(self.device)
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
        whole = sum(getattr(event, key) for event in events)
        return [
            {"kernel": event.key[:100], "share": round(getattr(event, key) / whole, 4), "calls": event.count}
            for event in events[:15]
        ]


def replace_key(loaded: LoadedBatch, number: int) -> LoadedBatch:
    """The same clip with the noise and the timestep of another epoch."""
    (request,) = loaded.batch.requests
    other = replace(request, key=replace(request.key, epoch=number))
    return replace(loaded, batch=replace(loaded.batch, requests=(other,)))


def main() -> None:
    """Measure what matters most first, print and write as it comes, and stop in time."""
    options = parser("gpu_step", __doc__)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--tiny", action="store_true", help="toy width and clips; nothing is written")
    options.add_argument("--families", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    options.add_argument("--minutes", type=float, default=30, help="begin nothing after this time")
    given = options.parse_args()
    if given.smoke:
        given.device, given.tiny = "cpu", True
    end = time.monotonic() + 60 * given.minutes
    device = torch.device(given.device)
    ceiling = matrix_ceiling(device)
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "matrix_product_tflops": round(ceiling / 1e12, 2),
        "data_sheet_tflops": (peak_flops(device, None) or 0) / 1e12 or None,
    }
    print(found, flush=True)
    shapes = SHAPES["tiny" if given.tiny else "real"]
    with TemporaryDirectory() as scratch:
        os.chdir(scratch)
        benches = {
            family: Bench(family, given.device, given.tiny, Path(family).absolute()) for family in given.families
        }
        for family, bench in benches.items():
            found[family] = {
                "width": bench.settings,
                "blocks": bench.blocks,
                "of_blocks": bench.most_blocks,
                "rows": [],
            }

        def note(family: str, name: str, measure: Callable[[], Any]) -> None:
            """One result under its name, or among the rows; what there is no time for is said."""
            result: dict[str, Any] = measure() if time.monotonic() < end else {"not_measured": "out of time"}
            if name == "rows":
                if "tflops" in result:
                    result["mfu_of_matrix_product"] = round(result["tflops"] * 1e12 / ceiling, 4)
                found[family]["rows"].append(result)
            else:
                found[family][name] = result
            print(family, name, result, flush=True)
            if given.smoke or not given.tiny:
                write_result(given, found)

        for mode in MODES[:2] if given.smoke else MODES:
            for shape in shapes:
                for family, bench in benches.items():
                    note(family, "rows", partial(bench.measure, shape, *mode))
            if mode == PROFILED:
                for family, bench in benches.items():
                    note(family, "profile", partial(bench.profile, shapes[0]))
        for family, bench in benches.items():
            note(family, "rows", partial(bench.measure, shapes[0], *MODES[0], inline=True))
        for family, bench in benches.items() if device.type == "cuda" else ():
            note(family, "first_square_that_does_not_fit", bench.first_too_large)


if __name__ == "__main__":
    main()
