"""What the header of an exported LoRA says of it: the keys that ComfyUI, kohya's tools and model browsers show.

``modelspec.*`` are of https://github.com/Stability-AI/ModelSpec, ``ss_*`` of kohya's scripts; all values are texts. No
path is among them, and no caption. The date is the checkpoint's, so that an export is the same whenever it is made.
"""

from datetime import UTC, datetime

from vfun_cli.checkpoints.lora_files import ADAPTER_CONFIG
from vfun_cli.checkpoints.state import STATE_FILE, read_state
from vfun_cli.families.trained import Trained
from vfun_cli.typed_json import read_object


def about(trained: Trained) -> dict[str, str]:
    """The entries of the header, but for the hash.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    state, spec = read_state(trained.path), trained.spec
    setting = read_object(trained.path / "model" / ADAPTER_CONFIG)
    saved = int((trained.path / STATE_FILE).stat().st_mtime)
    base = (trained.given.transformer or trained.model).name
    values = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{spec.export.architecture or spec.name}/lora",
        "modelspec.implementation": spec.export.implementation or "https://github.com/aigc-apps/VideoX-Fun",
        "modelspec.title": f"{spec.name} LoRA, {state['step']} steps",
        "modelspec.date": datetime.fromtimestamp(saved, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ss_base_model_version": spec.export.architecture or spec.name,
        "ss_sd_model_name": base,
        "ss_network_dim": setting.get("r"),
        "ss_network_alpha": setting.get("lora_alpha"),
        "ss_steps": state["step"],
        "ss_max_train_steps": state["run_config"].get("max_train_steps"),
        "ss_learning_rate": state["run_config"].get("learning_rate"),
        "ss_seed": state["run_config"].get("seed"),
        "ss_training_finished_at": float(saved),
    }
    return {name: str(value) for name, value in values.items() if value is not None}
