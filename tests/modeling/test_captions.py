"""What the text encoders get of a row's text, and how much of it they read."""

import importlib
import itertools
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from vfun_cli.demo.default import builder
from vfun_cli.families import FAMILIES
from vfun_cli.families.detect import read_dims
from vfun_cli.modeling.adapter import AdapterOptions, Inputs, SampleRequest
from vfun_cli.modeling.encoders import captions
from vfun_cli.modeling.encoders.captions import CaptionReader, cut_tokens
from vfun_cli.modeling.randomness import SampleKey

FILES = {name: f"{name}.mp4" for name in ("file_path", "control_file_path", "audio_path")}


def adapter(family: str) -> Any:
    module, name = FAMILIES[family].adapter.split(":")
    return getattr(importlib.import_module(module), name)


def inputs(family: str, epoch: int, **text: str) -> Inputs:
    request = SampleRequest(
        key=SampleKey(0, epoch, 0), record={**FILES, **text}, kind="video", frames=5, height=64, width=64, stride=1,
        total_frames=20, fps=(8, 1),
    )  # fmt: skip
    options = AdapterOptions(
        model_dir=None, compute_dtype=torch.float32, device=torch.device("cpu"),
        model_settings={"add_noise_in_inpaint_model": False},
    )  # fmt: skip
    found: Inputs = adapter(family).inputs(request, options)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_a_text_trains_with_an_empty_caption(family: str) -> None:
    assert all(inputs(family, epoch) == inputs(family, epoch, text="") for epoch in range(4))
    assert any(inputs(family, epoch) != inputs(family, epoch, text="A dog.") for epoch in range(4))


# How much is read: what is called cut is what the encoder cuts

LETTERS = list(itertools.islice(itertools.cycle(string.ascii_lowercase), 600))


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models in the released layouts, made when they are asked for."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            folder.mkdir()
            builder(FAMILIES[family])(folder)
        return folder

    return make


def readers_of(family: str, model: Path) -> tuple[CaptionReader, ...]:
    spec = FAMILIES[family]
    return spec.model.captions(read_dims(spec, model))


def read(encoder: Any, family: str, caption: str) -> torch.Tensor:
    """What the encoder makes of a caption, as one vector; an image may go with it."""
    with_image = family == "hunyuanvideo-i2v" and hasattr(encoder, "image_processor")
    (output,) = encoder.outputs([(caption, torch.zeros(1, 3, 64, 64)) if with_image else caption])
    return torch.cat([value.flatten().float() for value in output.values()])


def with_another_end(caption: str) -> str:
    """As many tokens, the last one another."""
    return caption[:-1] + ("k" if caption[-1] != "k" else "j")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_is_called_cut_exactly_when_its_encoder_does_not_read_its_end(
    family: str, model_of: Callable[[str], Path]
) -> None:
    model = model_of(family)
    options = AdapterOptions(model_dir=model, compute_dtype=torch.float32, device=torch.device("cpu"))
    encoders, readers = adapter(family).encoders_of(options), readers_of(family, model)
    for reader, name in zip(readers, list(encoders)[1:], strict=False):
        encoder = encoders[name]
        texts = [" ".join(LETTERS[:count]) + tail for count in range(2, 600) for tail in ("", "q")]
        cut = cut_tokens(reader, model, texts)
        fitting, too_long = (next(text for text in order if (text in cut) == wanted)
                             for order, wanted in ((texts[::-1], False), (texts, True)))  # fmt: skip
        tokens, lost = cut[too_long]
        everything = cut_tokens(replace(reader, limit=0, beside=0), model, [fitting])[fitting][0]
        assert everything == tokens - lost, "the longest that fits fills the room"
        assert not torch.equal(read(encoder, family, fitting), read(encoder, family, with_another_end(fitting)))
        assert torch.equal(read(encoder, family, too_long), read(encoder, family, with_another_end(too_long)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_limits_are_those_of_the_documentation(family: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    spec = FAMILIES[family]
    table = page.partition("## Captions")[2].partition("\n## ")[0]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| `{family}` |")]
    assert list(map(int, row.split("|")[2].split(","))) == [
        reader.limit for reader in spec.model.captions(spec.model.dims)
    ]


def test_short_ascii_captions_are_known_to_fit_without_a_tokenizer(tmp_path: Path) -> None:
    assert cut_tokens(captions.t5("tokenizer", 226), tmp_path, ["x" * 224, ""]) == {}


@pytest.mark.parametrize("text", ["x" * 224, "~!" * 112, " " * 224, "\n\t" * 112], ids=ascii)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_tokenizer_makes_more_of_ascii_than_a_token_a_character_and_one(
    text: str, family: str, model_of: Callable[[str], Path]
) -> None:
    model = model_of(family)
    for reader in readers_of(family, model):
        found = cut_tokens(replace(reader, limit=0, beside=0), model, [text])
        assert found.get(text, (0, 0))[0] <= len(text) + 1


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, version("transformers").split(".")[:2])) < (5, 23), reason="this transformers itself imports torch"
)
def test_counting_loads_no_torch(model_of: Callable[[str], Path]) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom vfun_cli.modeling.encoders import captions\n"
        "assert captions.cut_tokens(captions.t5('tokenizer', 226), Path(sys.argv[1]), ['x y ' * 400])\n"
        "assert 'transformers' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(model_of("cogvideox-fun"))], check=True)
