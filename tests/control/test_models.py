"""Control clips by models, tiny ones in the layouts of the released ones."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    PreTrainedModel,
)

from tests.commands.conftest import digest
from tests.control.conftest import write_clip, write_picture
from tests.jobs import Said, vfun_here
from vfun_cli.metadata.probe import probe_visual

pytestmark = pytest.mark.slow  # every process of a model imports torch and transformers

SIDE = 28


def depth_anything() -> PreTrainedModel:
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=SIDE, patch_size=14,
        out_indices=[1, 2], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, reassemble_factors=[2, 1],
            neck_hidden_sizes=[8, 8], fusion_hidden_size=8, head_hidden_size=8,
        )
    )  # fmt: skip


def dpt() -> PreTrainedModel:
    return DPTForDepthEstimation(
        DPTConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32,
            patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
            is_hybrid=False, readout_type="project",
        )
    )  # fmt: skip


KINDS = {"depth_anything": (depth_anything, 14, SIDE), "dpt": (dpt, 8, 32)}


def saved(kind: str, folder: Path) -> tuple[PreTrainedModel, DPTImageProcessor, Path]:
    torch.manual_seed(0)
    build, multiple, side = KINDS[kind]
    model, size = build().eval(), {"height": side, "width": side}
    processor = DPTImageProcessor(size=size, ensure_multiple_of=multiple, keep_aspect_ratio=kind == "depth_anything")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


def make(*arguments: object) -> Said:
    return vfun_here("make-control", *arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_depth_is_what_the_model_says_of_each_picture_from_black_to_white(kind: str, tmp_path: Path) -> None:
    model, processor, folder = saved(kind, tmp_path / "model")
    clips = tmp_path / "clips"
    picture = write_picture(clips / "1.png", size=(45, 61))
    said = make(clips, "--kind", "depth", "--model", folder)
    assert (said.code, said.out) == (0, "done: 1 made\n"), said.err
    drawn = np.asarray(Image.open(clips / "control/1.png"))
    assert drawn.shape == (45, 61, 3) and drawn.min() == 0 and drawn.max() == 255
    with torch.no_grad():
        wanted = model(**processor(images=Image.open(picture), return_tensors="pt")).predicted_depth[None]
    wanted = torch.nn.functional.interpolate(wanted, size=(45, 61), mode="bilinear")[0, 0].numpy()
    wanted = 255 * (wanted - wanted.min()) / (wanted.max() - wanted.min())
    assert np.abs(drawn[..., 0] - wanted).max() <= 1


def test_depth_of_a_video_is_the_same_by_any_number_of_processes(tmp_path: Path) -> None:
    _, _, folder = saved("depth_anything", tmp_path / "model")
    clips = tmp_path / "clips"
    for number in range(3):
        write_clip(clips / f"{number}.mp4", frames=3 + number, size=(47, 60))
    for out, workers in (("one", 1), ("two", 2)):
        assert (
            make(clips, "--kind", "depth", "--model", folder, "--out", tmp_path / out, "--workers", workers).code == 0
        )
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    facts = probe_visual(tmp_path / "one/2.mp4")
    assert (facts.frames, facts.height, facts.width) == (5, 47, 60)
    again = make(clips, "--kind", "depth", "--model", folder, "--out", tmp_path / "one")
    assert again.out == "done: 3 there already\n"


def change(folder: Path, **values: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"depth_estimation_type": "metric"}, "holds a model of metric depth"),
        ({"model_type": "zoedepth"}, "holds a 'zoedepth' model"),
        ({"fusion_hidden_size": 9}, "cannot be loaded"),
    ],
)
def test_a_model_that_is_no_model_of_nearness_ends_the_command(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    _, _, folder = saved("depth_anything", tmp_path / "model")
    change(folder, **values)
    write_picture(tmp_path / "clips/1.png")
    said = make(tmp_path / "clips", "--kind", "depth", "--model", folder)
    assert said.code == 5 and words in said.err, said.err
    assert not list((tmp_path / "clips").rglob("control/*"))


# Poses ---------------------------------------------------------------------------------------------------------------


def constant_model(onnx: ModuleType, path: Path, size: tuple[int, int], *outputs: np.ndarray) -> None:
    """An ONNX model of a picture of (height, width) that always gives the same answers."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    names = [f"out{number}" for number in range(len(outputs))]
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in zip(names, outputs, strict=True)
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, *size])],
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape)
            for name, value in zip(names, outputs, strict=True)
        ],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def pose_models(folder: Path, boxes: np.ndarray) -> Path:
    """A detector that sees these boxes, and 133 keypoints of a body across each, all of them sure."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("rtmlib")
    pytest.importorskip("onnxruntime")
    folder.mkdir()
    constant_model(onnx, folder / "yolox_tiny.onnx", (64, 96), boxes)
    x, y = np.zeros((1, 133, 96), np.float32), np.zeros((1, 133, 128), np.float32)
    for point in range(133):
        x[0, point, 20 + point % 50] = y[0, point, 20 + (7 * point) % 90] = 0.9
    constant_model(onnx, folder / "dw-tiny.onnx", (64, 48), x, y)
    return folder


PERSON = np.array([[[5, 5, 60, 45, 0.9]]], np.float32)
NOBODY = np.array([[[5, 5, 60, 45, 0.1]]], np.float32)


def test_a_pose_is_drawn_where_a_person_is_and_black_where_nobody_is(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    write_picture(clips / "1.png", size=(51, 67))
    write_clip(clips / "2.mp4", frames=4)
    models = {"person": pose_models(tmp_path / "person", PERSON), "nobody": pose_models(tmp_path / "nobody", NOBODY)}
    for name, model in models.items():
        said = make(clips, "--kind", "pose", "--model", model, "--out", tmp_path / f"{name}-out")
        assert (said.code, said.out) == (0, "done: 2 made\n"), said.err
        drawn = np.asarray(Image.open(tmp_path / f"{name}-out/1.png"))
        assert drawn.shape == (51, 67, 3) and drawn.any() == (name == "person")
        assert probe_visual(tmp_path / f"{name}-out/2.mp4").frames == 4


def test_a_folder_without_the_two_models_of_a_pose_is_told(tmp_path: Path) -> None:
    folder = pose_models(tmp_path / "model", PERSON)
    (folder / "dw-tiny.onnx").unlink()
    write_picture(tmp_path / "clips/1.png")
    said = make(tmp_path / "clips", "--kind", "pose", "--model", folder)
    assert said.code == 5 and "dw-" in said.err, said.err
