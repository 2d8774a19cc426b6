"""A block of Wan-S2V moves no more memory than its arithmetic asks for."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vfun_cli.families.wan_s2v.transformer import WanS2VBlock, rotary_table

aten = torch.ops.aten
COPIES = (aten.clone.default, aten.copy_.default, aten._to_copy.default, aten.cat.default, aten.stack.default)


class Traffic(TorchDispatchMode):
    """Counts what copies tensors as large as the tokens, and keeps what attention is given."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.copies: Counter[Any] = Counter()
        self.attention: list[Sequence[Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        found = operation(*arguments, **(named or {}))
        if "flash_attention" in str(operation):
            self.attention.append((*arguments, (named or {}).get("attn_mask")))
        if operation in COPIES and isinstance(found, Tensor) and found.numel() >= self.tokens:
            self.copies[operation] += 1
        return found


def test_a_block_copies_tokens_only_to_rotate_them_and_to_join_two_segments() -> None:
    dim, heads, frames, side = 64, 4, 4, 16
    rotary = rotary_table(frames, side, side, dim // heads, torch.device("cpu"))
    num_video = frames * side // 2 * side // 2
    length = len(rotary.cos)
    block = WanS2VBlock(dim, 128, heads, 1e-6).bfloat16()
    x, time = torch.randn(1, length, dim, dtype=torch.bfloat16), torch.randn(1, 2, 6, dim, dtype=torch.bfloat16)
    text = torch.randn(1, length, dim, dtype=torch.bfloat16)
    with Traffic(x.numel()) as traffic:
        out = block(x, time, text, rotary, num_video, None)
    assert out.dtype == torch.bfloat16
    # Norms of q and k: twice a float32 copy and back on a CPU, one kernel on an accelerator. Rotation: the same for q
    # and k of self-attention, each joined from its two halves. Modulation and gates join video and the other tokens.
    norms, rotation = 2 * 4, 2 * 2
    assert traffic.copies == {aten._to_copy.default: norms + rotation, aten.stack.default: 2, aten.cat.default: 4}
    assert len(traffic.attention) == 2
    for q, k, v, *_, mask in traffic.attention:
        assert mask is None and all(each.dtype == torch.bfloat16 for each in (q, k, v))
