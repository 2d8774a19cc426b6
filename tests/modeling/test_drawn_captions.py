"""Which caption a clip trains with: a function of seed, epoch and row, and as random as it is said to be."""

import itertools
import math
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vfun_cli.families import FAMILIES, adapter_of
from vfun_cli.modeling.adapter import AdapterOptions, SampleRequest
from vfun_cli.modeling.captions import AS_STATED, CaptionOptions, caption_of, possible_captions, tags_of
from vfun_cli.modeling.inputs import TupleInput, Value
from vfun_cli.modeling.randomness import SampleKey

FILES = {name: f"{name}.mp4" for name in ("file_path", "control_file_path", "audio_path")}
OPTIONS = AdapterOptions(
    model_dir=Path(), compute_dtype=torch.float32, device=torch.device("cpu"),
    model_settings={"add_noise_in_inpaint_model": False},
)  # fmt: skip
TEXTS = ("a dog, grass, sun", "a brown dog runs over the grass", "dog")
DRAWN = CaptionOptions(prefix="ohwx,", suffix="film", shuffle_tags=True)


def request(record: dict[str, Any], key: SampleKey, captions: CaptionOptions = AS_STATED) -> SampleRequest:
    return SampleRequest(
        key=key, record={**FILES, **record}, kind="video", frames=9, height=64, width=64, stride=1, total_frames=20,
        fps=(8, 1), captions=captions,
    )  # fmt: skip


def read_by(lazy: Any) -> Iterator[str]:
    """The texts in what an encoder reads."""
    if isinstance(lazy, TupleInput):
        yield from itertools.chain.from_iterable(map(read_by, lazy.parts))
    elif isinstance(lazy, Value) and isinstance(lazy.value, str):
        yield lazy.value


def caption_in(family: str, asked: SampleRequest, **options: Any) -> str:
    """What the family's text encoders read, all of them the same."""
    inputs = adapter_of(FAMILIES[family]).inputs(asked, replace(OPTIONS, **options))
    (caption,) = {text for each in inputs.values() for text in read_by(each.lazy)}
    return caption


keys = st.builds(
    SampleKey, st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 10**9), st.integers(0, 100)
)
captions = st.builds(CaptionOptions, prefix=st.text(), suffix=st.text(), shuffle_tags=st.booleans())


@given(key=keys, texts=st.lists(st.text(), max_size=5).map(tuple), options=captions)
def test_a_caption_depends_on_seed_epoch_row_and_repetition_alone(
    key: SampleKey, texts: tuple[str, ...], options: CaptionOptions
) -> None:
    first = caption_of(texts, key, options)
    same = SampleKey(key.seed, key.epoch, key.row, key.copy, drops=False)
    random.seed(first)
    torch.manual_seed(1)
    assert caption_of(list(texts), same, replace(options)) == first
    sent = pickle.loads(pickle.dumps(request({"text": [*texts]}, key, options)))  # to a decoding process
    assert sent.caption == first


@given(key=keys, texts=st.lists(st.text(), min_size=1, max_size=5), options=captions)
def test_prefix_and_suffix_stand_at_the_ends_as_typed_around_one_of_the_texts(
    key: SampleKey, texts: list[str], options: CaptionOptions
) -> None:
    caption = caption_of(texts, key, options)
    assert caption.startswith(options.prefix) and caption.endswith(options.suffix)
    inside = caption[len(options.prefix) : len(caption) - len(options.suffix)].strip()
    if options.shuffle_tags:
        assert Counter(tags_of(inside)) in [Counter(tags_of(text)) for text in texts]
    else:
        assert inside in [text.strip() for text in texts]
        assert caption in possible_captions(texts, options)


@pytest.mark.parametrize(
    ("prefix", "text", "suffix", "caption"),
    [
        ("ohwx", "A dog.", "", "ohwx A dog."),
        ("ohwx,", "a dog, grass", "film", "ohwx, a dog, grass film"),
        ("ohwx, ", "a dog", ", film", "ohwx, a dog, film"),
        ("", "A dog", ".", "A dog."),
        ("ohwx\n", "A dog.", " 8k", "ohwx\nA dog. 8k"),
        ("ohwx", "", "", "ohwx"),
        ("ohwx", "", "film", "ohwx film"),
        ("", "  a dog", "", "  a dog"),
    ],
)
def test_one_blank_joins_what_has_none(prefix: str, text: str, suffix: str, caption: str) -> None:
    options = CaptionOptions(prefix=prefix, suffix=suffix)
    assert caption_of((text,), SampleKey(0, 0, 0), options) == caption
    assert possible_captions((text,), options) == [caption]


def test_a_row_without_a_text_has_prefix_and_suffix_alone() -> None:
    assert request({}, SampleKey(0, 0, 0)).caption == ""
    assert request({}, SampleKey(0, 0, 0), CaptionOptions(prefix="ohwx", suffix="film")).caption == "ohwx film"


@pytest.mark.slow
def test_each_text_is_drawn_as_often_as_the_others() -> None:
    for count, axis in itertools.product((2, 3, 7), ("row", "epoch", "copy", "seed")):
        texts = tuple(map(str, range(count)))
        drawn = Counter(
            caption_of(texts, replace(SampleKey(1, 2, 3, 4), **{axis: value}), AS_STATED) for value in range(2100)
        )
        expected = 2100 / count
        chi_square = sum((drawn[text] - expected) ** 2 / expected for text in texts)
        assert chi_square < count - 1 + 5 * math.sqrt(2 * (count - 1)), (count, axis)


def test_every_order_of_three_tags_comes_as_often_as_the_others() -> None:
    options = CaptionOptions(prefix="ohwx", shuffle_tags=True)
    drawn = Counter(caption_of(("a, b ,c,",), SampleKey(0, 0, row), options) for row in range(3000))
    assert {*drawn} == {f"ohwx {', '.join(order)}" for order in itertools.permutations("abc")}
    assert sum((count - 500) ** 2 / 500 for count in drawn.values()) < 5 + 5 * math.sqrt(10)


def test_the_order_of_tags_does_not_hang_on_the_text_that_is_drawn() -> None:
    """Two draws from one stream would give each text some orders only."""
    options = CaptionOptions(shuffle_tags=True)
    drawn = {caption_of(("a, b", "c, d"), SampleKey(0, 0, row), options) for row in range(200)}
    assert drawn == {"a, b", "b, a", "c, d", "d, c"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0, 0.1, 0.5, 1])
def test_every_family_drops_captions_as_often_as_asked_and_prefix_and_suffix_with_them(
    family: str, dropout: float
) -> None:
    rows = 600
    read = [
        caption_in(family, request({"text": [*TEXTS]}, SampleKey(1, 0, row), DRAWN), caption_dropout=dropout)
        for row in range(rows)
    ]
    dropped = read.count("")
    assert abs(dropped - dropout * rows) <= 4 * math.sqrt(rows * dropout * (1 - dropout))
    kept = [caption for caption in read if caption]
    assert len(kept) + dropped == rows
    assert all(caption.startswith("ohwx, ") and caption.endswith(" film") for caption in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_rows_keep_their_caption_and_it_is_always_the_same(family: str) -> None:
    held_out = [request({"text": [*TEXTS]}, SampleKey(1, 0, row, drops=False), DRAWN) for row in range(60)]
    read = [caption_in(family, each, caption_dropout=1) for each in held_out]
    assert read == [each.caption for each in held_out] == [each.caption for each in held_out]
    assert len({*read}) == 8  # six orders of three tags, and two sentences


@pytest.mark.parametrize("family", FAMILIES)
def test_with_variants_a_clip_is_read_with_so_many_captions_and_drops_stay_random(family: str) -> None:
    for variants in (1, 4):
        epochs = [SampleKey(5, epoch, 0, variants=variants) for epoch in range(80)]
        asked = [request({"text": [*TEXTS]}, key, DRAWN) for key in epochs]
        read = [caption_in(family, each, caption_dropout=0.5) for each in asked]
        kept = [{*read[variant::variants]} - {""} for variant in range(variants)]
        assert all(len(each) == 1 for each in kept)
        assert 20 <= read.count("") <= 60
        assert [each.caption for each in asked] == 80 // variants * [each.caption for each in asked[:variants]]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_caption_without_options_is_read_as_it_stands_and_dropped_where_it_always_was(family: str) -> None:
    purpose = {"wan-s2v": "drop-text", "wan-fun-control": "text"}.get(family, "text-drop")
    for row in range(100):
        key = SampleKey(42, 3, row)
        expected = "" if key.chance(purpose, 0.1) else " A dog, running. "
        assert caption_in(family, request({"text": " A dog, running. "}, key)) == expected
