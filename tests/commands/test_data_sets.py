"""Several data sets through the commands: typed, or written down in vfun.toml, each from its own place."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import QUICK, Vfun
from vfun_cli import families
from vfun_cli.demo import default as demo_default

FAMILY = "cogvideox-fun"
DEMO = (FAMILY, "--demo", *QUICK)


@pytest.fixture
def sets(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two data sets in two folders, with four and three rows, in a fresh working directory."""
    monkeypatch.chdir(tmp_path)
    data = Path(demo_default.make(families.find(FAMILY), pristine / "vfun-demo")["train_data_dir"])
    rows = json.loads((data / "metadata.json").read_text())
    places = []
    for name, part in (("one", rows[:4]), ("two", rows[4:7])):
        shutil.copytree(data, tmp_path / name, ignore=shutil.ignore_patterns("*.json"))
        (tmp_path / name / "rows.json").write_text(json.dumps(part))
        places.append(Path(name, "rows.json"))
    return places[0], places[1]


def planned(vfun: Vfun, *arguments: str) -> dict[str, Any]:
    said = vfun("plan-buckets", *DEMO, "--json", *arguments)
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


@pytest.mark.slow
def test_sets_are_typed_one_after_another_or_written_down_and_are_the_same(vfun: Vfun, sets: tuple[Path, Path]) -> None:
    one, two = sets
    typed = planned(vfun, "--train-data-meta", f"{one}:2", "--train-data-meta", f"{two}:0.5")
    spaced = planned(vfun, "--train_data_meta", f"{one}:2", f"{two}:0.5")
    assert typed == spaced
    assert typed["ledger"]["sets"] == [
        {"meta": str(one), "repeats": "2", "rows": 4, "used": 4, "samples": 8},
        {"meta": str(two), "repeats": "0.5", "rows": 3, "used": 3, "samples": 1},
    ]
    Path("vfun.toml").write_text(f'[[data]]\nmeta = "{one}"\nrepeats = 2\n[[data]]\nmeta = "{two}"\nrepeats = 0.5\n')
    model = demo_default.make(families.find(FAMILY))["pretrained_model_name_or_path"]
    said = vfun(
        "train", FAMILY, "--dry-run", "--json", "--device", "cpu", "--pretrained-model-name-or-path", str(model),
        *QUICK, "--image-sample-size", "64", "--video-sample-n-frames", "9", "--video-sample-stride", "1",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert [line["samples"] for line in json.loads(said.out)["plan"]["ledger"]["sets"]] == [8, 1]


@pytest.mark.slow
def test_one_set_typed_as_ever_is_planned_as_ever(vfun: Vfun, sets: tuple[Path, Path]) -> None:
    one, _ = sets
    plain, once = planned(vfun, "--train-data-meta", str(one)), planned(vfun, "--train-data-meta", f"{one}:1")
    assert plain == once and "sets" not in plain["ledger"]


@pytest.mark.slow
def test_a_clip_of_a_set_is_explained_by_its_row_there(vfun: Vfun, sets: tuple[Path, Path]) -> None:
    one, two = sets
    said = vfun("plan-buckets", *DEMO, "--train-data-meta", str(one), str(two), "--why", "5")
    assert said.code == 0 and said.out.startswith(f"row 1 of {two}"), said.out


@pytest.mark.slow
def test_the_rows_of_all_sets_are_checked_and_each_bad_one_is_named_with_its_set(
    vfun: Vfun, sets: tuple[Path, Path]
) -> None:
    one, two = sets
    for meta, row in ((one, 3), (two, 0)):
        rows = json.loads(meta.read_text())
        rows[row]["file_path"] = "gone.mp4"
        meta.write_text(json.dumps(rows))
    said = vfun("train", *DEMO, "--train-data-meta", str(one), str(two))
    words = " ".join(said.err.split())
    assert said.code == 3 and not Path("output_dir").exists()
    assert f"{one}: 1 of 4 rows" in words and "row 3, file_path" in words
    assert f"{two}: 1 of 3 rows" in words and "row 0, file_path" in words
    checked = vfun("validate-meta", str(one), str(two), "--family", FAMILY, "--json")
    assert checked.code == 3
    assert [found["rows"] for found in json.loads(checked.out)["sets"]] == [4, 3]
    refused = vfun("validate-meta", str(one), str(two), "--fix", "better.json")
    assert refused.code == 2 and "Name one of them" in " ".join(refused.err.split())


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["rows.json:0"], "above 0"),
        (["rows.json:1000000"], "10000 at most"),
        (["rows.json:0.00001"], "four decimals"),
        (["rows.json", "rows.json:2"], "more than once"),
        ([""], "is empty"),
        ([":2"], ":2: No such file"),
        (["rows.json:-1"], "'-1' does not say how often an epoch shows rows.json"),
        (["rows.json:twice"], "rows.json:0.5 half of them"),
        (["gone.json"], "next: Correct the path"),
        (["gone.json:twice"], "gone.json:twice: No such file"),
        (["x" * 300 + ":twice"], "it takes a path"),
    ],
)
def test_what_is_no_data_set_is_refused_with_words(
    vfun: Vfun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text("[]")
    said = vfun("plan-buckets", FAMILY, *(word for each in typed for word in ("--train-data-meta", each)))
    assert said.code in (2, 3) and words in " ".join(said.err.split()), said.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[data]]\nrepeats = 2\n", "without meta"),
        ('[[data]]\nmeta = "a.json"\nrepeat = 2\n', "did you mean 'repeats'"),
        ('[[data]]\nmeta = "a.json"\nrepeats = true\n', "they take a number"),
        ("[[data]]\nmeta = 5\n", "it takes a path"),
        ('[data]\nmeta = "a.json"\n', "[[data]]"),
        ('train_data_meta = "b.json"\n[[data]]\nmeta = "a.json"\n', "has both"),
        ('data = "a.json"\n', "it takes tables"),
    ],
)
def test_a_wrong_table_of_vfun_toml_is_named(
    vfun: Vfun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vfun.toml").write_text(text)
    said = vfun("plan-buckets", FAMILY)
    assert said.code == 2 and words.lower() in " ".join(said.err.split()).lower(), said.err


@pytest.mark.slow
def test_a_run_on_two_sets_trains_what_was_planned_goes_on_elsewhere_and_refuses_other_repeats(
    vfun: Vfun, sets: tuple[Path, Path]
) -> None:
    one, two = sets
    said = vfun("train", *DEMO, "--train-data-meta", f"{one}:2", f"{two}:0.5", "--num-train-epochs", "2",
                "--max-train-steps", "12", "--output-dir", "run")  # fmt: skip
    assert said.code == 0, said.err
    moved = Path("moved")
    Path("run").rename(moved)
    went_on = vfun("resume", str(moved), "--max-train-steps", "14")
    assert went_on.code == 0, went_on.err
    records = [json.loads(line) for line in (moved / "metrics.jsonl").read_text().splitlines()]
    assert all(record["agree"] for record in records if record.get("event") == "epoch")
    refused = vfun("resume", str(moved), "--max-train-steps", "16", "--train-data-meta", f"{one}:3", f"{two}:0.5")
    words = " ".join(refused.err.split())
    assert refused.code == 5 and "data set 1 has other contents" in words and f"{one}:3" in words
