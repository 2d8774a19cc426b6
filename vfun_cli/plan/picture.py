"""The plan as a picture, SVG or PNG: what the clips become, and how evenly the ranks work."""

import io
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from vfun_cli.errors import ConfigError, EnvironmentFault
from vfun_cli.files import require_place, write_output
from vfun_cli.metadata.table import IntArray
from vfun_cli.plan.balance import in_words, independent_balance, independent_rounds, mean_over_max, planned_rounds
from vfun_cli.plan.clips import KINDS
from vfun_cli.plan.report import SizeRow, size_of_bucket, size_table
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import Buckets, EpochPlan, FloatArray

WIDTH, MARGIN = 960, 40

# Roles of colour: (light, dark). SVG follows the reader's colour scheme, PNG is light.
PALETTE: dict[str, tuple[str, str]] = {
    "page": ("#ffffff", "#14171c"),
    "ink": ("#1d2430", "#e6e9ef"),
    "faint": ("#697386", "#949eb0"),
    "rule": ("#dfe3ea", "#2c323c"),
    "clips": ("#3b7dd8", "#6aa5f2"),
    "images": ("#e09a2b", "#f0b95a"),
    "compute": ("#c2417c", "#ec78ab"),
    "waiting": ("#f3d3e1", "#4b2a3a"),
}


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """A filled rectangle; ``radius`` rounds its corners."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    radius: float = 0
    opacity: float = 1


@dataclass(frozen=True, kw_only=True)
class Label:
    """A line of text with its baseline at ``y``; ``anchor`` is start, middle or end."""

    x: float
    y: float
    text: str
    size: int = 13
    fill: str = "ink"
    anchor: str = "start"
    bold: bool = False


Scene = list[Rectangle | Label]


def plot(path: Path, plan: RunPlan, epoch: EpochPlan) -> None:
    """Draw the plan in an epoch into ``path``, as its suffix says.

    Raises:
        ConfigError: the suffix is neither .svg nor .png.
        EnvironmentFault: a PNG needs Pillow, which is missing; or the file cannot be written.
    """
    require_picture(path)
    scene, height = compose(plan, epoch)
    drawn = to_svg(scene, height).encode() if path.suffix.lower() == ".svg" else _png(scene, height)
    write_output(path, drawn, "--plot", ours=DRAWN)


MADE_BY = "vfun plan-buckets"
DRAWN = re.compile(rb"(\x89PNG|<svg ).{,400}" + MADE_BY.encode(), re.DOTALL)
"""How our pictures begin."""


def require_picture(path: Path) -> None:
    """Refuse a file that cannot be drawn into, before the plan is made.

    Raises:
        ConfigError: the suffix is neither .svg nor .png, or the file is something else than an earlier picture.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"cannot draw {path.name}: the suffix decides the format.", hint="Use .svg or .png.")
    require_place(path, "--plot", ours=DRAWN)


def compose(plan: RunPlan, epoch: EpochPlan) -> tuple[Scene, float]:
    """The picture as shapes, and its height."""
    ledger = epoch.ledger
    scene: Scene = [
        Label(x=MARGIN, y=52, text=f"Bucket plan of {plan.spec.name}", size=22, bold=True),
        Label(
            x=MARGIN, y=76, fill="faint",
            text=f"{ledger.used:,} of {ledger.rows:,} rows in {len(epoch.buckets):,} buckets, "
            f"{epoch.num_steps:,} steps on {epoch.world_size} rank{'s' * (epoch.world_size != 1)}, "
            f"{int(epoch.tokens.sum()):,} tokens",
        ),
    ]  # fmt: skip
    rows = size_table(plan.options, plan.spec, plan.dims)
    line = size_of_bucket(epoch.buckets, plan.options, plan.spec, plan.dims)
    sizes_end = _sizes(scene, 116, rows, epoch.buckets, line)
    map_end = _map(scene, 116, epoch.buckets)
    top = max(sizes_end, map_end) + 44
    scene.append(Label(x=MARGIN, y=top, text="Time on the ranks", size=15, bold=True))
    _legend(scene, MARGIN + 172, top, (("compute", "computing (mean)"), ("waiting", "waiting for the slowest rank")))
    planned = planned_rounds(epoch)[:STRIP_ROUNDS]
    independent = independent_rounds(epoch, len(planned), epoch.world_size)
    tallest = max((float(rounds.max()) for rounds in (planned, independent) if rounds.size), default=1.0)
    _strip(scene, top + 20, "this plan", planned, mean_over_max(epoch), tallest)
    _strip(scene, top + 140, "independent draws", independent, independent_balance(epoch), tallest)
    scene.append(
        Label(x=MARGIN + 150, y=top + 262, fill="faint", size=12,
              text=f"the first {len(planned)} rounds of the epoch; height: FLOPs of the slowest rank")
    )  # fmt: skip
    return scene, top + 290


def _legend(scene: Scene, x: float, y: float, entries: tuple[tuple[str, str], ...]) -> None:
    for fill, text in entries:
        scene.append(Rectangle(x=x, y=y - 10, width=11, height=11, fill=fill, radius=2))
        scene.append(Label(x=x + 17, y=y, text=text, size=12, fill="faint"))
        x += 32 + 6.6 * len(text)


def _size_name(row: SizeRow) -> str:
    return f"{row.name}, image" if row.kind == "image" else f"{row.name}, {row.frames} frames"


def _sizes(scene: Scene, top: float, rows: list[SizeRow], buckets: Buckets, line: IntArray) -> float:
    """Bars of clips and of compute for each size; returns where they end."""
    clips = np.bincount(line, weights=buckets.clips, minlength=len(rows))
    cost = np.bincount(line, weights=buckets.clips * buckets.flops, minlength=len(rows))
    shares = {"clips": clips / clips.sum(), "compute": cost / cost.sum()}
    longest = max(float(share.max()) for share in shares.values())
    scene.append(Label(x=MARGIN, y=top, text="Sizes", size=15, bold=True))
    _legend(scene, MARGIN + 150, top, (("clips", "clips"), ("compute", "compute")))
    y = top + 18.0
    for index, row in enumerate(rows):
        scene.append(Label(x=MARGIN + 138, y=y + 15, text=_size_name(row), size=12, anchor="end"))
        for offset, (name, share) in zip((2, 13), shares.items(), strict=True):
            part = float(share[index])
            width = max(part / longest * 210, 1.0)
            scene.append(Rectangle(x=MARGIN + 150, y=y + offset, width=width, height=9, fill=name, radius=2))
            scene.append(Label(x=MARGIN + 156 + width, y=y + offset + 8, text=f"{part:.1%}", size=10, fill="faint"))
        y += 29
    return y


MAP_SIDE = 330
MAP_FILLS = {"video": "clips", "image": "images"}


def _map(scene: Scene, top: float, buckets: Buckets) -> float:
    """Every bucket at its width and height, its area by the number of clips; returns where the map ends."""
    left = WIDTH - MARGIN - MAP_SIDE
    scene.append(Label(x=left, y=top, text="Buckets", size=15, bold=True))
    kinds = sorted(set(buckets.kind.tolist()))
    _legend(scene, left + 75, top, tuple((MAP_FILLS[KINDS[kind]], f"{KINDS[kind]}s") for kind in kinds))
    top += 18
    most = max(int(buckets.width.max()), int(buckets.height.max()))
    tick = 512 if most > 1100 else 256 if most > 500 else 64
    scale = MAP_SIDE / (most + tick / 4)
    bottom = top + MAP_SIDE
    for value in range(0, most + 1, tick):
        at = value * scale
        scene.append(Rectangle(x=left + at, y=top, width=1, height=MAP_SIDE, fill="rule"))
        scene.append(Rectangle(x=left, y=bottom - at, width=MAP_SIDE, height=1, fill="rule"))
        scene.append(Label(x=left + at, y=bottom + 16, text=str(value), size=11, fill="faint", anchor="middle"))
        if value:
            scene.append(Label(x=left - 8, y=bottom - at + 4, text=str(value), size=11, fill="faint", anchor="end"))
    note = "width in pixels; area: clips"
    scene.append(Label(x=left + MAP_SIDE, y=bottom + 32, text=note, size=11, fill="faint", anchor="end"))
    scene.append(Label(x=left - 8, y=top + 4, text="height", size=11, fill="faint", anchor="end"))
    places, which = np.unique(np.stack([buckets.kind, buckets.height, buckets.width]), axis=1, return_inverse=True)
    clips = np.bincount(which.reshape(-1), weights=buckets.clips)
    radius = np.clip(16 * np.sqrt(clips / clips.max()), 2, None)
    for i in np.argsort(-clips, kind="stable"):
        (kind, high, wide), r = places[:, i].tolist(), float(radius[i])
        x, y, fill = left + wide * scale, bottom - high * scale, MAP_FILLS[KINDS[kind]]
        scene.append(Rectangle(x=x - r, y=y - r, width=2 * r, height=2 * r, fill=fill, radius=r, opacity=0.55))
    return bottom + 32


STRIP_ROUNDS = 60
STRIP_HEIGHT = 90


def _strip(scene: Scene, top: float, name: str, rounds: FloatArray, share: float | None, tallest: float) -> None:
    """One column per round: the slowest rank as its height, the mean of the ranks as the solid part."""
    left, width = MARGIN + 150, WIDTH - 2 * MARGIN - 150
    base = top + STRIP_HEIGHT + 10
    scene.append(Label(x=MARGIN, y=base - 26, text=name, size=13))
    scene.append(Label(x=MARGIN, y=base - 2, text=in_words(share), size=20, bold=True, fill="compute"))
    scene.append(Rectangle(x=left, y=base, width=width, height=1, fill="rule"))
    pitch = width / STRIP_ROUNDS
    for index, ranks in enumerate(rounds):
        x, tall = left + index * pitch, STRIP_HEIGHT / tallest
        for value, fill in ((float(ranks.max()), "waiting"), (float(ranks.mean()), "compute")):
            scene.append(
                Rectangle(x=x + 1, y=base - value * tall, width=pitch - 2, height=value * tall, fill=fill, radius=1)
            )


def _style(column: int) -> str:
    return "".join(f".{role}{{fill:{colours[column]}}}" for role, colours in PALETTE.items())


def to_svg(scene: Scene, height: float) -> str:
    """The scene as a standalone SVG document that follows the reader's light or dark colour scheme."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
        f'height="{height:g}" font-family="ui-sans-serif, system-ui, Helvetica, Arial, sans-serif">',
        f"<!-- {MADE_BY} -->",
        f"<style>{_style(0)}@media(prefers-color-scheme:dark){{{_style(1)}}}</style>",
        '<rect class="page" width="100%" height="100%"/>',
    ]
    for item in scene:
        if isinstance(item, Rectangle):
            opacity = f' opacity="{item.opacity:g}"' if item.opacity < 1 else ""
            radius = f' rx="{item.radius:.4g}"' if item.radius else ""
            parts.append(
                f'<rect class="{item.fill}" x="{item.x:.5g}" y="{item.y:.5g}" width="{item.width:.5g}" '
                f'height="{item.height:.5g}"{radius}{opacity}/>'
            )
        else:
            weight = ' font-weight="600"' if item.bold else ""
            parts.append(
                f'<text class="{item.fill}" x="{item.x:.5g}" y="{item.y:.5g}" font-size="{item.size}" '
                f'text-anchor="{item.anchor}"{weight}>{escape(item.text)}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


PNG_SCALE = 2


def _png(scene: Scene, height: float) -> bytes:
    """The scene at twice its size, in the light palette."""
    try:
        from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
    except ImportError as error:
        raise EnvironmentFault("a PNG needs Pillow, which is not installed.", hint="Use --plot plan.svg.") from error
    image = Image.new("RGB", (WIDTH * PNG_SCALE, round(height * PNG_SCALE)), PALETTE["page"][0])
    draw = ImageDraw.Draw(image, "RGBA")
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for item in scene:
        colour = PALETTE[item.fill][0]
        if isinstance(item, Rectangle):
            x, y, right, bottom = (
                value * PNG_SCALE for value in (item.x, item.y, item.x + item.width, item.y + item.height)
            )
            fill = colour + f"{round(item.opacity * 255):02x}"
            box = (x, y, max(right - 1, x), max(bottom - 1, y))
            radius = min(item.radius * PNG_SCALE, (right - x) / 2, (bottom - y) / 2)
            draw.rounded_rectangle(box, radius=radius, fill=fill)
        else:
            font = ImageFont.load_default(item.size * PNG_SCALE)
            stroke = 0.5 if item.bold else 0
            place = (item.x * PNG_SCALE, item.y * PNG_SCALE)
            draw.text(place, item.text, fill=colour, font=font, anchor=anchors[item.anchor], stroke_width=stroke)
    about, drawn = PngImagePlugin.PngInfo(), io.BytesIO()
    about.add_text("Software", MADE_BY)
    image.save(drawn, "PNG", pnginfo=about)
    return drawn.getvalue()
