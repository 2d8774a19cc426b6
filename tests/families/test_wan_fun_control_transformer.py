"""The Wan2.1-Fun Control transformer against the original implementation's tensors and parameter counts."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from safetensors.torch import load_file

from vfun_cli.errors import CheckpointError
from vfun_cli.families.wan_fun_control.names import live_name, released_name
from vfun_cli.families.wan_fun_control.transformer import RotaryTables, WanFunControlTransformer, transformer_config

GOLDEN = Path(__file__).parents[1] / "golden/wan_fun_control/v11"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "weights.safetensors")


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "outputs.safetensors")


def config() -> dict:
    return json.loads((GOLDEN / "config.json").read_text())


def build(weights: dict[str, torch.Tensor]) -> WanFunControlTransformer:
    model = WanFunControlTransformer(**transformer_config({k: tuple(v.shape) for k, v in weights.items()}, config()))
    model.load_state_dict({live_name(name): tensor for name, tensor in weights.items()}, strict=True)
    return model


def predict(model: WanFunControlTransformer, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    sigmas = inputs["sigmas"].view(-1, 1, 1, 1, 1)
    noisy = (1 - sigmas) * inputs["latents"] + sigmas * inputs["noise"]
    texts = [inputs["context_0"], inputs["context_1"]]
    text = torch.stack([F.pad(rows, (0, 0, 0, 512 - len(rows))) for rows in texts])
    latents = torch.cat([noisy, inputs["y"]], dim=1)
    return model(
        latents.to(dtype),
        inputs["timesteps"],
        text.to(dtype),
        inputs["clip_fea"].to(dtype),
        inputs["full_ref"].to(dtype),
    )


def loss_of(prediction: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(prediction.float(), inputs["noise"] - inputs["latents"])


def test_prediction_loss_and_gradients_are_those_of_the_original(weights, inputs, outputs):
    model = build(weights)
    prediction = predict(model, inputs, torch.float32)
    torch.testing.assert_close(prediction, outputs["fp32.pred"], atol=1e-4, rtol=0)
    loss = loss_of(prediction, inputs)
    torch.testing.assert_close(loss, outputs["fp32.loss"][0], rtol=1e-5, atol=0)
    loss.backward()
    gradients = {released_name(name): parameter.grad for name, parameter in model.named_parameters()}
    names = [name.removeprefix("fp32.grad.") for name in outputs if name.startswith("fp32.grad.")]
    assert len(names) == 5
    for name in names:
        expected = outputs[f"fp32.grad.{name}"]
        assert (gradients[name] - expected).norm() <= 1e-3 * expected.norm(), name


def test_bf16_predictions_are_near_those_of_the_original(weights, inputs, outputs):
    with torch.no_grad():
        prediction = predict(build(weights).to(torch.bfloat16), inputs, torch.bfloat16)
    expected = outputs["fp32.pred"]
    assert (prediction.float() - expected).norm() <= 1.2e-2 * expected.norm()
    torch.testing.assert_close(loss_of(prediction, inputs), outputs["bf16.loss"][0], rtol=1e-2, atol=0)


def test_every_parameter_gets_a_gradient_even_when_all_conditions_are_dropped(weights, inputs):
    model = build(weights)
    empty = {**inputs, **{name: torch.zeros_like(inputs[name]) for name in ("y", "clip_fea", "full_ref")}}
    loss_of(predict(model, empty, torch.float32), inputs).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_gradient_checkpointing_changes_nothing(weights, inputs, outputs):
    model = build(weights)
    model.enable_gradient_checkpointing()
    loss_of(predict(model.train(), inputs, torch.float32), inputs).backward()
    gradient = model.patch_embedding.ref_conv.weight.grad
    torch.testing.assert_close(gradient, outputs["fp32.grad.ref_conv.weight"], rtol=1e-3, atol=1e-6)


def released_shapes(*, dim: int, ffn_dim: int, heads: int, layers: int, reference: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of a released checkpoint, from the table in the model's documentation rather than from our module."""
    attention = {
        f"{kind}.{part}": shape for kind in "qkvo" for part, shape in (("weight", (dim, dim)), ("bias", (dim,)))
    }
    attention |= {"norm_q.weight": (dim,), "norm_k.weight": (dim,)}
    image = {f"{k}_img.{p}": s for k in "kv" for p, s in (("weight", (dim, dim)), ("bias", (dim,)))}
    block = {f"self_attn.{k}": v for k, v in attention.items()}
    block |= {f"cross_attn.{k}": v for k, v in {**attention, **image, "norm_k_img.weight": (dim,)}.items()}
    block |= {"modulation": (1, 6, dim), "norm3.weight": (dim,), "norm3.bias": (dim,)}
    block |= {
        "ffn.0.weight": (ffn_dim, dim),
        "ffn.0.bias": (ffn_dim,),
        "ffn.2.weight": (dim, ffn_dim),
        "ffn.2.bias": (dim,),
    }
    shapes: dict[str, tuple[int, ...]] = {f"blocks.{i}.{k}": v for i in range(layers) for k, v in block.items()}
    linears = {
        "text_embedding.0": (dim, 4096),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, 256),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "img_emb.proj.1": (1280, 1280),
        "img_emb.proj.3": (dim, 1280),
        "head.head": (64, dim),
        "patch_embedding": (dim, 48, 1, 2, 2),
    }
    if reference:
        linears["ref_conv"] = (dim, 16, 2, 2)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, size in (("img_emb.proj.0", 1280), ("img_emb.proj.4", dim)):
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return shapes | {"head.modulation": (1, 2, dim)}


BIG = {"dim": 5120, "ffn_dim": 13824, "heads": 40, "layers": 40}
SMALL = {"dim": 1536, "ffn_dim": 8960, "heads": 12, "layers": 30}


@pytest.mark.parametrize(
    ("size", "reference", "billions", "tensors"),
    [(BIG, False, 16.3951, 1303), (BIG, True, 16.3955, 1305), (SMALL, True, 1.5646, 985)],
    ids=["V1.0-14B", "V1.1-14B", "V1.1-1.3B"],
)
def test_released_models_have_the_released_tensors(size, reference, billions, tensors):
    shapes = released_shapes(**size, reference=reference)
    stated = {"num_heads": size["heads"], "in_dim": 48, "dim": size["dim"], "add_ref_conv": reference}
    with torch.device("meta"):
        model = WanFunControlTransformer(**transformer_config(shapes, stated))
    state = model.state_dict()
    assert {name: tuple(state[live_name(name)].shape) for name in shapes} == shapes
    assert {released_name(name) for name in state} == set(shapes)
    assert len(state) == tensors
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e9, 4) == billions


def test_rotary_tables_stay_exact_at_full_size_when_the_model_is_cast():
    theirs = WanRotaryPosEmbed(128, (1, 2, 2), 1024)
    latents = torch.empty(1).expand(1, 16, 21, 90, 160)
    ours = RotaryTables(128, (1, 2, 2)).bfloat16()
    for table, expected in zip(ours(latents), theirs(latents), strict=True):
        assert torch.equal(table, expected)


def test_names_go_there_and_back_and_keep_what_follows(weights):
    assert all(released_name(live_name(name)) == name for name in weights)
    assert (
        released_name("blocks.7.attn2.add_k_proj.lora_A.default.weight")
        == "blocks.7.cross_attn.k_img.lora_A.default.weight"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control_adapter.conv.weight": (48, 1536, 2, 2)}, "Camera"),
        ({"casual_audio_encoder.weights": (1, 25, 1, 1)}, "Wan2.2-S2V"),
        ({"patch_embedding.weight": (48, 36, 1, 2, 2)}, "36 channels"),
        ({"img_emb.proj.0.weight": None}, "no image branch"),
        ({"head.head.weight": None}, "no head.head"),
        ({"ref_conv.weight": None}, "add_ref_conv is True, the tensors say False"),
    ],
)
def test_other_checkpoints_are_refused_by_what_they_are(weights, change, message):
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()} | change
    with pytest.raises(CheckpointError, match=message):
        transformer_config({name: shape for name, shape in shapes.items() if shape is not None}, config())


def test_a_config_without_a_usable_number_of_heads_is_refused(weights):
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    with pytest.raises(CheckpointError, match="num_heads is 5"):
        transformer_config(shapes, {**config(), "num_heads": 5})
