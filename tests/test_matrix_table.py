"""The README's table of what runs where is whole: written by the integration tests, no cell missing."""

from pathlib import Path

from tests.integration.conftest import END, START
from tests.integration.matrix import STRATEGIES
from vfun_cli import families

README = Path(__file__).parents[1] / "README.md"


def test_the_table_has_a_tested_cell_for_every_family_and_strategy() -> None:
    table = README.read_text(encoding="utf-8").split(START)[1].split(END)[0].strip().splitlines()
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == ["family", *STRATEGIES]
    rows = {row.strip("|").split("|")[0].strip(" `"): row.strip("|").split("|")[1:] for row in table[2:]}
    assert list(rows) == list(families.FAMILIES)
    for family, cells in rows.items():
        assert [cell.strip() for cell in cells] == ["full + LoRA"] * len(STRATEGIES), family
