"""Terminals and logs that cannot show every character: the commands say what they can, and never fail of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAPTION = "一只狗 🐕 über Kies"
ROW = {"file_path": "片段.mp4", "text": CAPTION, "type": "video", "width": 640, "height": 480, "frames": 99, "fps": 25}
COMMANDS = (
    ["validate-meta", "m.json"],
    ["validate-meta", "m.json", "--json"],
    ["plan-buckets", "wan-s2v", "--meta", "m.json"],
    ["plan-buckets", "wan-s2v", "--meta", "m.json", "--why", "0", "--json"],
    ["train", "wan-s2v", "--train-data-meta", "m.json", "--pretrained-model-name-or-path", "模型"],
)
SCRIPT = """
import sys
from vfun_cli.main import main
for arguments in {commands!r}:
    try:
        main(arguments)
    except SystemExit as ended:
        sys.stderr.write(f"ended {{ended.code}}\\n")
    print("END")
"""


def said_in(encoding: str, folder: Path) -> tuple[list[str], list[str]]:
    """What each command prints under an encoding, and how each ends."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(commands=COMMANDS)], cwd=folder, capture_output=True, encoding=encoding,
        env=os.environ | {"PYTHONIOENCODING": encoding, "HOME": str(folder), "COLUMNS": "300"}, check=True,
    )  # fmt: skip
    assert "unexpected" not in done.stderr, done.stderr
    ends = [line for line in done.stderr.splitlines() if line.startswith("ended")]
    return done.stdout.split("END\n")[:-1], ends


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_that_lacks_characters_changes_no_exit_code_and_breaks_no_json(
    encoding: str, tmp_path: Path
) -> None:
    (tmp_path / "m.json").write_text(json.dumps([ROW]), encoding="utf-8")
    printed, ends = said_in(encoding, tmp_path)
    assert ends == [f"ended {code}" for code in (3, 3, 0, 0, 3)]
    people, report, plan, why, _ = printed
    assert r"\u7247\u6bb5.mp4" in people and "ERROR" not in people
    problems: list[dict[str, Any]] = json.loads(report)["problems"]
    missing = [problem["path"] for problem in problems if problem["code"] == "missing-file"]
    assert [Path(path).name for path in missing] == [ROW["file_path"]]
    assert "####" in plan and r"\u2588" not in plan
    assert json.loads(why)["file"] == ROW["file_path"]
