"""Depth, near in white and far in black, by a model of transformers from a folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers

from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.encoders.pretrained import load_model
from vfun_cli.modeling.foreign import from_folder
from vfun_cli.typed_json import read_object

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vfun_cli.control.kinds import Settings

CLASSES: Mapping[str, str] = {"depth_anything": "DepthAnythingForDepthEstimation", "dpt": "DPTForDepthEstimation"}
"""By the configuration's ``model_type``: models that say how near a pixel is, without a unit. Others say how far."""


def depth(settings: "Settings") -> "Callable[[NDArray[np.uint8]], NDArray[np.uint8]]":
    """What draws the depth of a frame: its nearest point is 255, its farthest 0, as ControlNet's preprocessors do.

    Raises:
        CheckpointError: the folder holds no such model.
    """
    folder = Path(str(settings.model))
    config = read_object(folder / "config.json", hint=_WHICH)
    kind, metric = str(config.get("model_type")), config.get("depth_estimation_type") == "metric"
    if kind not in CLASSES or metric:
        what = "a model of metric depth" if metric else f"a {kind!r} model"
        raise CheckpointError(f"{folder} holds {what}.", hint=_WHICH)
    torch.set_num_threads(1)  # the same floats for any number of processes
    processor = from_folder(transformers.DPTImageProcessor, folder)
    model = load_model(getattr(transformers, CLASSES[kind]), folder, dtype=torch.float32).to(settings.device)

    @torch.no_grad()
    def draw(frame: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
        inputs = processor(images=frame, return_tensors="pt").to(settings.device)
        nearness = model(**inputs).predicted_depth[None]  # [1, 1, h, w]
        nearness = torch.nn.functional.interpolate(nearness, size=frame.shape[:2], mode="bilinear")[0, 0]
        least, most = nearness.min(), nearness.max()
        grey = (255 * (nearness - least) / (most - least).clamp_min(1e-12)).round().to(torch.uint8)
        return np.repeat(grey.cpu().numpy()[..., None], 3, axis=2)

    return draw


_WHICH = "Name the folder of a Depth Anything (relative) or DPT model with --model, in transformers' layout."
