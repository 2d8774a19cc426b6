"""Several runs inside one launch: ``accelerate launch ... -m tests.integration.worker LIST.json``.

Starting two processes costs ten times a tiny training step, so the matrix launches once per strategy and loops over
its runs here. Each run goes through ``run_rank`` exactly as ``python -m vfun_cli.training`` calls it, in one process
group; only what accelerate takes from the environment of a launch (the launch file's class names, the DeepSpeed
file) is set per run.
"""

import json
import os
import sys
from pathlib import Path

import yaml
from accelerate.state import AcceleratorState, GradientState

from vfun_cli.rundir import RunDir
from vfun_cli.training.__main__ import run_rank
from vfun_cli.training.ending import end_with


def main(list_file: str) -> int:
    for run_json in json.loads(Path(list_file).read_text(encoding="utf-8")):
        described = json.loads(Path(run_json).read_text(encoding="utf-8"))
        take_launch_file(RunDir(Path(described["run_dir"])).launch() / "accelerate.yaml")
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if run_rank(Path(run_json)):
            print(f"FAILED {run_json}", file=sys.stderr)
            return 1
    return 0


def take_launch_file(path: Path) -> None:
    """What ``accelerate launch`` would have put into the environment from this file."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "mixed_precision" in content:
        os.environ["ACCELERATE_MIXED_PRECISION"] = content["mixed_precision"]
    if "fsdp_config" in content:
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = content["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    if "deepspeed_config" in content:
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = content["deepspeed_config"]["deepspeed_config_file"]


if __name__ == "__main__":
    end_with(lambda: main(sys.argv[1]))
