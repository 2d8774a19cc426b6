"""The caption encoders of HunyuanVideo against diffusers' pipelines, on tiny encoders with Llama 3's word cutting."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline, HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as T2V_TEMPLATE
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE as I2V_TEMPLATE
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from vfun_cli.demo.hunyuanvideo import build_i2v, build_t2v
from vfun_cli.errors import CheckpointError, MetadataError
from vfun_cli.modeling.encoders.clip_text import ClipPooledText
from vfun_cli.modeling.encoders.llama_prompt import LlamaPrompt
from vfun_cli.modeling.encoders.llava_prompt import LlavaPrompt

CAPTIONS: Mapping[str, str] = {
    "plain": "A red balloon rises over the hills, slowly.",
    "empty": "",
    "blank lines": "A title\n\nand a second paragraph\n\n",
    "non-ASCII": "Ein Käfer läuft über 3 grüne Blätter 🐞",
    "too long": "word " * 400,
}


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t2v")
    build_t2v(folder)
    return folder


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("i2v")
    build_i2v(folder)
    return folder


@pytest.fixture(scope="module")
def llama(t2v: Path) -> LlamaPrompt:
    return LlamaPrompt.from_folders(t2v / "text_encoder", t2v / "tokenizer", dtype=torch.float32)


@pytest.fixture(scope="module")
def llava(i2v: Path) -> LlavaPrompt:
    return LlavaPrompt.from_folders(
        i2v / "text_encoder", i2v / "tokenizer", i2v / "image_processor", dtype=torch.float32
    )


def pictures(count: int) -> tuple[list[Image.Image], Tensor]:
    """Pictures, and the same as pixels in [-1, 1] [B, 3, H, W]. Half a step up: the way back truncates."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 255, (count, 3, 40, 56), generator=generator)
    images = [Image.fromarray(value.permute(1, 2, 0).byte().numpy()) for value in values]
    return images, (values + 0.5) / 127.5 - 1


@pytest.mark.parametrize("template", [T2V_TEMPLATE, I2V_TEMPLATE], ids=["t2v", "i2v"])
def test_the_crop_starts_where_the_caption_starts(template: dict[str, Any], llama: LlamaPrompt) -> None:
    ids = llama.tokenizer(template["template"].format("balloon")).input_ids
    assert llama.tokenizer.decode(ids[template["crop_start"] :]).startswith("balloon<|eot_id|>")


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_text_to_video_prompts_are_diffusers_prompts(caption: str, llama: LlamaPrompt) -> None:
    states, mask = llama.encode([caption])
    reference = SimpleNamespace(text_encoder=llama.model, tokenizer=llama.tokenizer)
    with torch.no_grad():
        expected, expected_mask = HunyuanVideoPipeline._get_llama_prompt_embeds(
            reference, [caption], T2V_TEMPLATE, device=torch.device("cpu"), dtype=torch.float32
        )
    assert states.shape == (1, 256, 32)
    assert torch.equal(mask, expected_mask) and torch.equal(states, expected)


def test_text_states_are_the_raw_output_of_the_last_layer_but_two(llama: LlamaPrompt) -> None:
    outputs: list[Tensor] = []
    hook = llama.model.layers[-3].register_forward_hook(lambda _, given, output: outputs.append(output))
    states, _ = llama.encode(["a cat"])
    hook.remove()
    assert torch.equal(states, outputs[0][:, 95:])


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
@pytest.mark.parametrize("interleave", [2, 4])
def test_image_to_video_prompts_are_diffusers_prompts(
    caption: str, interleave: int, i2v: Path, llava: LlavaPrompt
) -> None:
    images, pixels = pictures(1)
    llava.interleave = interleave
    states, mask = llava.encode([caption], pixels)
    llava.interleave = 4
    whole = LlavaForConditionalGeneration.from_pretrained(i2v / "text_encoder")
    reference = SimpleNamespace(text_encoder=whole, tokenizer=llava.tokenizer, image_processor=llava.image_processor)
    with torch.no_grad():
        expected, expected_mask = HunyuanVideoImageToVideoPipeline._get_llama_prompt_embeds(
            reference, images[0], [caption], I2V_TEMPLATE, device=torch.device("cpu"), dtype=torch.float32,
            image_embed_interleave=interleave,
        )  # fmt: skip
    assert states.shape == (1, 576 // interleave + 252, 32)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(states, expected, atol=1e-6)


def test_prompts_of_a_batch_are_cut_one_by_one(llava: LlavaPrompt) -> None:
    captions = list(CAPTIONS.values())
    _, pixels = pictures(len(captions))
    states, mask = llava.encode(captions, pixels)
    assert states.shape == (len(captions), 396, 32)
    for index, caption in enumerate(captions):
        alone, alone_mask = llava.encode([caption], pixels[index : index + 1])
        assert torch.equal(mask[index], alone_mask[0])
        valid = mask[index].bool()
        assert torch.allclose(states[index][valid], alone[0][valid], atol=1e-5)
        assert torch.equal(mask[index], mask[index].sort(descending=True).values)  # the transformer counts on it


def test_the_assistant_header_is_cut_out_and_the_last_line_break_stays(llava: LlavaPrompt) -> None:
    ids, _ = llava._tokenize(["a red balloon"])
    rows = llava._rows(ids[0])
    text = llava.tokenizer.decode(ids[0][rows[144:] - 575], skip_special_tokens=False).split("<pad>")[0]
    assert text == "a red balloon\n\n"


def test_the_image_reaches_the_caption_states(llava: LlavaPrompt) -> None:
    _, pixels = pictures(2)
    states, _ = llava.encode(["a cat", "a cat"], pixels)
    assert not torch.allclose(states[0, 144:150], states[1, 144:150], atol=1e-6)


def test_a_caption_with_the_image_token_is_refused_with_its_text(llava: LlavaPrompt) -> None:
    with pytest.raises(MetadataError, match="two <image> here"):
        llava.encode(["two <image> here"], pictures(1)[1])


def test_a_vision_tower_with_another_number_of_tokens_is_an_error(
    llava: LlavaPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava.model.llava.config, "vision_feature_select_strategy", "full")  # with the class token
    with pytest.raises(CheckpointError, match="577 tokens of an image, not 576"):
        llava.encode(["a cat"], pictures(1)[1])


def test_pooled_text_is_diffusers_pooled_text(t2v: Path) -> None:
    clip = ClipPooledText.from_folders(t2v / "text_encoder_2", t2v / "tokenizer_2", dtype=torch.float32)
    captions = list(CAPTIONS.values())
    reference = SimpleNamespace(text_encoder_2=clip.model, tokenizer_2=clip.tokenizer)
    with torch.no_grad():
        expected = HunyuanVideoPipeline._get_clip_prompt_embeds(reference, captions, device=torch.device("cpu"))
    pooled = clip.encode(captions)
    assert pooled.shape == (len(captions), 24)
    assert torch.equal(pooled, expected)


def test_outputs_are_the_rows_of_a_batch(llama: LlamaPrompt, llava: LlavaPrompt, t2v: Path) -> None:
    clip = ClipPooledText.from_folders(t2v / "text_encoder_2", t2v / "tokenizer_2", dtype=torch.float32)
    captions, (_, pixels) = ["a red balloon", "word " * 400], pictures(2)
    cases: list[tuple[Any, list[Any], dict[str, Tensor]]] = [
        (llama, captions, dict(zip(("states", "mask"), llama.encode(captions), strict=True))),
        (
            llava,
            [(caption, image[None]) for caption, image in zip(captions, pixels, strict=True)],
            dict(zip(("states", "mask"), llava.encode(captions, pixels), strict=True)),
        ),
        (clip, captions, {"pooled": clip.encode(captions)}),
    ]
    for encoder, inputs, expected in cases:
        outputs = encoder.outputs(inputs)
        assert len(outputs) == 2
        for index, output in enumerate(outputs):
            assert output.keys() == expected.keys()
            for name in expected:  # kernels for one text and for two round differently on some processors
                torch.testing.assert_close(output[name], expected[name][index], rtol=1e-5, atol=1e-5)


def test_images_of_different_sizes_go_through_llava_together(llava: LlavaPrompt) -> None:
    _, pixels = pictures(1)
    [first, second] = llava.outputs([("a cat", pixels), ("a cat", pixels[:, :, :30])])
    assert first["states"].shape == second["states"].shape == (396, 32)


def test_an_encoder_with_a_missing_tensor_is_an_error(t2v: Path, tmp_path: Path) -> None:
    for file in (t2v / "text_encoder").iterdir():
        (tmp_path / file.name).symlink_to(file)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[name]
    weights.unlink()
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        LlamaPrompt.from_folders(tmp_path, t2v / "tokenizer", dtype=torch.float32)


def test_zero3_leaves_the_encoders_whole(t2v: Path) -> None:
    # What accelerate does in every worker of a ZeRO-3 run; transformers keeps a weak reference to it.
    announced = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    prompt = LlamaPrompt.from_folders(t2v / "text_encoder", t2v / "tokenizer", dtype=torch.float32)
    assert prompt.model.embed_tokens.weight.shape == (len(prompt.tokenizer), 32)
    del announced
