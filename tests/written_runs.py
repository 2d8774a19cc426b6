"""Run directories as a launch and its processes leave them, written without training: a few tensors, real files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vfun_cli import families
from vfun_cli.checkpoints import manifest, safetensors
from vfun_cli.checkpoints.lora_files import ADAPTER_CONFIG, ADAPTER_FILE, PEFT_PREFIX
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.launch.job import decide
from vfun_cli.run.rundir import RunDir

FAMILY = "cogvideox-fun"


def write_run(command: str, folder: Path) -> RunDir:
    """A run of ``train`` or ``lora`` on the demo below the working directory, with a checkpoint at step 4."""
    spec = families.find(FAMILY)
    given = {"strategy": "single", "output_dir": folder, "report_to": "none", "dataloader_num_workers": 0}
    resolved = resolve(command, spec, given, demo=demo_default.make(spec), environ={})
    job, run = decide(command, spec, resolved), RunDir(folder)
    run.root.mkdir()
    run.run_json.write_text(job.files()[job.run_json.absolute()], encoding="utf-8")
    checkpoint = run.checkpoint(4)
    (checkpoint / "model").mkdir(parents=True)
    model = job.config.pretrained_model_name_or_path
    assert model is not None
    base = {
        name: source.read().astype(np.float32)
        for path in sorted((model / "transformer").glob("*.safetensors"))
        for name, source in safetensors.read_file(path).items()
        if name.endswith("attn1.to_q.weight")
    }
    weights = base if command == "train" else adapter(base)
    file = "model.safetensors" if command == "train" else ADAPTER_FILE
    save_file(weights, checkpoint / "model" / file)
    moments = {f"{name}.{part}": value for name, value in weights.items() for part in ("exp_avg", "exp_avg_sq")}
    steps = {f"{name}.step": np.array(4, np.float32) for name in weights}
    save_file(moments | steps, checkpoint / "model/optimizer.safetensors")
    if command == "lora":
        settings = {"lora_alpha": 2, "r": 2, "use_rslora": False, "alpha_pattern": {"0.attn1.to_q": 4}}
        (checkpoint / "model" / ADAPTER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    (checkpoint / "config").mkdir()
    shutil.copy2(model / spec.model.config_file, checkpoint / "config/config.json")
    state = {
        "schema": 1, "run_id": job.run_id, "step": 4, "epoch": 0, "strategy": "single", "world_size": 1,
        "family": spec.name, "kind": command,
        "layouts": [{"until": 2, "slots": 4}], "run_config": job.config.to_json(),
    }  # fmt: skip
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    manifest.write_manifest(checkpoint)
    return run


def adapter(base: dict[str, Any]) -> dict[str, Any]:
    """Pairs of rank 2 in peft's names."""
    pairs = {}
    for name, weight in base.items():
        layer = PEFT_PREFIX + name.removesuffix(".weight")
        pairs[f"{layer}.lora_A.weight"] = np.ones((2, weight.shape[1]), np.float32)
        pairs[f"{layer}.lora_B.weight"] = np.ones((weight.shape[0], 2), np.float32)
    return pairs
