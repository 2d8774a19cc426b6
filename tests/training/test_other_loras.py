"""Runs that start from LoRA files of other tools, or of our own exports: the same update, exactly."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import FAMILIES, LiveModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vfun_cli.checkpoints.lora_export import export_adapter
from vfun_cli.config.network import check_network
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.training.lora import add_adapters, load_network

LiveModels = Callable[[str], LiveModel]
RANK, ALPHA = 3, 2.0
HUNYUAN = "hunyuanvideo-t2v"
Adapter = dict[str, tuple[Tensor, Tensor]]
"""A and B of each layer."""


def config_of(live: LiveModel, **given: Any) -> RunConfig:
    options = {"rank": RANK, "network_alpha": ALPHA, "pretrained_model_name_or_path": live.folder, "device": "cpu"}
    return resolve("lora", live.spec, options | given, environ={}).config


def started(live: LiveModel, file: Path, config: RunConfig) -> Adapter:
    """What the adapters of a run begin with, once the launch has let it through."""
    check_network(file, config, live.spec)
    transformer = live.transformer()
    add_adapters(transformer, config, live.spec, live.dims)
    load_network(transformer, file, config, live.spec, live.dims)
    found = dict(transformer.named_parameters())
    suffix = ".lora_A.default.weight"
    layers = [name.removesuffix(suffix) for name in found if name.endswith(suffix)]
    return {layer: (found[layer + suffix], found[f"{layer}.lora_B.default.weight"]) for layer in layers}


def checkpoint_of(live: LiveModel, folder: Path, layers: list[str]) -> tuple[Path, Adapter]:
    """A LoRA of random values, as a run saves it."""
    generator, model = torch.Generator().manual_seed(0), live.adapter.transformer
    adapter: Adapter = {}
    for layer in layers:
        rows, columns = model.get_submodule(layer).weight.shape
        down, up = (torch.randn(shape, generator=generator) for shape in ((RANK, columns), (rows, RANK)))
        adapter[layer] = (down, up)
    tensors = {
        f"base_model.model.{layer}.lora_{side}.weight": value
        for layer, pair in adapter.items()
        for side, value in zip("AB", pair, strict=True)
    }
    (folder / "checkpoint-1/model").mkdir(parents=True)
    save_file(tensors, folder / "checkpoint-1/model/adapter_model.safetensors")
    stated = f'{{"r": {RANK}, "lora_alpha": {ALPHA}}}'
    (folder / "checkpoint-1/model/adapter_config.json").write_text(stated)
    return folder / "checkpoint-1", adapter


def linear_of(live: LiveModel, within: str = "") -> list[str]:
    idle = live.spec.model.modules_without_gradient(live.dims)
    named = live.adapter.transformer.named_modules()
    layers = [name for name, module in named if isinstance(module, nn.Linear) and within in name]
    return [layer for layer in layers if not f"{layer}.".startswith(tuple(f"{module}." for module in idle))]


def assert_alike(found: Adapter, expected: Adapter, strength: float) -> None:
    for layer, (down, up) in expected.items():
        torch.testing.assert_close(found[layer][0], down, rtol=0, atol=0)
        torch.testing.assert_close(strength * found[layer][1], ALPHA / RANK * up, rtol=1e-6, atol=1e-6)
    assert found.keys() >= expected.keys()
    assert not any(up.any() for layer, (_, up) in found.items() if layer not in expected)


def forms_of(live: LiveModel) -> list[str]:
    return list(live.spec.export.lora_formats)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [ALPHA, 6.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_starts_a_run_with_the_same_matrices(
    family: str, alpha: float, live_model: LiveModels, tmp_path: Path
) -> None:
    live = live_model(family)
    layers = linear_of(live)
    config = config_of(live, network_alpha=alpha, target_name=tuple(layers))
    checkpoint, adapter = checkpoint_of(live, tmp_path, layers)
    locate = live.spec.export.comfyui_location
    for form in forms_of(live):
        folder = export_adapter(
            checkpoint, tmp_path / form, format=live.spec.export.lora_formats[form], dtype="fp32",
            released=live.spec.export.names["same"],
            locate=(lambda layer: locate(layer, live.dims)) if form == "comfyui" and locate else None,
        ).output  # fmt: skip
        assert_alike(started(live, folder, config), adapter, alpha / RANK)


def exported_for_comfyui(live: LiveModel, checkpoint: Path, output: Path) -> Path:
    locate = live.spec.export.comfyui_location
    assert locate is not None
    return export_adapter(
        checkpoint, output, format="comfyui", dtype="fp32", locate=lambda layer: locate(layer, live.dims)
    ).output


def test_parts_of_a_joint_layer_that_were_not_trained_start_fresh(live_model: LiveModels, tmp_path: Path) -> None:
    live = live_model(HUNYUAN)
    layers = [layer for layer in linear_of(live) if layer.endswith((".attn.to_q", ".proj_mlp"))]
    checkpoint, adapter = checkpoint_of(live, tmp_path, layers)
    folder = exported_for_comfyui(live, checkpoint, tmp_path / "out")
    config = config_of(live, target_name=("attn.to_q", "attn.to_k", "proj_mlp"))
    assert_alike(started(live, folder, config), adapter, ALPHA / RANK)


def test_layers_outside_the_blocks_have_the_names_of_comfyuis_modules(live_model: LiveModels, tmp_path: Path) -> None:
    """comfy/ldm/hunyuan_video/model.py: MLPEmbedder has in_layer and out_layer, LastLayer shift before scale."""
    live = live_model(HUNYUAN)
    layers = [layer for layer in linear_of(live) if "blocks." not in layer]
    checkpoint, adapter = checkpoint_of(live, tmp_path, layers)
    folder = exported_for_comfyui(live, checkpoint, tmp_path / "out")
    stored = load_file(folder / "checkpoint-1.safetensors")
    embedders = ("time_in", "vector_in", "guidance_in", "txt_in.t_embedder", "txt_in.c_embedder")
    assert {name.removeprefix("diffusion_model.").removesuffix(".alpha") for name in stored if ".alpha" in name} == {
        *(f"{embedder}.{side}_layer" for embedder in embedders for side in ("in", "out")),
        "txt_in.input_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1",
    }  # fmt: skip
    up = stored["diffusion_model.final_layer.adaLN_modulation.1.lora_up.weight"]
    scale, shift = (ALPHA / RANK * adapter["norm_out.linear"][1]).chunk(2)
    torch.testing.assert_close(up, torch.cat([shift, scale]))


def joint_file(live: LiveModel, file: Path, rank: int) -> Adapter:
    """As musubi-tuner writes it: one A for q, k and v, and an alpha."""
    generator, dim = torch.Generator().manual_seed(1), live.dims.dim
    down, up = torch.randn(rank, dim, generator=generator), torch.randn(3 * dim, rank, generator=generator)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}, file
    )
    return {
        f"transformer_blocks.0.attn.to_{part}": (down, rows) for part, rows in zip("qkv", up.split(dim), strict=True)
    }


def test_a_joint_layer_of_musubi_tuner_is_split_exactly(live_model: LiveModels, tmp_path: Path) -> None:
    live = live_model(HUNYUAN)
    adapter = joint_file(live, tmp_path / "musubi.safetensors", RANK)
    config = config_of(live, target_name=("attn.to_q", "attn.to_k", "attn.to_v"))
    assert_alike(started(live, tmp_path / "musubi.safetensors", config), adapter, ALPHA / RANK)


def test_a_joint_layer_that_cannot_be_split_at_the_runs_rank_says_so(live_model: LiveModels, tmp_path: Path) -> None:
    live = live_model(HUNYUAN)
    joint_file(live, tmp_path / "musubi.safetensors", 3 * RANK)
    config = config_of(live, target_name=("attn.to_q", "attn.to_k", "attn.to_v"))
    with pytest.raises(
        ConfigError, match=r"rank 9 \(joint layers .* use all 9 directions.*this run has rank 3"
    ) as caught:
        check_network(tmp_path / "musubi.safetensors", config, live.spec)
    assert caught.value.hint == "Add --rank 9."
    check_network(tmp_path / "musubi.safetensors", replace(config, rank=9), live.spec)


def test_every_layer_that_does_not_fit_is_named_with_the_whole_target_name(
    live_model: LiveModels, tmp_path: Path
) -> None:
    live = live_model("wan-fun-control")
    layers = linear_of(live, "blocks.")
    checkpoint, _ = checkpoint_of(live, tmp_path, layers)
    config = config_of(live, target_name=("attn1.to_q",))
    with pytest.raises(ConfigError) as caught:
        check_network(checkpoint, config, live.spec)
    assert f"{len(layers) - live.dims.num_layers} layers that --target-name leaves out" in caught.value.message
    assert "attn2.add_k_proj" in caught.value.message and "ffn.net.2" in caught.value.message
    hint = caught.value.hint or ""
    typed = hint.removeprefix("Add --target-name ").removesuffix(".").split(",")
    check_network(checkpoint, replace(config, target_name=tuple(typed)), live.spec)


def test_layers_and_shapes_of_another_model_are_all_named(live_model: LiveModels, tmp_path: Path) -> None:
    live = live_model("wan-fun-control")
    checkpoint, _ = checkpoint_of(live, tmp_path, ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "blocks.0.attn1.to_k"])
    file = checkpoint / "model/adapter_model.safetensors"
    tensors = {
        name.replace("blocks.1.", "blocks.77.").replace("to_k", "to_x"): value
        for name, value in load_file(file).items()
    }
    tensors["base_model.model.blocks.0.attn1.to_q.lora_B.weight"] = torch.ones(5, RANK)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        check_network(checkpoint, config_of(live), live.spec)
    assert "2 of 3 adapters are for layers that this model does not have: " in caught.value.message
    assert "blocks.77.attn1.to_q" in caught.value.message and "blocks.0.attn1.to_x" in caught.value.message
    assert "1 layers have another shape in this model: blocks.0.attn1.to_q" in caught.value.message


def test_the_strength_of_a_file_is_told_with_the_trainer_that_it_is_taken_for(
    live_model: LiveModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = live_model("wan-fun-control")
    weight = live.adapter.transformer.get_submodule("blocks.0.attn1.to_q").weight
    name = "blocks.0.self_attn.q.lora_{}.default.weight"
    tensors = {name.format("A"): torch.ones(RANK, weight.shape[1]), name.format("B"): torch.ones(len(weight), RANK)}
    save_file(tensors, tmp_path / "step-500.safetensors")
    check_network(tmp_path / "step-500.safetensors", config_of(live), live.spec)
    said = " ".join(capsys.readouterr().err.split())
    assert "taken for a file of DiffSynth-Studio: strength 1, as it trains with an alpha that equals the rank" in said
    assert "this run has strength 0.666667: the B matrices of" in said
