"""The plan for people: Rich tables that read well at 80 columns, on dark and light, with and without colour."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from vfun_cli.families.spec import FamilySpec
from vfun_cli.plan.balance import in_words, independent_balance, mean_over_max
from vfun_cli.plan.clips import KINDS, REASONS
from vfun_cli.plan.held_out import QUANTILES
from vfun_cli.plan.report import LookCost, Totals, held_out_cost, samples_cost, size_of_bucket, size_table, totals
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import EpochPlan, Ledger

MOST_BUCKETS = 12
"""Lines of the bucket table; the rest is one line."""

# Colours that keep their contrast on black and on white; no meaning hangs on them alone.
CLIPS_STYLE = "color(33)"
COMPUTE_STYLE = "color(162)"
FLOP_UNITS = (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of ``share`` (0 to 1) of the column, to an eighth of a character."""

    share: float
    style: str
    width: int = 12

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(self.width, options.max_width)
        eighths = max(round(min(self.share, 1.0) * width * 8), 1 if self.share > 0 else 0)
        if options.ascii_only:
            text = "#" * max(round(eighths / 8), 1 if self.share > 0 else 0)
        else:
            text = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
        yield Segment(text.ljust(width), Style.parse(self.style))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(4, self.width)


def _table(*columns: str, left: int = 1) -> Table:
    """A table with a rule under its heading; the first ``left`` columns are flush left, numbers flush right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left or not name else "right", no_wrap=True)
    return table


def _heading(text: str, note: str = "") -> Text:
    return Text.assemble("\n", (text, "bold"), (f"  {note}" if note else "", "dim"))


def _percent(share: float) -> str:
    return f"{share:.1%}"


def preview(plan: RunPlan, epochs: Sequence[EpochPlan] = ()) -> RenderableType:
    """The plan in ``epochs``, consecutive ones; details are the first one's. Without epochs, the size table alone."""
    parts: list[RenderableType] = [_mode(plan)]
    if not epochs:
        return Group(*parts, _sizes_alone(plan))
    first = epochs[0]
    parts += [_sizes_used(plan, first), _buckets(first)]
    parts += [_heading("Epoch"), _facts(_total_facts(totals(plan, first)))]
    parts += [_heading("Rows", f"{first.ledger.rows:,} in the metadata"), _facts(_ledger_facts(first.ledger))]
    if first.ledger.sets:
        parts += [_heading("Data sets", "what an epoch shows of each"), _data_sets(plan, first.ledger)]
    loss, videos = held_out_cost(plan), samples_cost(plan)
    if loss is not None:
        parts += [_heading("Held-out loss", f"{loss.rows:,} rows at {len(QUANTILES)} timesteps"), _look(loss)]
    if videos is not None and plan.samples is not None:
        parts += [_heading("Samples", f"{videos.rows:,} rows in {plan.samples.steps:,} denoising steps"), _look(videos)]
    note = f"mean over max FLOPs of {first.world_size} ranks: the share of time spent computing"
    parts += [_heading("Balance", note), _balance(first)]
    if first.num_steps == 0:
        parts.append(_no_steps(plan, first))
    if len(epochs) > 1:
        parts += [_heading("Epochs"), _epochs(epochs)]
    return Group(*parts)


def _mode(plan: RunPlan) -> Text:
    options = plan.options
    if options.fix_sample_size:
        mode = f"every clip {'x'.join(map(str, options.fix_sample_size))}, up to {options.video_sample_n_frames} frames"
    elif options.training_with_video_token_length:
        mode = f"token-length buckets, {options.video_sample_n_frames} frames at {options.token_sample_size}"
    elif options.random_hw_adapt:
        mode = f"random sizes, up to {options.video_sample_n_frames} frames"
    else:
        mode = f"one size, up to {options.video_sample_n_frames} frames"
    if options.random_ratio_crop:
        mode += ", cropped to random aspects"
    return Text.assemble(("Bucket plan", "bold"), f"  {plan.spec.name}  ", (mode, "dim"))


def _sizes_alone(plan: RunPlan) -> RenderableType:
    rows = size_table(plan.options, plan.spec, plan.dims)
    result = _table("size", "frames", "latents", "tokens", "sequence", "cost", "")
    most = max(row.flops for row in rows)
    for row in rows:
        name = row.name if row.kind == "video" else f"{row.name} image"
        result.add_row(
            name, str(row.frames), "x".join(map(str, row.latents)), f"{row.tokens:,}", f"{row.sequence_tokens:,}",
            f"{row.flops / 1e12:,.0f} TF", Bar(row.flops / most, COMPUTE_STYLE, 16),
        )  # fmt: skip
    whose = "every clip" if plan.options.fix_sample_size else "square clips"
    note = f"{whose}; sequence: with text, reference and motion; cost: one forward pass"
    return Group(_heading("Sizes"), result, Text(note, style="dim"), _reference_note(plan.spec))


def _reference_note(spec: FamilySpec) -> Text:
    if not spec.plan.reference_frame:
        return Text("", end="")
    return Text("frames: the clip's own and one reference frame, as the published guides count", style="dim")


def _sizes_used(plan: RunPlan, epoch: EpochPlan) -> RenderableType:
    rows, buckets = size_table(plan.options, plan.spec, plan.dims), epoch.buckets
    line = size_of_bucket(buckets, plan.options, plan.spec, plan.dims)
    clips = np.bincount(line, weights=buckets.clips, minlength=len(rows))
    cost = np.bincount(line, weights=buckets.clips * buckets.flops, minlength=len(rows))
    share = cost / cost.sum()
    result = _table("size", "frames", "latents", "tokens", "clips", "compute", "")
    for row, count, part in zip(rows, clips.tolist(), share.tolist(), strict=True):
        name = row.name if row.kind == "video" else f"{row.name} image"
        result.add_row(
            name, str(row.frames), "x".join(map(str, row.latents)), f"{row.tokens:,}", f"{count:,.0f}",
            _percent(part), Bar(part / share.max(), COMPUTE_STYLE, 16),
        )  # fmt: skip
    whose = "every clip" if plan.options.fix_sample_size else "square clips"
    return Group(_heading("Sizes", f"for {whose}, at most"), result, _reference_note(plan.spec))


def _buckets(epoch: EpochPlan) -> RenderableType:
    buckets = epoch.buckets
    cost = buckets.clips * buckets.flops
    share, order = cost / cost.sum(), np.argsort(-cost, kind="stable")
    shown, rest = order[:MOST_BUCKETS], order[MOST_BUCKETS:]
    most_clips, most_share = int(buckets.clips[shown].max()), float(share[shown].max())
    result = _table("height x width, frames", "tokens", "clips", "", "compute", "")
    for i in shown:
        name = f"{buckets.height[i]}x{buckets.width[i]}, {buckets.frames[i]}"
        if KINDS[buckets.kind[i]] == "image":
            name = f"{buckets.height[i]}x{buckets.width[i]} image"
        clips = Bar(buckets.clips[i] / most_clips, CLIPS_STYLE, 10)
        compute = Bar(share[i] / most_share, COMPUTE_STYLE, 10)
        result.add_row(name, f"{buckets.tokens[i]:,}", f"{buckets.clips[i]:,}", clips, _percent(share[i]), compute)
    if len(rest):
        result.add_row(
            Text(f"{len(rest)} more buckets", style="dim"), "", f"{buckets.clips[rest].sum():,}", "",
            _percent(share[rest].sum()), "",
        )  # fmt: skip
    note = "by share of compute" if len(rest) == 0 else f"the {MOST_BUCKETS} with most compute"
    return Group(_heading(f"Buckets: {len(buckets)}", note), result)


def _facts(facts: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="left", style="dim", no_wrap=True)
    grid.add_column(justify="left", overflow="fold")
    for name, value in facts:
        grid.add_row(name, value)
    return grid


def _flops(value: float) -> str:
    """In the unit that leaves a number a person can read."""
    unit, size = next(((unit, size) for unit, size in FLOP_UNITS if value >= size), FLOP_UNITS[-1])
    return f"{value / size:,.1f} {unit}"


def _amount(value: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:,.1f} {name}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever reads best."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _total_facts(sums: Totals) -> list[tuple[str, str]]:
    extra = 1 - sums.own_tokens / sums.tokens if sums.tokens else 0.0
    facts = [
        ("steps", f"{sums.steps:,}, with {sums.samples:,} samples in {sums.micro_batches:,} micro-batches"),
        ("tokens", f"{_amount(sums.tokens)}, of them text, reference and motion {_percent(extra)}, padding 0%"),
        ("compute", f"{_flops(sums.forward_flops)} in forward passes"),
    ]
    if sums.seconds_total:
        part = _percent(sums.seconds_kept / sums.seconds_total)
        kept = f"{duration(sums.seconds_kept)} of {duration(sums.seconds_total)} of video ({part})"
        facts.append(("motion kept", kept))
    for index, (fps, stride, videos) in enumerate(sums.frame_rates[:4]):
        rate = f"{float(fps):g} fps -> {float(fps / stride):g} fps" if stride > 1 else f"{float(fps):g} fps"
        speed = f", {stride}x speed if played at {float(fps):g} fps" if stride > 1 else ", speed unchanged"
        facts.append(("frame rate" if index == 0 else "", f"{rate}{speed}: {videos:,} videos"))
    if len(sums.frame_rates) > 4:
        others = sum(videos for _, _, videos in sums.frame_rates[4:])
        facts.append(("", f"{len(sums.frame_rates) - 4} other rates: {others:,} videos"))
    return facts


def _ledger_facts(ledger: Ledger) -> list[tuple[str, str]]:
    facts = [("used", f"{ledger.used:,}")]
    facts.append(("  truncated", f"{ledger.truncated:,}, longer than the clip taken from them"))
    if ledger.shortened:
        facts.append(("  short", f"{ledger.shortened:,}, shorter than the settings ask"))
    facts.append(("dropped", f"{sum(ledger.dropped.values()):,}"))
    facts += [(f"  {name}", f"{count:,}, {REASONS[name]}") for name, count in ledger.dropped.items()]
    if ledger.carried_in or ledger.carried_out:
        facts.append(("carried", f"{ledger.carried_in:,} in, {ledger.carried_out:,} on to the next epoch"))
    if ledger.borrowed:
        facts.append(("borrowed", f"{ledger.borrowed:,} draws of following epochs: too few clips for one step"))
    return facts


def _data_sets(plan: RunPlan, ledger: Ledger) -> Table:
    result = _table("set", "repeats", "rows", "used", "shown")
    for name, data in zip(plan.data_sets, ledger.sets, strict=True):
        result.add_row(name, data.repeats, f"{data.rows:,}", f"{data.used:,}", f"{data.samples:,}")
    return result


def _look(cost: LookCost) -> Table:
    facts = [("one look", f"{_flops(cost.flops)} in {cost.passes:,} forward passes")]
    if cost.every_steps is not None and cost.share_of_training is not None:
        percent = 100 * cost.share_of_training
        share = f"{percent:,.0f}%" if percent >= 10 else f"{percent:.2g}%"
        facts.append(("every", f"{cost.every_steps:,} steps, {share} of the training between two of them"))
    return _facts(facts)


def _balance(epoch: EpochPlan) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    figures = (("this plan", mean_over_max(epoch)), ("independent draws", independent_balance(epoch)))
    for name, share in figures:
        grid.add_row(name, in_words(share), Bar(share or 0.0, COMPUTE_STYLE, 24))
    return grid


def _no_steps(plan: RunPlan, epoch: EpochPlan) -> Text:
    slots = plan.options.slots
    why = (
        f"a step takes {slots:,} micro-batches ({epoch.world_size:,} ranks x "
        f"{plan.options.gradient_accumulation_steps:,}), more than this epoch fills; its clips wait for later epochs. "
        "Fewer ranks or less accumulation train in every epoch."
    )
    return Text.assemble("\n", ("warning:", "yellow"), f" {why}")


def _epochs(epochs: Sequence[EpochPlan]) -> Table:
    result = _table("epoch", "steps", "trained", "carried on", "balance")
    for epoch in epochs:
        result.add_row(
            str(epoch.epoch), f"{epoch.num_steps:,}", f"{epoch.ledger.trained:,}", f"{epoch.ledger.carried_out:,}",
            in_words(mean_over_max(epoch)),
        )  # fmt: skip
    return result
