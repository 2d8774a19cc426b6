"""The CogVideoX-Fun transformer against the original implementation's tensors, counts and live token sequences."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vfun_cli.checkpoints.naming import unchanged
from vfun_cli.errors import CheckpointError
from vfun_cli.families.cogvideox_fun import SPEC, read_dims
from vfun_cli.families.cogvideox_fun.transformer import CogVideoXFunTransformer, build_transformer, load_transformer
from vfun_cli.families.spec import ClipShape
from vfun_cli.modeling.weights import empty_model
from vfun_cli.training.lora import choose_layers

GOLDEN = Path(__file__).parents[1] / "golden/cogvideox_fun"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/meta.json"))
ROTARY = [case for case in CASES if not case.startswith("2b")]
V1_0 = {"num_attention_heads": 30, "attention_head_dim": 64, "in_channels": 33, "num_layers": 30}
V1_1 = {
    **V1_0,
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
    "add_noise_in_inpaint_model": True,
}
V1_5 = {**V1_1, "patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300}


def config(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / case / "config.json").read_text())


def load(case: str, folder: Path) -> CogVideoXFunTransformer:
    """The golden weights through the loader of released directories."""
    weights = (GOLDEN / case / "weights.safetensors").resolve()
    (folder / "diffusion_pytorch_model.safetensors").symlink_to(weights)
    return load_transformer(folder, config(case))


def inputs(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    parts = [tensors[name] for name in ("noisy", "inpaint_latents") if name in tensors]
    return torch.cat(parts, dim=2).to(dtype), tensors["text"].to(dtype), tensors["timestep"]


def test_all_cases_are_here() -> None:
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES)
def test_predictions_losses_and_gradients_are_the_originals(case: str, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / case / "io.safetensors")
    meta = json.loads((GOLDEN / case / "meta.json").read_text())
    model = load(case, tmp_path)

    prediction = model(*inputs(tensors))
    loss = (prediction - tensors["target"]).square().mean()
    loss.backward()

    torch.testing.assert_close(prediction, tensors["pred"], atol=1e-5, rtol=0)
    assert loss.item() == pytest.approx(meta["loss"], rel=1e-5)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == meta["grad_norm"].keys() == dict(model.named_parameters()).keys()
    for name, norm in meta["grad_norm"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-3, abs=1e-7), name


@pytest.mark.parametrize("case", ROTARY)
def test_rotary_tables_are_the_originals(case: str, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / case / "io.safetensors")
    seen: list[tuple[Tensor, Tensor]] = []
    model = load(case, tmp_path)
    model.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, given: seen.append(given["image_rotary_emb"]), with_kwargs=True
    )
    with torch.no_grad():
        model(*inputs(tensors))
    torch.testing.assert_close(seen[0][0], tensors["rope_cos"], atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[0][1], tensors["rope_sin"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", ["2b_other_size", "5b_other_size", "v15_image"])
def test_bf16_is_near_float32(case: str, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / case / "io.safetensors")
    model = load(case, tmp_path)
    prediction = model.to(torch.bfloat16)(*inputs(tensors, torch.bfloat16))
    difference = (prediction.float() - tensors["pred"]).norm() / tensors["pred"].norm()
    assert 0 < difference < 2e-2


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "5b_other_size/io.safetensors")
    model = load("5b_other_size", tmp_path)
    gradients = []
    for recompute in (False, True):
        model.enable_gradient_checkpointing() if recompute else model.disable_gradient_checkpointing()
        model.zero_grad()
        (model(*inputs(tensors)) - tensors["target"]).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(
    ("released", "count"),
    [(V1_0, 1_693_914_432), (V1_1, 5_570_491_968), (V1_5, 5_571_094_144)],
    ids=["2b", "5b", "V1.5"],
)
def test_released_configurations_have_the_released_number_of_parameters(released: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = build_transformer(released)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_key_that_diffusers_does_not_know_is_kept() -> None:
    small = {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1, "time_embed_dim": 8}
    assert empty_model(lambda: build_transformer({**V1_1, **small})).config.add_noise_in_inpaint_model is True
    assert empty_model(lambda: build_transformer({**V1_0, **small})).config.add_noise_in_inpaint_model is False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("released", "layers", "count"), [(V1_0, 90, 22_118_400), (V1_1, 126, 49_545_216)], ids=["2b", "5b"]
)
def test_a_lora_of_the_documents_has_the_originals_number_of_parameters(
    released: dict[str, Any], layers: int, count: int
) -> None:
    linear = {name: module for name, module in empty_model(lambda: build_transformer(released)).named_modules()
              if isinstance(module, nn.Linear)}  # fmt: skip
    found = choose_layers(list(linear), ("to_q", "to_k", "to_v"), unchanged)
    assert len(found) == layers
    assert sum(64 * (linear[name].in_features + linear[name].out_features) for name in found) == count


def test_a_lora_file_of_the_original_predicts_the_same(tmp_path: Path) -> None:
    model = load("2b_native", tmp_path)
    adapter = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"])
    inject_adapter_in_model(adapter, model)
    loaded = set_peft_model_state_dict(model, load_file(GOLDEN / "lora_peft/checkpoint-1.safetensors"))
    assert not loaded.unexpected_keys
    prediction = model(*inputs(load_file(GOLDEN / "2b_native/io.safetensors")))
    torch.testing.assert_close(prediction, load_file(GOLDEN / "lora_peft/io.safetensors")["pred"], atol=1e-5, rtol=0)


def test_a_missing_tensor_is_an_error_with_its_name(tmp_path: Path) -> None:
    state = load_file(GOLDEN / "2b_native/weights.safetensors")
    del state["norm_final.bias"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: norm_final\.bias"):
        load_transformer(tmp_path, config("2b_native"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nonsense": 1}, "does not know: nonsense"),
        ({"num_layer": 1}, "num_layer.*Did you mean 'num_layers'"),
        ({"use_learned_positional_embeddings": True}, "image-to-video model of CogVideoX"),
        ({"ofs_embed_dim": 512}, "image-to-video model of CogVideoX"),
    ],
)
def test_configurations_of_other_models_are_refused(change: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(CheckpointError, match=message):
        build_transformer({**V1_1, **change})


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(CheckpointError, match="num_attention_heads is missing"):
        read_dims({"in_channels": 33})


SHAPES = [
    ClipShape(frames=1, height=64, width=64),
    ClipShape(frames=1, height=128, width=96),
    ClipShape(frames=1, height=192, width=192),
    ClipShape(frames=5, height=64, width=64),
    ClipShape(frames=13, height=96, width=160),
    ClipShape(frames=21, height=160, width=96),
]


@pytest.mark.parametrize("released", [V1_0, V1_1, V1_5], ids=["2b", "5b", "V1.5"])
@pytest.mark.parametrize("clip", SHAPES, ids=str)
def test_planned_tokens_and_flops_are_those_of_the_live_model(clip: ClipShape, released: dict[str, Any]) -> None:
    small = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "text_embed_dim": 40}
    settings = {**released, **small, "time_embed_dim": 16}
    with torch.device("meta"):
        model = build_transformer(settings)
        seen: list[int] = []
        model.transformer_blocks[0].register_forward_hook(
            lambda _, args, out: seen.append(out[0].shape[1] + out[1].shape[1])
        )
        frames, height, width = SPEC.plan.latent_shape(clip)
        latents, text = torch.empty(1, frames, 33, height, width), torch.empty(1, 226, 40)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            prediction = model(latents, text, torch.zeros(1))
    dims = read_dims(settings)
    assert prediction.shape == (1, frames, 16, height, width)
    assert seen == [SPEC.model.sequence_tokens(clip, dims)]
    assert SPEC.model.forward_flops(clip, dims) == pytest.approx(counter.get_total_flops(), rel=1e-6)
    assert {type(block).__name__ for block in model.transformer_blocks} == set(SPEC.model.block_classes)


def test_the_documents_example_has_13312_video_tokens() -> None:
    clip = ClipShape(frames=49, height=512, width=512)
    assert SPEC.model.sequence_tokens(clip, SPEC.model.dims) == 13_312 + 226


def test_2b_refuses_more_latent_frames_than_it_has_positions_for(tmp_path: Path) -> None:
    model = load("2b_native", tmp_path)
    with pytest.raises(ValueError, match="4 latent frames, but this model has positions for 3"):
        model(torch.zeros(1, 4, 9, 8, 12), torch.zeros(1, 10, 32), torch.zeros(1))
