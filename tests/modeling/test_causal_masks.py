"""Decoders of transformers say the same with vfun's mask as with the one that transformers makes of the padding."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from vfun_cli.modeling.encoders.pretrained import causal_mask

LENGTH = 40
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def llama(attention: str) -> nn.Module:
    return LlamaModel(LlamaConfig(**SIZES, attn_implementation=attention))


def qwen(attention: str) -> nn.Module:
    rotation = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return Qwen2VLTextModel(Qwen2VLTextConfig(**SIZES, rope_parameters=rotation, attn_implementation=attention))


@pytest.mark.parametrize("padding", [(0, 0), (0, 7), (39, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", [llama, qwen])
def test_states_are_those_that_the_mask_of_the_padding_gives(
    decoder: type, attention: str, dtype: torch.dtype, padding: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = decoder(attention).to(dtype).eval()
    ids = torch.randint(SIZES["vocab_size"], (len(padding), LENGTH))
    mask = torch.stack([torch.arange(LENGTH) < LENGTH - padded for padded in padding]).long()

    def states(given: Tensor) -> Tensor:
        with torch.no_grad():
            found = model(ids, attention_mask=given, output_hidden_states=True, use_cache=False).hidden_states
        return torch.stack(found)

    expected, found = states(mask), states(causal_mask(mask, dtype))
    if any(padding):
        assert torch.equal(found, expected)
    else:  # transformers leaves the mask out, and a device may then add in another order
        torch.testing.assert_close(found, expected)
