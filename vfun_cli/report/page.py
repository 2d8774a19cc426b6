"""A run as one HTML page: no other file is needed to read it, and nothing in it asks the network for anything."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from vfun_cli import console
from vfun_cli.config.datasets import parse_data_sets
from vfun_cli.config.resolve import OPTION
from vfun_cli.errors import CheckpointError, ConfigError, as_flag
from vfun_cli.report import meter
from vfun_cli.report.charts import Chart, Curve, Point, draw, smooth
from vfun_cli.report.gather import Place, Record, Sample, Told, differences, number, numbers, picture
from vfun_cli.report.media import Media

MADE_BY = "<!doctype html>\n<!-- made by vfun report -->"
OURS = re.compile(re.escape(MADE_BY).encode())
"""How our pages begin."""


def text(value: object) -> str:
    """Anything that a file says, as text of the page: it cannot be taken for HTML, nor turn the line around."""
    return html.escape(console.visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))


def render(told: Told, media: Media) -> str:
    """The whole page."""
    style, script = (_beside(name) for name in ("page.css", "page.js"))
    sections = {
        "Loss": _loss(told),
        "Samples": _samples(told, media),
        "Numbers": _numbers(told),
        "Plan": _plan(told),
        "Options": _options(told),
    }
    name = text(f"{told.described['command']} {told.spec.name}")
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title in sections)
    body = "".join(
        f'<section id="{title.lower()}"><h2>{title}</h2>{content}</section>\n' for title, content in sections.items()
    )
    return f"""{MADE_BY}
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}: {text(told.run.root.absolute().name)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{name}</h1>{_ending(told)}<nav>{links}</nav>{_facts(told)}</header>
<main>{body}</main>
<script>{script}</script>
</body>
</html>
"""


def _policy(script: str) -> str:
    """What a browser may do with the page: no network, and no script but ours, whatever stands in a caption."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return "; ".join(
        (
            "default-src 'none'",
            "img-src data: 'self' file:",
            "media-src data: 'self' file:",
            "style-src 'unsafe-inline'",
            f"script-src 'sha256-{digest}'",
        )
    )


def _beside(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


# Head ----------------------------------------------------------------------------------------------------------------


def _ending(told: Told) -> str:
    """How the run ended, and what each rank said that failed, the first first."""
    way, words = ending(told)
    steps = f"step {told.last_step:,}" + (f" of {told.total_steps:,}" if told.total_steps else "")
    badge = f'<p class="ending {way}"><b>{words}</b> <span>{steps}</span></p>'
    ranks: dict[tuple[str, str], list[int]] = {}
    for error in told.errors:
        ranks.setdefault((error.message, error.hint or ""), []).append(error.rank)
    errors = "".join(
        f"<li>rank {', '.join(map(str, sorted(who)))}: {text(message)} <span>{text(hint)}</span></li>"
        for (message, hint), who in ranks.items()
    )
    return badge + (f'<ul class="errors">{errors}</ul>' if errors else "")


def ending(told: Told) -> tuple[str, str]:
    """How the run ended, as a class of the style sheet and in words; its processes leave it in files."""
    if told.errors:
        return "failed", "failed"
    if told.outcome is not None:
        return told.outcome.ending, told.outcome.ending
    return "open", "running, or killed"


def _facts(told: Told) -> str:
    config = told.described["config"]
    layout = f"{config.get('strategy')} on {config.get('num_processes')} × {config.get('device')}"
    facts: dict[str, object] = {
        "Run": str(told.run.root.absolute()),
        "Model": config.get("pretrained_model_name_or_path"),
        "Data": _data(config.get("train_data_meta")),
        "Trained": f"{layout}, {config.get('mixed_precision')}",
        "Launched": _when(told.run.run_json),
        "Last record": _when(told.run.metrics),
        "vfun": told.described.get("vfun"),
    }
    return _list({name: text(value) for name, value in facts.items() if value})


def _data(sets: object) -> str:
    """The data sets of a run as they are typed; what is none in a damaged file is shown as it stands."""
    try:
        return ", ".join(map(str, parse_data_sets(sets, "")))
    except ConfigError:
        return str(sets)


def _when(file: Path) -> str | None:
    try:
        return datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    except OSError:
        return None


# Loss ----------------------------------------------------------------------------------------------------------------


def _loss(told: Told) -> str:
    losses = _points(told.steps, lambda step: number(step, "loss"))
    if not losses:
        return _note("No step was recorded yet: metrics.jsonl gets a line for each.")
    curves = [
        Curve(name="each step", points=losses, role="trained", faint=True),
        Curve(name="smoothed", points=smooth(losses), role="trained"),
    ]
    wide = draw(Chart(title="Training loss", curves=curves, write=meter.compact, width=1000, height=280))
    lost = len(told.steps) - len(losses)
    note = _note(f"{lost:,} steps had a loss that is no finite number.") if lost else ""
    return wide + note + _held_out(told.events.get("held-out", ())) + _small(told)


def _held_out(records: Sequence[Record]) -> str:
    by_weights = {weights: [record for record in records if record.get("weights") == weights] for weights in WEIGHTS}
    mean = Chart(
        title="Held-out loss",
        curves=[
            Curve(name=words, points=_points(by_weights[weights], lambda each: number(each, "loss")), role=weights)
            for weights, words in WEIGHTS.items()
        ],
        write=meter.compact,
    )
    if not mean.drawn:
        return _note("No held-out loss: give --validation-rows 8, or rows of their own with --validation-meta FILE.")
    return _grid([mean, *_by_quantile(by_weights)])


WEIGHTS = {"trained": "trained", "ema": "moving average"}
"""Weights that a held-out loss or a sample is of, and their names for people."""


def _by_quantile(by_weights: Mapping[str, Sequence[Record]]) -> list[Chart]:
    """How the loss lies over the noise levels now and at first, and how it went at each."""
    at, over, newest = [], [], 0
    for weights, words in WEIGHTS.items():
        whole = [record for record in by_weights[weights] if _profile(record)]
        if not whole:
            continue
        first, last = whole[0], whole[-1]
        if first is not last and weights == "trained":
            at.append(Curve(name=f"step {first['step']:,}", points=_profile(first), role="first"))
        at.append(Curve(name=words, points=_profile(last), role=weights))
        newest = last["step"]
        levels = [level for level, _ in _profile(last)]
        for index, level in enumerate(levels):
            points = [
                (float(record["step"]), profile[index][1])
                for record in whole
                if len(profile := _profile(record)) == len(levels)
            ]
            if weights == "trained":
                over.append(Curve(name=f"{level:g}", points=points, role=f"level-{index * 9 // len(levels)}"))
    now = Chart(
        title=f"By noise level, step {newest:,}",
        curves=at,
        write=meter.compact,
        x_name="quantile of the noise level",
        newest=False,
    )
    each = Chart(title="At each noise level", curves=over, write=meter.compact, newest=False)
    return [chart for chart in (now, each) if chart.drawn]


def _profile(record: Record) -> list[Point]:
    """(quantile, loss) of a held-out record, as far as both are numbers."""
    pairs = zip(numbers(record, "quantiles"), numbers(record, "by_quantile"), strict=False)
    return [(level, loss) for level, loss in pairs if level is not None and loss is not None]


def _small(told: Told) -> str:
    """What else moves from step to step."""
    named = {name: write for name, _, write, _ in meter.MEASURED}
    shown = (
        ("learning_rate", "Learning rate", meter.compact),
        ("grad_norm", "Gradient norm", meter.compact),
        ("tokens_per_second", "Tokens a second", named["tokens_per_second"]),
        ("memory", "Memory", named["memory"]),
        ("data_wait_share", "Data wait", named["data_wait_share"]),
        ("whole_seconds", "Time of a step", named["whole_seconds"]),
    )
    charts = []
    for name, title, write in shown:
        points = _points(told.steps, lambda step, name=name: meter.measured(step, name))  # type: ignore[misc]
        noisy = name not in ("learning_rate", "memory")
        curves = [Curve(name="each step", points=points, role="numbers", faint=True)] if noisy else []
        curves.append(Curve(name="smoothed", points=smooth(points) if noisy else points, role="numbers"))
        chart = Chart(title=title, curves=curves, write=write, from_zero=True)
        charts += [chart] if chart.drawn else []
    return _grid(charts)


def _points(records: Iterable[Record], value: Callable[[Record], float | None]) -> list[Point]:
    return [(float(record["step"]), found) for record in records if (found := value(record)) is not None]


def _grid(charts: Iterable[Chart]) -> str:
    return f'<div class="charts">{"".join(draw(chart) for chart in charts)}</div>'


# Samples -------------------------------------------------------------------------------------------------------------


def shown_first(told: Told) -> list[Path]:
    """Files that belong into the page, the most important first: own clips, then the newest samples."""
    newest = sorted((each for each in told.samples if each.file), key=lambda each: (-each.step, each.place, each.ema))
    return [*told.clips.values(), *(each.file for each in newest if each.file)]


def _samples(told: Told, media: Media) -> str:
    """A line for each row and kind of weights, a column for each step."""
    if not told.samples:
        return _note("No samples: give --validation-prompts FILE or --validation-rows 8, and --validation-steps N.")
    steps = sorted({sample.step for sample in told.samples})
    by_line: dict[tuple[Place, bool], dict[int, Sample]] = {}
    for sample in told.samples:
        by_line.setdefault((sample.place, sample.ema), {})[sample.step] = sample
    own = bool(told.clips)
    head = '<th scope="col">prompt</th>' + ('<th scope="col">its own clip</th>' if own else "")
    head += "".join(f'<th scope="col">step {step:,}</th>' for step in steps)
    lines = []
    for (place, _), by_step in sorted(by_line.items()):
        newest = by_step[max(by_step)]
        clip = told.clips.get(place)
        cells = [_shown(clip, media, f"own clip of {place[0]} {place[1]}") if clip else "<td></td>"] if own else []
        cells += [_sample(by_step[step], media) if step in by_step else "<td></td>" for step in steps]
        lines.append(f"<tr>{_prompt(newest)}{''.join(cells)}</tr>")
    links = ""
    if media.linked:
        links = _note(
            f"{len(media.linked):,} of {len(media.linked) + len(media.inside):,} files are too large to be inside this "
            "page with the others. They are links: the page shows them as long as it and the run stay where they are."
        )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="samples" style="--columns: {len(steps) + own}" tabindex="0">{table}</div>{links}'


def _prompt(sample: Sample) -> str:
    said = sample.said
    facts = [
        words for pattern in SAID if (words := _of({"place": f"{sample.place[0]} {sample.place[1]}", **said}, pattern))
    ]
    facts += [f"{name} {text(Path(str(said[name])).name)}" for name in ("image", "control", "audio") if said.get(name)]
    avoids = f"without: {text(said['negative_prompt'])}" if said.get("negative_prompt") else ""
    weights = f"<b>{WEIGHTS['ema']}</b>" if sample.ema else ""
    told = " · ".join(each for each in (weights, *facts, avoids) if each)
    return f'<th scope="row"><p>{text(said.get("prompt", ""))}</p><small>{told}</small></th>'


SAID = (
    "{place}",
    "seed {seed}",
    "{steps} steps",
    "guidance {guidance}",
    "{frames} frames of {height} × {width}",
    "{fps} fps",
)
"""What the file beside a sample says of it."""


def _sample(sample: Sample, media: Media) -> str:
    if "error" in sample.said and sample.file is None:
        return f'<td><p class="error">{text(sample.said["error"])}</p></td>'
    if sample.file is None:
        return "<td></td>"
    return _shown(sample.file, media, f"{sample.place[0]} {sample.place[1]} at step {sample.step:,}")


def _shown(file: Path, media: Media, name: str) -> str:
    source = html.escape(media.source(file))
    if file.suffix == ".png":
        return f'<td><img src="{source}" alt="{name}"></td>'
    plays = 'controls loop muted playsinline preload="metadata"'
    return f'<td><video src="{source}" aria-label="{name}" {plays}></video></td>'


# Numbers, plan, options ----------------------------------------------------------------------------------------------


def _numbers(told: Told) -> str:
    if not told.steps:
        return _note("No step was recorded yet.")
    rows = [(each.name, each.middle, each.last, each.means) for each in meter.lines(told.steps)]
    return _table(("", "median", "last step", ""), rows) + _list(meter.times(told))


def _plan(told: Told) -> str:
    words = _plan_numbers(told.plan) if told.plan else ""
    try:
        drawn = base64.b64encode(picture(told).encode()).decode()
    except CheckpointError as error:
        return words + _note(f"The plan cannot be drawn: {text(error.message)}")
    return f'{words}<img class="plan" src="data:image/svg+xml;base64,{drawn}" alt="The bucket plan">'


def _plan_numbers(plan: Record) -> str:
    """What of the data is trained; a key that is not there leaves its line out."""
    ledger, balance, totals = (_mapping(plan, name) for name in ("ledger", "balance", "totals"))
    found: dict[str, str | None] = {
        "Rows": _of(ledger, "{used:,} of {rows:,} used"),
        "Dropped": ", ".join(f"{text(why)}: {text(count)}" for why, count in _mapping(ledger, "dropped").items()),
        "Cut to length": _of(ledger, "{truncated:,} clips"),
        "Buckets": f"{len(plan['buckets']):,}" if isinstance(plan.get("buckets"), list) else None,
        "An epoch": _of({**totals, **plan}, "{steps_per_epoch:,} steps, {tokens:,} tokens"),
        "Balance": _of(balance, "{mean_over_max_flops:.1%}; {independent_draws:.1%} if each rank drew alone"),
    }
    return _list({name: words for name, words in found.items() if words})


def _mapping(record: Record, name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _of(record: Mapping[str, Any], pattern: str) -> str | None:
    """The pattern with what the record says; None where that is not there or no number."""
    try:
        return text(pattern.format(**{name: value for name, value in record.items() if value is not None}))
    except (KeyError, ValueError, TypeError):
        return None


def _options(told: Told) -> str:
    found = differences(told)
    if not found:
        return _note(f"All options are the defaults of {text(told.spec.name)}.")
    rows = [(as_flag(each.name), _value(each.value), _value(each.default), _source(each.source)) for each in found]
    return _table(("option", "value", f"default of {told.spec.name}", "from"), rows)


def _source(source: str) -> str:
    return "command line" if source == OPTION else source


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# Parts ---------------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    names = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    lines = "".join(
        f'<tr><th scope="row">{text(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<table class="numbers"><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>'


def _list(facts: Mapping[str, str]) -> str:
    """Names and words, which are HTML already."""
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{words}</dd></div>" for name, words in facts.items()) + "</dl>"


def _note(words: str) -> str:
    return f'<p class="note">{words}</p>'
