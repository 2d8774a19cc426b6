"""The EasyAnimate transformer against the original implementation's tensors, counts and live token sequences."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from vfun_cli.errors import CheckpointError
from vfun_cli.families.easyanimate_control import (
    CAPTION_TOKENS,
    V5,
    V5_1,
    complete_config,
    modules_without_gradient,
    read_dims,
)
from vfun_cli.families.easyanimate_control.names import diffusers_name, released_name
from vfun_cli.families.easyanimate_control.transformer import build_transformer, load_transformer
from vfun_cli.families.spec import ClipShape, FamilySpec
from vfun_cli.modeling.rope import crop_region, rotary_table
from vfun_cli.modeling.weights import empty_model

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    "easyanimate_v5.1_control/control_ref",
    "easyanimate_v5.1_control/control_ref_partial_mmdit",
    "easyanimate_v5.1_control/control_ref_square",
    "easyanimate_v5_control/control",
    "easyanimate_v5_control/control_image",
]
RELEASED = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "out_channels": 16,
    "patch_size": 2,
    "num_layers": 48,
    "mmdit_layers": 48,
}
QWEN = {"text_embed_dim": 3584, "text_embed_dim_t5": None, "add_norm_text_encoder": True}
BERT_T5 = {"text_embed_dim": 1024, "text_embed_dim_t5": 2048, "add_norm_text_encoder": False}


def config(case: str) -> dict:
    return json.loads((GOLDEN / case / "config.json").read_text())


def load(case: str, folder: Path):
    """The golden weights through the loader of released directories."""
    (folder / "diffusion_pytorch_model.safetensors").symlink_to((GOLDEN / case / "weights.safetensors").resolve())
    return load_transformer(folder, complete_config(config(case)))


def predict(model, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    text = {"encoder_hidden_states": tensors["text"].to(dtype)}
    if "text_t5" in tensors:
        text["encoder_hidden_states_t5"] = tensors["text_t5"].to(dtype)
    return model(
        tensors["noisy"].to(dtype),
        tensors["timestep"],
        control_latents=tensors["control_latents"].to(dtype),
        return_dict=False,
        **text,
    )[0]


@pytest.mark.parametrize("case", CASES)
def test_predictions_losses_and_gradients_are_the_originals(case: str, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / case / "io.safetensors")
    meta = json.loads((GOLDEN / case / "meta.json").read_text())
    model = load(case, tmp_path)

    prediction = predict(model, tensors)
    error = (prediction - tensors["target"]).square()
    loss = error.mean()
    loss.backward()

    torch.testing.assert_close(prediction, tensors["pred"], atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(meta["loss"], rel=1e-5)
    norms = {released_name(name): p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    for name, norm in meta["grad_norm"].items():
        assert norms.pop(name, 0.0) == pytest.approx(norm, rel=1e-3, abs=1e-7), name
    assert not norms
    assert len(meta["grad_norm"]) == len(list(model.parameters()))


@pytest.mark.parametrize("case", CASES)
def test_only_the_named_modules_have_no_gradient(case: str, tmp_path: Path) -> None:
    model = load(case, tmp_path)
    predict(model, load_file(GOLDEN / case / "io.safetensors")).square().mean().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    modules = modules_without_gradient(read_dims(config(case)))
    assert still == {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{m}." for m in modules))}
    assert bool(modules) == (case != "easyanimate_v5.1_control/control_ref_partial_mmdit")


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    case = CASES[1]
    tensors = load_file(GOLDEN / case / "io.safetensors")
    model = load(case, tmp_path)
    gradients = []
    for recompute in (False, True):
        model.enable_gradient_checkpointing() if recompute else model.disable_gradient_checkpointing()
        model.zero_grad()
        (predict(model, tensors) - tensors["target"]).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("case", CASES)
def test_rotary_tables_are_the_originals(case: str) -> None:
    tensors = load_file(GOLDEN / case / "io.safetensors")
    frames, height, width = tensors["latents"].shape[2:]
    cos, sin = rotary_table(16, frames, height // 2, width // 2, base=(30, 45))
    assert torch.equal(cos, tensors["rope_cos"])
    assert torch.equal(sin, tensors["rope_sin"])


@pytest.mark.parametrize(
    ("height", "width", "region"),
    [
        (256, 256, (0, 8, 30, 38)),
        (512, 512, (0, 8, 30, 38)),
        (1024, 1024, (0, 8, 30, 38)),
        (384, 672, (2, 0, 28, 45)),
        (672, 384, (0, 14, 30, 31)),
        (480, 720, (0, 0, 30, 45)),
    ],
)
def test_crop_regions_are_those_of_the_released_models(height: int, width: int, region: tuple[int, ...]) -> None:
    assert crop_region(height // 16, width // 16, 30, 45) == region


@pytest.mark.parametrize("case", ["easyanimate_v5.1_control/control_ref_square", "easyanimate_v5_control/control"])
def test_bf16_is_near_float32(case: str, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / case / "io.safetensors")
    model = load(case, tmp_path)
    prediction = predict(model.to(torch.bfloat16), tensors, torch.bfloat16)
    difference = (prediction.float() - tensors["pred"]).norm() / tensors["pred"].norm()
    assert 0 < difference < 2e-2
    prediction.float().square().mean().backward()
    assert model.proj.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("own", "count"),
    [
        ({"in_channels": 48, **QWEN}, 11_799_450_176),
        ({"in_channels": 33, **QWEN}, 11_799_265_856),
        ({"in_channels": 32, **BERT_T5}, 11_797_680_192),
        ({"in_channels": 33, "num_layers": 36, "mmdit_layers": 18, **QWEN}, 6_814_670_912),
        ({"in_channels": 33, "num_layers": 36, "mmdit_layers": 18, **BERT_T5}, 6_813_097_536),
    ],
)
def test_released_configurations_have_the_released_number_of_parameters(own: dict, count: int) -> None:
    model = empty_model(lambda: build_transformer({**RELEASED, **own}))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("case", CASES)
def test_released_names_survive_the_round_trip(case: str) -> None:
    names = set(load_file(GOLDEN / case / "weights.safetensors"))
    live = {diffusers_name(name) for name in names}
    assert live == set(empty_model(lambda: build_transformer(complete_config(config(case)))).state_dict())
    assert {released_name(name) for name in live} == names


def test_names_of_lora_matrices_follow_their_layer() -> None:
    live = "transformer_blocks.11.attn1.to_add_out.lora_A.weight"
    assert released_name(live) == "transformer_blocks.11.attn2.to_out.0.lora_A.weight"
    assert diffusers_name(released_name(live)) == live
    assert released_name("transformer_blocks.1.attn1.to_out.0.bias") == "transformer_blocks.1.attn1.to_out.0.bias"


def test_a_missing_tensor_is_an_error_with_its_name(tmp_path: Path) -> None:
    case = CASES[0]
    state = load_file(GOLDEN / case / "weights.safetensors")
    del state["transformer_blocks.1.attn2.to_q.weight"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: transformer_blocks\.1\.attn1\.add_q_proj\.weight"):
        load_transformer(tmp_path, complete_config(config(case)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_channels": 768}, "layers that the Control models do not have"),
        ({"nonsense": 1}, "does not know: nonsense"),
        ({"num_heads": 1}, "num_heads.*Did you mean"),
    ],
)
def test_configurations_of_other_models_are_refused(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        empty_model(lambda: build_transformer({**RELEASED, "in_channels": 48, **QWEN, **change}))


def test_a_key_that_the_original_overrides_adds_no_layer() -> None:
    plain = {**RELEASED, "in_channels": 48, **QWEN}
    models = [empty_model(lambda c=c: build_transformer(c)) for c in (plain, {**plain, "enable_clip_in_inpaint": True})]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(CheckpointError, match="num_attention_heads is missing"):
        read_dims({"in_channels": 48})


SHAPES = [
    ClipShape(frames=1, height=64, width=64),
    ClipShape(frames=1, height=128, width=96),
    ClipShape(frames=1, height=192, width=192),
    ClipShape(frames=5, height=64, width=64),
    ClipShape(frames=9, height=96, width=160),
    ClipShape(frames=21, height=160, width=96),
]


@pytest.mark.parametrize("mmdit_layers", [10_000, 1])
@pytest.mark.parametrize("spec", [V5_1, V5], ids=lambda spec: spec.name)
@pytest.mark.parametrize("clip", SHAPES, ids=str)
def test_planned_tokens_and_flops_are_those_of_the_live_model(
    spec: FamilySpec, clip: ClipShape, mmdit_layers: int
) -> None:
    two_streams = spec is V5
    own = {"text_embed_dim": 40, "text_embed_dim_t5": 24 if two_streams else None}
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "mmdit_layers": mmdit_layers}
    settings = {**RELEASED, **sizes, **own, "in_channels": 32 if two_streams else 48, "time_embed_dim": 16}
    with torch.device("meta"):
        model = build_transformer(settings)
        seen: list[int] = []
        model.transformer_blocks[0].register_forward_hook(
            lambda _, args, out: seen.append(out[0].shape[1] + out[1].shape[1])
        )
        latents = torch.empty(1, 16, *spec.plan.latent_shape(clip))
        captions = {"encoder_hidden_states": torch.empty(1, CAPTION_TOKENS, 40)}
        if two_streams:
            captions["encoder_hidden_states_t5"] = torch.empty(1, CAPTION_TOKENS, 24)
        control = torch.empty(1, settings["in_channels"] - 16, *latents.shape[2:])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(latents, torch.zeros(1), control_latents=control, **captions)
    dims = spec.model.read_dims(settings)
    assert seen == [spec.model.sequence_tokens(clip, dims)]
    assert spec.model.forward_flops(clip, dims) == pytest.approx(counter.get_total_flops(), rel=1e-6)
    assert {type(block).__name__ for block in model.transformer_blocks} == set(spec.model.block_classes)


def test_the_documents_example_has_13312_video_tokens() -> None:
    clip = ClipShape(frames=49, height=512, width=512)
    assert V5_1.plan.video_tokens(clip) == 13_312
    assert V5_1.model.sequence_tokens(clip, V5_1.model.dims) == 13_312 + 256
    assert V5.model.sequence_tokens(clip, V5.model.dims) == 13_312 + 512
