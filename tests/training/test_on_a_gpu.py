"""What only an accelerator can show; skipped without one."""

import json
from pathlib import Path

import pytest
import torch

from tests.jobs import finish, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_steps_are_those_of_the_cpu_and_encoders_beside_them_give_what_encoders_before_them_give(
    tmp_path: Path,
) -> None:
    said = finish(start("acceptance", "--only", "made-up", "--json", cwd=tmp_path))
    found = {row["name"]: row["verdict"] for row in json.loads(said.out)["rows"]}
    assert len(found) > 20 and set(found.values()) == {"right"}
