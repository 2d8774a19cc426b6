"""A set of three hundred rows over real encoded files: every planted damage is found, no clean row is accused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_media import ROW, SPEECH_FIELDS, encode_video, write_sound
from test_damage import ALONGSIDE, DAMAGE

from vfun_cli.metadata.checks import Settings, validate
from vfun_cli.metadata.clip_needs import ClipNeeds
from vfun_cli.metadata.codes import CODES
from vfun_cli.metadata.records import read_metadata

pytestmark = pytest.mark.slow

ROWS = 300
FILES = ("file_path", "audio_path", "control_file_path")


def clean_row(root: Path, number: int) -> dict[str, Any]:
    """A row over files of its own: four sizes, three frame rates, two sampling rates, one to two seconds."""
    row = dict(ROW, text=f"Clip number {number}.")
    width, height = ((64, 48), (48, 64), (80, 48), (64, 64))[number % 4]
    fps, frames = (24, 25, 16)[number % 3], 24 + number % 7
    for name in ("file_path", "control_file_path"):
        encode_video(root / row[name], width=width, height=height, fps=fps, frames=frames)
    write_sound(root / row["audio_path"], seconds=frames / fps, rate=(16000, 44100)[number % 2])
    return row


def gathered(part: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The row with its files, made in a folder of its own, as the common root sees them."""

    def seen(value: Any) -> Any:
        if not isinstance(value, str) or not value or "\0" in value:
            return value
        return f"../{part.name}-{Path(value).name}" if value.startswith("../") else f"{part.name}/{value}"

    for outside in part.parent.glob("*.mp4"):  # what a damage put beside the folder belongs beside the root
        outside.rename(part.parent.parent / f"{part.name}-{outside.name}")
    return {name: seen(value) if name in FILES else value for name, value in row.items()}


def test_every_damage_among_three_hundred_rows_is_found_and_no_clean_row_is(tmp_path: Path) -> None:
    """The damaged rows lie between the clean ones; a damage applies to files of its own, as in ``test_damage``."""
    root = tmp_path / "data"
    template = tmp_path / "template"
    for name in ("train/1.mp4", "control/1.mp4"):
        encode_video(template / name)
    write_sound(template / "wav/1.wav")
    for name in ("train/2.jpg", "control/2.jpg"):
        Image.new("RGB", (64, 48), "green").save(template / name)
    every = ROWS // len(DAMAGE)
    rows, planted = [], {}
    for number in range(ROWS):
        part = root / f"{number:04d}"
        damage = DAMAGE[number // every] if number % every == 0 and number // every < len(DAMAGE) else None
        if damage is None:
            row = clean_row(part, number)
        else:
            shutil.copytree(template, part)
            planted[number] = damage[0]
            row = damage[1](part, dict(ROW, text=f"Damaged clip {number}."))
        rows.append(gathered(part, row))
    path = root / "metadata.json"
    path.write_text(json.dumps(rows))
    report = validate(
        read_metadata(path), SPEECH_FIELDS, ("video",), root,
        needs=ClipNeeds(min_frames=5, stride=2), settings=Settings(threads=2, deep=True),
    )  # fmt: skip
    found: dict[int, set[str]] = {}
    for problem in report.problems:
        assert problem.row is not None
        found.setdefault(problem.row, set()).add(problem.code)
    assert len(planted) == len(DAMAGE) and len(set(planted.values())) >= 30
    missed = {row: (code, found.get(row, set())) for row, code in planted.items() if code not in found.get(row, set())}
    assert missed == {}
    accused = {row: codes for row, codes in found.items() if row not in planted}
    assert accused == {}
    for row, code in planted.items():
        others = found.get(row, set()) - {code} - ALONGSIDE.get(code, set()) - {"decode-error", "fewer-frames"}
        assert others == set(), (row, code, others)
    bad = {row for row, codes in found.items() if any(CODES[code].severity == "error" for code in codes)}
    assert report.ok == ROWS - len(bad)
