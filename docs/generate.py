"""Writes the generated pages of ``docs/`` from what the code declares: ``make docs``."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from vfun_cli import families
from vfun_cli.config.optimizers import OPTIMIZER_FLAGS
from vfun_cli.config.options import Opt, default_of, options, plain_kind
from vfun_cli.config.originals import FLAGS, Flag
from vfun_cli.config.strategies import STRATEGY_FLAGS
from vfun_cli.errors import as_flag
from vfun_cli.metadata.codes import CODES
from vfun_cli.metadata.table import ClipTable

DOCS = Path(__file__).parent

INTRODUCTION = """# Options

Made by `make docs` from `vfun_cli/config/options.py`; do not edit by hand.

Each option is `--video-sample-size` or `--video_sample_size` on the command line, `video_sample_size` in `vfun.toml`
and `VFUN_VIDEO_SAMPLE_SIZE` in the environment. What is typed wins over the environment, that over `vfun.toml` in
the working directory, that over the family's default; `--dry-run` shows where each value came from. A switch is
turned off with `--no-...`, or `false` in a file. Keys at the top of `vfun.toml` hold for every family, those
in a table named after a family for that one:

```toml
output_dir = "runs/first"

[wan-s2v]
learning_rate = 1e-5
```

`~` is the home directory, also where no shell replaces it; an empty variable counts as unset.

*Resume* says what a changed value means for `vfun resume`: **harmless** and **sharding** pass with a notice (the latter
spreads the same run otherwise), **trajectory** is refused unless `--allow` names it. **length** is harmless where the
learning rate does not depend on the end of the run, and a trajectory with `linear` and `cosine`; **contents** may lie
elsewhere, and is refused where it is not the same any more. On another number of processes
`gradient_accumulation_steps` follows, so that a step stays what it was; where it cannot, a notice says so.
"""


ORIGINALS = """
## The original scripts' other flags

`vfun train` and `vfun lora` take each of them; none is a key of `vfun.toml` or a variable.

| flag | what becomes of it |
|---|---|
"""

PROBLEMS_INTRODUCTION = """# Problem codes

Made by `make docs` from `vfun_cli/metadata/codes.py`; do not edit by hand.

What `vfun validate-meta` can report. Only an error keeps a row out of training and makes exit code 3.
`vfun validate-meta --explain CODE` prints one entry.
"""


def problems_page() -> str:
    """Every problem code, what it means, an example and what to do."""
    entries = [
        f"\n## {code.name}\n\n*{code.severity.capitalize()}.* {code.explanation}\n\n"
        f"For example: {code.example}\n\n{code.fix}\n"
        for code in CODES.values()
    ]
    return PROBLEMS_INTRODUCTION + "".join(entries)


def options_page() -> str:
    """Every option by panel, the flags of old scripts, and the families' defaults."""
    parts = [INTRODUCTION]
    for panel, rows in groupby(options().items(), key=lambda item: item[1][2].panel):
        parts.append(f"\n## {panel}\n\n| option | takes | default | resume | what it does |\n|---|---|---|---|---|\n")
        parts += [_row(name, kind, opt) for name, (_, kind, opt) in rows]
    parts.append("\n## Short for a strategy\n\n| flag | strategy |\n|---|---|\n")
    parts += [f"| `{as_flag(flag)}` | {strategy} |\n" for flag, strategy in STRATEGY_FLAGS.items()]
    parts.append("\n## Short for an optimizer\n\n| flag | optimizer |\n|---|---|\n")
    parts += [f"| `{as_flag(flag)}` | {optimizer} |\n" for flag, optimizer in OPTIMIZER_FLAGS.items()]
    parts.append(ORIGINALS)
    parts += [f"| `{as_flag(name)}` | {_fate(flag)} |\n" for name, flag in FLAGS.items()]
    parts.append("\n## Defaults of the families\n\nWhere a family's documented command line differs from the above.\n")
    parts += [_family(name) for name in families.FAMILIES]
    return "".join(parts)


def _row(name: str, kind: Any, opt: Opt) -> str:
    also = [*(f"${variable}" for variable in opt.variables), *(f"--{other}" for other in opt.other_names)]
    names = "".join(f" Also `{each}`." for each in also)
    default = _text(default_of(name))
    return f"| `{name}` | {_takes(kind, opt)} | {default} | {opt.on_resume} | {_cell(opt.help)}{names} |\n"


def _fate(flag: Flag) -> str:
    words = {
        "fixed": f"taken at its one right value: {flag.why}",
        "idle": f"without effect: {flag.why}",
        "dead": "without effect, as in the original scripts",
        "refused": f"refused: {flag.why}",
    }
    return words[flag.fate]


def _takes(kind: Any, opt: Opt) -> str:
    if opt.choices:
        return ", ".join(f"`{choice}`" for choice in opt.choices)
    words = {int: "whole number", float: "number", bool: "on, off", str: "text", Path: "path", tuple: "list"}
    return ", ".join(filter(None, (words[plain_kind(kind)], opt.unit, opt.bounds)))


def _family(name: str) -> str:
    spec = families.FAMILIES[name]
    rows = [f"\n### {name}\n\n| option | train | lora |\n|---|---|---|\n"]
    for option in options():
        train = spec.defaults.train.get(option, default_of(option))
        lora = spec.defaults.lora.get(option, train)
        by_strategy = "".join(
            f" ({strategy}: {_text(values[option])})"
            for strategy, values in spec.defaults.by_strategy.items()
            if option in values
        )
        if _text(train) != _text(default_of(option)) or _text(lora) != _text(train) or by_strategy:
            rows.append(f"| `{option}` | {_text(train)}{by_strategy} | {_text(lora)} |\n")
    return "".join(rows)


def _text(value: Any) -> str:
    if value is None or value in ((), ""):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def preview_picture() -> tuple[str, str]:
    """What ``plan-buckets`` prints for a made-up set of 2,000 films, as SVG and as plain text."""
    import io

    from rich.console import Console

    from vfun_cli.plan.options import PlanOptions
    from vfun_cli.plan.preview import preview
    from vfun_cli.plan.run_plan import RunPlan

    spec = families.FAMILIES["wan-s2v"]
    options = PlanOptions.pick(spec.defaults.train, world_size=8)
    plan = RunPlan(spec=spec, dims=spec.model.dims, options=options, table=_films(2000))
    console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True, color_system="256")
    console.print(preview(plan, [plan.first_epoch]))
    text = console.export_text(clear=False)
    return console.export_svg(title="vfun plan-buckets wan-s2v --world-size 8", unique_id="plan"), text


def _films(count: int) -> ClipTable:
    """Films of six aspects and three frame rates, half a second to twenty seconds long; equal on every machine."""
    sizes = ((1280, 720), (1920, 1080), (720, 1280), (640, 640), (854, 480), (480, 360))
    rates = ((25, 1), (30000, 1001), (24, 1))
    place = np.arange(count)
    size = np.array(sizes)[place * 7 % 13 % len(sizes)]
    return ClipTable.from_columns(
        width=size[:, 0], height=size[:, 1], frames=12 + place * 37 % 480,
        fps=[rates[index] for index in (place * 5 % 11 % len(rates)).tolist()],
    )  # fmt: skip


PREVIEW = Path("images") / "plan-preview.svg"
PAGES = {"options.md": options_page, "problem-codes.md": problems_page}

if __name__ == "__main__":
    DOCS.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
    (DOCS / PREVIEW).parent.mkdir(exist_ok=True)
    (DOCS / PREVIEW).write_text(preview_picture()[0], encoding="utf-8")
