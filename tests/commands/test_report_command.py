"""``vfun report`` through the command line."""

import json
from pathlib import Path

import pytest

from tests.commands.conftest import Vfun
from tests.report.written import step, write_metrics, write_run, write_sample
from vfun_cli.run.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    found = write_run(Path("output_dir"))
    write_metrics(found, step(1), step(2))
    write_sample(found, 2, 0)
    found.checkpoint(2).mkdir()
    return found


@pytest.mark.parametrize("named", [[], ["output_dir"], ["checkpoint-2"], ["output_dir/checkpoint-2"]])
def test_the_page_is_written_into_the_run_that_is_meant(named: list[str], run: RunDir, vfun: Vfun) -> None:
    said = vfun("report", *named)
    assert said.code == 0, said.err
    assert Path(said.out.strip()).samefile(run.report_html)
    before = run.report_html.read_bytes()
    assert b"step 2 of 40" in before
    write_metrics(run, step(1), step(2), step(3))
    assert vfun("report", *named).code == 0
    assert run.report_html.read_bytes() != before


def test_a_program_learns_where_the_page_is_and_what_is_in_it(run: RunDir, vfun: Vfun) -> None:
    said = vfun("report", "--output", "page.html", "--json")
    told = json.loads(said.out)
    assert said.code == 0 and told["schema"] == 1 and told["report"] == "page.html"
    assert (told["step"], told["total_steps"], told["samples"], told["ending"]) == (2, 40, 1, "open")
    assert told["bytes"] == Path("page.html").stat().st_size and told["linked"] == []
    assert not run.report_html.exists()


def test_what_is_no_report_is_never_written_over(run: RunDir, vfun: Vfun) -> None:
    run.report_html.write_text("<!doctype html> my own notes")
    said = vfun("report")
    assert said.code == 2 and "exists already" in said.err and "--output" in said.err
    assert run.report_html.read_text() == "<!doctype html> my own notes"


@pytest.mark.parametrize("named", [["none"], ["empty"], []])
def test_where_there_is_no_run_it_says_so(
    named: list[str], tmp_path: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    said = vfun("report", *named, "--json")
    assert said.code == 5 and "Name the output directory of a run" in said.err
    assert json.loads(said.out)["error"]["exit_code"] == 5
    assert not list(tmp_path.rglob("*.html"))


def test_a_damaged_description_is_named(run: RunDir, vfun: Vfun) -> None:
    run.run_json.write_text("{}")
    said = vfun("report")
    assert said.code == 5 and "run.json" in said.err
