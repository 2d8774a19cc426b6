"""Captions that are longer than the family's text encoder reads: who tells it, and what is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import Vfun

HOME = Path("vfun-demo/cogvideox-fun")
META, MODEL = HOME / "data/metadata.json", HOME / "model"
LONG = " ".join(f"word{number}" for number in range(400))
WARNING = "2 of {count} captions (first row 1) are longer than the 226 tokens: {share} % of their text is not seen"
VALIDATE = ("validate-meta", "--family", "cogvideox-fun")


@pytest.fixture
def count(place: Path) -> int:
    """A demo whose second and third caption are too long, of so many."""
    rows = json.loads(META.read_text(encoding="utf-8"))
    rows[1]["text"], rows[2]["text"] = LONG, LONG + " 狗"
    META.write_text(json.dumps(rows), encoding="utf-8")
    return len(rows)


def long_captions(out: str) -> list[dict[str, Any]]:
    return [problem for problem in json.loads(out)["problems"] if problem["code"] == "long-caption"]


def test_validation_counts_rows_and_what_is_cut(count: int, vfun: Vfun) -> None:
    said = vfun(*VALIDATE, "--demo", "--json")
    assert said.code == 0, said.err
    (problem,) = long_captions(said.out)
    assert (problem["row"], problem["field"], problem["severity"]) == (None, "text", "warning")
    share = int(problem["message"].partition("tokens: ")[2].split()[0])
    assert problem["message"] == WARNING.format(count=count, share=share) and 50 < share < 99


def test_the_model_that_counts_can_be_named(count: int, vfun: Vfun) -> None:
    command = (*VALIDATE, "--train-data-dir", str(HOME / "data"), "--json", str(META))
    assert long_captions(vfun(*command).out) == []
    assert len(long_captions(vfun(*command, "--pretrained-model-name-or-path", str(MODEL)).out)) == 1


@pytest.mark.slow
def test_a_run_and_a_plan_warn_before_they_begin(count: int, vfun: Vfun) -> None:
    for command in ("train", "plan-buckets"):
        said = vfun(command, "cogvideox-fun", "--demo", *(["--dry-run"] if command == "train" else []))
        told = " ".join(said.err.split())
        assert said.code == 0 and f"long-caption: 2 of {count} captions (first row 1)" in told, said.err


def test_a_plan_of_rows_that_state_everything_warns_too(count: int, vfun: Vfun) -> None:
    stated = {"width": 640, "height": 480, "frames": 99, "fps": 25, "type": "video"}
    rows = [{"file_path": f"{number}.mp4", "text": LONG, **stated} for number in range(2)]
    META.write_text(json.dumps(rows), encoding="utf-8")
    said = vfun("plan-buckets", "cogvideox-fun", "--meta", str(META), "--pretrained-model-name-or-path", str(MODEL))
    assert said.code == 0 and "long-caption: 2 of 2 captions (first row 0)" in said.err, said.err


def test_a_model_without_its_tokenizer_is_no_fault_of_the_data(count: int, vfun: Vfun) -> None:
    shutil.rmtree(MODEL / "tokenizer")
    said = vfun(*VALIDATE, "--demo", "--json")
    assert said.code == 0 and long_captions(said.out) == []
    assert "the length of the captions is not checked: no T5Tokenizer in" in said.err


def test_every_caption_of_a_list_counts_with_what_stands_around_it(
    count: int, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads(META.read_text(encoding="utf-8"))
    rows[0]["text"] = ["a dog", LONG, "a cat"]
    META.write_text(json.dumps(rows), encoding="utf-8")
    command = (*VALIDATE, "--pretrained-model-name-or-path", str(MODEL), "--json", str(META))
    (found,) = long_captions(vfun(*command).out)
    assert found["message"].startswith(f"3 of {count + 2} captions (first row 0)")
    monkeypatch.setenv("VFUN_CAPTION_PREFIX", LONG)
    (found,) = long_captions(vfun(*command).out)
    assert found["message"].startswith(f"{count + 2} of {count + 2} captions (first row 0)")
