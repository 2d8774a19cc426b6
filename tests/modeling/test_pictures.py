"""Every kind of picture trains as a viewer shows it, in the size that validation says, or validation refuses it."""

import io
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms, ImageFile
from torch import Tensor

from vfun_cli.errors import MetadataError
from vfun_cli.metadata.facts import ProbeError
from vfun_cli.metadata.pictures import FORMATS, probe_picture
from vfun_cli.metadata.probe import probe_visual
from vfun_cli.metadata.upright import upright_rgb
from vfun_cli.modeling.media.pictures import read_image

PACKAGE = Path(__file__).parents[2] / "vfun_cli"
PILLOW_13 = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="older ones do not read it")
NOISE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I;16B", "I", "F")


def code_of(path: Path) -> str | None:
    """The code under which validation refuses a file; None if it takes it."""
    try:
        probe_visual(path)
    except ProbeError as error:
        return error.code
    return None


def shown(path: Path) -> Tensor:
    """What trains of a picture at its own size, [3, h, w] from 0 to 255."""
    facts = probe_visual(path)
    assert facts.kind == "image"
    pixels = read_image(path, facts.height, facts.width)
    assert pixels.shape == (1, 3, facts.height, facts.width)
    return pixels[0].float()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels: np.ndarray, bits: int, colour: int, width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG of rows [h, ...] of big-endian samples; ``colour`` is 0 grey, 2 RGB, 4 grey with alpha."""
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(data: bytes, bits: int, *, kind: int = 1, photometric: int = 1, alpha: int = 0, samples: int = 1) -> bytes:
    """A TIFF, 16 pixels wide and one high. ``kind`` is 1 whole numbers, 2 signed ones, 3 floats."""
    widths = struct.pack("<4H", *[bits] * 4)
    kinds = struct.pack("<4H", *[kind] * 4)
    count = 10 + bool(alpha)
    rest = 8 + 2 + 12 * count + 4
    tags = [
        (256, 3, 1, 16), (257, 3, 1, 1), (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, rest + 16),
        (258, 3, samples, bits if samples == 1 else bits * 65537 if samples == 2 else rest), (277, 3, 1, samples),
        (278, 3, 1, 1), (279, 4, 1, len(data)),
        (339, 3, samples, kind if samples == 1 else kind * 65537 if samples == 2 else rest + 8),
    ]  # fmt: skip
    if alpha:
        tags.append((338, 3, 1, alpha))
    table = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + table + bytes(4) + widths + kinds + data


# Numbers of a pixel

RAMP = np.linspace(0, 65535, 16).astype(np.uint16)[None]
GREY = RAMP / 257
TWELVE_BITS = bytes.fromhex("".join(f"{value >> 4:03x}" for value in RAMP[0]))


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(RAMP), "PNG"),
        encoded(Image.fromarray(RAMP), "TIFF"),
        encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
        encoded(Image.frombytes("I;16B", (16, 1), RAMP.byteswap().tobytes()), "TIFF"),
        tiff(TWELVE_BITS, 12),
        tiff((65535 - RAMP).tobytes(), 16, photometric=0),
        png(RAMP.astype(">u2"), 16, 0, 16, 1, chunk(b"tRNS", b"\0\0")),
        png(RAMP.repeat(3).astype(">u2")[None], 16, 2, 16, 1),
        tiff(RAMP.repeat(3).tobytes(), 16, photometric=2, samples=3),
    ],
    ids=["png", "tiff", "lzw", "big-endian", "12 bits", "0 is white", "transparent value", "RGB png", "RGB tiff"],
)
def test_depth_of_16_bits_is_scaled_by_its_whole_range(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "depth.png").write_bytes(content)
    assert not probe_visual(tmp_path / "depth.png").transparent
    assert np.abs(shown(tmp_path / "depth.png").numpy() - GREY).max() < 1


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.new("F", (8, 8), 0.5), "TIFF"),
        encoded(Image.new("I", (8, 8), 70000), "TIFF"),
        tiff(bytes(32), 16, kind=2),
        tiff(bytes(32), 16, kind=3),
        tiff(bytes(192), 32, kind=3, photometric=2, samples=3),
    ],
    ids=["floats", "32 bits", "signed", "16-bit floats", "RGB floats"],
)
def test_numbers_without_a_stated_white_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "depth.tif").write_bytes(content)
    assert code_of(tmp_path / "depth.tif") == "unsupported-picture"
    with pytest.raises(MetadataError, match=r"depth\.tif.*(floats|sign)"):
        read_image(tmp_path / "depth.tif", 8, 8)


# Transparency: red where it is opaque, and some green that nobody should see


def half_clear(mode: str = "RGBA", clear: Any = (0, 255, 0, 0), full: Any = (255, 0, 0, 255)) -> Image.Image:
    image = Image.new(mode, (32, 32), full)
    image.paste(clear, (16, 0, 32, 32))
    return image


def two_colours() -> Image.Image:
    image = half_clear("P", 1, 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    return image


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", encoded(half_clear(), "PNG")),
        ("a.webp", encoded(half_clear(), "WEBP", lossless=True, exact=True)),
        ("a.tif", encoded(half_clear(), "TIFF")),
        ("a.avif", encoded(half_clear(), "AVIF", quality=100, subsampling="4:4:4")),
        ("rgb.png", encoded(half_clear().convert("RGB"), "PNG", transparency=(0, 255, 0))),
        ("index.png", encoded(two_colours(), "PNG", transparency=1)),
        ("bytes.png", encoded(two_colours(), "PNG", transparency=b"\xff\0")),
        ("index.gif", encoded(two_colours(), "GIF", transparency=1)),
    ],
)
def test_what_is_transparent_is_white(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    facts, pixels = probe_visual(tmp_path / name), shown(tmp_path / name).round()
    assert facts.kind == "image" and facts.transparent
    assert np.abs(pixels[:, 16, 4].numpy() - (255, 0, 0)).max() <= 4
    assert np.abs(pixels[:, 16, 28].numpy() - 255).max() <= 4


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(b"\x40\x80" * 16, 8, samples=2, alpha=2), 64 * 128 / 255 + 127),
        pytest.param(tiff(b"\x40\x80" * 16, 8, samples=2, alpha=1), 64 + 127, marks=PILLOW_13),
        (png(np.full((1, 4), 0x4000_8000, ">u4"), 16, 4, 4, 1), 64 * 128 / 255 + 127),
    ],
    ids=["beside", "premultiplied", "16 bits"],
)
def test_grey_with_alpha_is_mixed_with_white(content: bytes, expected: float, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert probe_visual(tmp_path / "a.png").transparent
    assert np.abs(shown(tmp_path / "a.png").numpy() - expected).max() < 2


# Colours


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2."""
    tags = {
        b"wtpt": b"XYZ \0\0\0\0" + D50,
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x" + bytes(80),
        **tags,
    }
    tags = {name: data + bytes(-len(data) % 4) for name, data in tags.items()}
    at, table = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags))
    for name, data in tags.items():
        table += name + struct.pack(">II", at, len(data))
        at += len(data)
    head = struct.pack(">I4sI4s4s4s", at, b"", 0x02400000, b"mntr", space, pcs) + bytes(12) + b"acsp" + bytes(28)
    return (head + D50).ljust(128, b"\0") + table + b"".join(tags.values())


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


D50 = fixed(0.9642) + fixed(1) + fixed(0.8249)
P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
"""Linear Display P3 to XYZ under D50."""
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
COLUMNS = {name: b"XYZ \0\0\0\0" + b"".join(map(fixed, P3[:, i])) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
WIDE = profile(b"RGB ", b"XYZ ", COLUMNS | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(2.2)))
DARK_GREY = profile(b"GRAY", b"XYZ ", {b"kTRC": curve(1.0)})
STANDARD = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def ink_profile() -> bytes:
    """Each ink alone or with others is some green, no ink is white."""
    ramp = bytes(range(256))
    white, green = b"\xff\x80\x80", b"\x80\x40\xc0"  # L, a, b of 8 bits
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + b"".join(map(fixed, np.eye(3).ravel()))
    return profile(b"CMYK", b"Lab ", {b"A2B0": table + 4 * ramp + white + 15 * green + 3 * ramp})


def gamma_coded(linear: np.ndarray) -> np.ndarray:
    """sRGB's curve: linear light in [0, 1] to 0..255."""
    clipped = linear.clip(0, 1)
    return 255 * np.where(clipped < 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("colour", [(200, 100, 100), (90, 180, 90), (128, 128, 128)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100, "subsampling": 0})],
)
def test_colours_of_another_profile_become_those_of_srgb(
    colour: tuple[int, int, int], kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    Image.new("RGB", (16, 16), colour).save(tmp_path / "wide", kind, icc_profile=WIDE, **options)
    expected = gamma_coded(np.linalg.inv(SRGB) @ P3 @ (np.array(colour) / 255) ** 2.2)
    (tmp_path / "wide").rename(tmp_path / "wide.png")
    assert np.abs(shown(tmp_path / "wide.png")[:, 8, 8].numpy() - expected).max() < 3
    assert colour == (128, 128, 128) or np.abs(expected - colour).max() > 5


def test_palettes_and_pictures_with_alpha_follow_their_profile_too(tmp_path: Path) -> None:
    red = half_clear()
    red.paste((200, 100, 100, 255), (0, 0, 16, 32))
    red.save(tmp_path / "alpha.png", icc_profile=WIDE)
    Image.new("RGB", (32, 32), (200, 100, 100)).quantize(2).save(tmp_path / "palette.png", icc_profile=WIDE)
    expected = gamma_coded(np.linalg.inv(SRGB) @ P3 @ (np.array((200, 100, 100)) / 255) ** 2.2)
    for name in ("alpha.png", "palette.png"):
        assert np.abs(shown(tmp_path / name)[:, 16, 4].numpy() - expected).max() < 3
    assert shown(tmp_path / "alpha.png")[:, 16, 28].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_follows_its_curve(mode: str, tmp_path: Path) -> None:
    level = {"L": 64, "LA": (64, 255), "I;16": 64 * 257}[mode]
    Image.new(mode, (8, 8), level).save(tmp_path / "g.png", icc_profile=DARK_GREY)
    assert np.abs(shown(tmp_path / "g.png").numpy() - gamma_coded(np.array(64 / 255))).max() < 2


def test_inks_follow_their_profile_and_are_mixed_plainly_without_one(tmp_path: Path) -> None:
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for kind in ("JPEG", "TIFF"):
        inks.save(tmp_path / "plain.jpg", kind)
        inks.save(tmp_path / "profile.jpg", kind, icc_profile=ink_profile())
        assert np.abs(shown(tmp_path / "plain.jpg")[:, 8, 8].numpy() - (0, 255, 255)).max() <= 2
        red, green, blue = shown(tmp_path / "profile.jpg")[:, 8, 8].tolist()
        assert green > 100 and red < 50 and blue < 50


def test_inks_in_luminance_form_are_read_as_adobe_writes_them(tmp_path: Path) -> None:
    content = bytearray(encoded(Image.new("CMYK", (16, 16), (127, 127, 55, 0)), "JPEG", quality=100))
    content[content.index(b"Adobe") + 11] = 2  # the same numbers, now Y 128, Cb 128, Cr 200, inverted black 255
    (tmp_path / "ycck.jpg").write_bytes(bytes(content))
    inks = np.array([128 + 1.402 * 72, 128 - 0.714 * 72, 128])
    assert np.abs(shown(tmp_path / "ycck.jpg")[:, 8, 8].numpy() - (255 - inks)).max() < 4


@pytest.mark.parametrize(
    "icc",
    [STANDARD, b"junk", WIDE[:200], DARK_GREY, ink_profile()],
    ids=["sRGB", "no profile", "cut off", "for grey", "for inks"],
)
def test_a_profile_that_is_srgb_or_cannot_be_meant_changes_nothing(icc: bytes, tmp_path: Path) -> None:
    Image.fromarray(NOISE).convert("L").save(tmp_path / "g.png", icc_profile=WIDE)
    assert np.array_equal(upright_rgb(tmp_path / "g.png")[..., 0], Image.fromarray(NOISE).convert("L"))
    Image.fromarray(NOISE).save(tmp_path / "p.png", icc_profile=icc)
    assert np.array_equal(upright_rgb(tmp_path / "p.png"), NOISE)


def test_lab_is_converted(tmp_path: Path) -> None:
    (tmp_path / "lab.tif").write_bytes(tiff(b"\x80\xb0\x30" * 16, 8, photometric=8, samples=3))  # L 50, a -80, b 48
    red, green, blue = shown(tmp_path / "lab.tif")[:, 0, 0].tolist()
    assert green > 120 and green - red > 80 and green - blue > 60


# Orientation

STORED = np.zeros((24, 40, 3), np.uint8)
STORED[:12, :20] = 255, 0, 0
STORED[:12, 20:] = 0, 255, 0
STORED[12:, :20] = 0, 0, 255
SHOWN_AS = {1: "01/23", 2: "10/32", 3: "32/10", 4: "23/01", 5: "02/13", 6: "20/31", 7: "31/20", 8: "13/02"}
"""Where the four quarters of the stored picture are shown (EXIF 2.32, 4.6.4 A)."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 95}), ("MPO", "RGB", {"quality": 95}), ("PNG", "RGB", {}), ("WEBP", "RGB", {}),
        ("AVIF", "RGB", {}), ("TIFF", "RGB", {}), ("TIFF", "RGBA", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ],
)  # fmt: skip
def test_pictures_are_shown_upright(
    kind: str, mode: str, options: dict[str, Any], orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(STORED).convert(mode).save(tmp_path / "p.png", kind, exif=exif, **options)
    pixels = shown(tmp_path / "p.png")
    assert pixels.shape == ((3, 24, 40) if orientation <= 4 else (3, 40, 24))
    height, width = pixels.shape[1:]
    centres = [pixels[:, y, x] for y in (height // 4, -height // 4) for x in (width // 4, -width // 4)]
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]
    for centre, quarter in zip(centres, SHOWN_AS[orientation].replace("/", ""), strict=True):
        assert np.abs(centre.numpy() - colours[int(quarter)]).max() < 30


@pytest.mark.parametrize("late", [False, True])
def test_a_png_is_upright_wherever_its_exif_data_stands(late: bool, tmp_path: Path) -> None:
    exif = chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    plain = png(np.zeros((16, 24), np.uint8), 8, 0, 24, 16)
    at = -12 if late else 33  # before the end, or behind the header
    (tmp_path / "p.png").write_bytes(plain[:at] + exif + plain[at:])
    assert shown(tmp_path / "p.png").shape == (3, 24, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_common_kinds_are_validated_without_being_decoded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(NOISE).save(tmp_path / "p.png", kind)
    decoded: list[object] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image))
    assert probe_visual(tmp_path / "p.png").width == 64
    assert not decoded


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_broken_exif_data_turns_nothing(exif: bytes, kind: str, tmp_path: Path) -> None:
    Image.fromarray(STORED).save(tmp_path / "p.jpg", kind, exif=exif)
    assert shown(tmp_path / "p.jpg").shape == (3, 24, 40)


# Files with several pictures


@pytest.fixture
def colours() -> list[Image.Image]:
    return [Image.new("RGB", (32, 24), colour) for colour in ("red", "lime", "blue")]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.apng"])
def test_an_animation_is_a_video_and_one_frame_of_it_a_picture(
    name: str, colours: list[Image.Image], tmp_path: Path
) -> None:
    kind = "GIF" if name == "a.gif" else "PNG"
    (tmp_path / name).write_bytes(encoded(colours[0], kind, save_all=True, append_images=colours[1:]))
    assert probe_visual(tmp_path / name).kind == "video" and probe_visual(tmp_path / name).frames == 3
    (tmp_path / name).write_bytes(encoded(colours[0], kind, save_all=True))
    assert shown(tmp_path / name)[:, 8, 8].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_an_animation_that_cannot_be_read_is_refused(kind: str, colours: list[Image.Image], tmp_path: Path) -> None:
    for name in (f"a.{kind.lower()}", "a.png"):
        (tmp_path / name).write_bytes(encoded(colours[0], kind, save_all=True, append_images=colours[1:]))
        assert code_of(tmp_path / name) == "unsupported-picture"


@pytest.mark.parametrize("kind", ["MPO", "TIFF"])
def test_of_several_pictures_the_first_trains(kind: str, colours: list[Image.Image], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(colours[0], kind, save_all=True, append_images=colours[1:]))
    assert np.abs(shown(tmp_path / "a.jpg")[:, 8, 8].numpy() - (255, 0, 0)).max() <= 2


# What is read, and what is not


def tagged(image: Image.Image, kind: str, orientation: int) -> bytes | None:
    """An encoded picture, None if Pillow does not write such pixels in this format."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    try:
        return encoded(image, kind, exif=exif)
    except (OSError, ValueError, KeyError):
        return None


@pytest.mark.slow
def test_validation_and_training_agree_on_every_kind_of_picture(tmp_path: Path) -> None:
    read, refused = 0, 0
    for kind in (*FORMATS, "PPM", "JPEG2000", "TGA"):
        for mode in MODES:
            for orientation in (1, 5):
                content = tagged(Image.new(mode, (24, 16)), kind, orientation)
                if content is None:
                    break
                (tmp_path / "p.png").write_bytes(content)
                try:
                    facts = probe_picture(tmp_path / "p.png")
                except ProbeError as error:
                    with pytest.raises(
                        Exception, match=re.escape(str(error).removeprefix("the picture cannot be read: "))
                    ):
                        upright_rgb(tmp_path / "p.png")
                    refused += 1
                else:
                    pixels = upright_rgb(tmp_path / "p.png")
                    assert pixels.shape == (facts.height, facts.width, 3) and pixels.dtype == np.uint8
                    read += 1
    assert read > 100 and refused > 10


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in FORMATS] + [("TIFF", {"compression": c}) for c in ("tiff_lzw", "jpeg", "packbits", "lzma")],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value,
)
def test_a_picture_that_is_cut_off_never_reaches_training(kind: str, options: dict[str, str], tmp_path: Path) -> None:
    content = encoded(Image.fromarray(NOISE), kind, **options)
    for share in (0.1, 0.2, 0.5, 0.8, 0.95, 0.98):
        (tmp_path / "p.png").write_bytes(content[: int(len(content) * share)])
        found = code_of(tmp_path / "p.png")
        # In its headers a file can be cut so that nothing tells what it was.
        assert found == "truncated-media" or (share != 0.5 and found is not None)
        with pytest.raises(MetadataError, match=r"p\.png"):
            read_image(tmp_path / "p.png", 16, 16)


FOREIGN: Sequence[tuple[str, bytes]] = (
    ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
    ("JPEG XL", b"\xff\x0a" + bytes(30)),
    ("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(30)),
    ("Photoshop", b"8BPS\0\x01" + bytes(30)),
    ("OpenEXR", b"\x76\x2f\x31\x01\x02" + bytes(30)),
    ("Radiance HDR", b"#?RADIANCE\n"),
    ("PNM", encoded(Image.new("RGB", (4, 4)), "PPM")),
    ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
)


@pytest.mark.parametrize("suffix", [".png", ".heic"])
@pytest.mark.parametrize(("name", "content"), FOREIGN, ids=[name for name, _ in FOREIGN])
def test_pictures_of_other_kinds_are_named_and_refused(name: str, content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(ProbeError, match=name) as error:
        probe_visual(path)
    assert error.value.code == "unsupported-picture"
    with pytest.raises(MetadataError, match=name):
        read_image(path, 8, 8)


def test_pillow_opens_files_in_one_place() -> None:
    """There it is told what it may read: anything else could reach the programs that its plugins start."""
    callers = {
        file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if "Image.open(" in file.read_text()
    }
    assert callers == set()


def huge(width: int, height: int) -> bytes:
    return png(np.zeros((1, 1), np.uint8), 1, 0, width, height)


def test_a_huge_picture_is_taken_or_refused_without_a_word_beside(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "phone.png").write_bytes(huge(16320, 12240))
    (tmp_path / "map.png").write_bytes(huge(40000, 20000))
    assert code_of(tmp_path / "phone.png") is None
    with pytest.raises(ProbeError, match="40000x20000 is more than 268 million pixels"):
        probe_visual(tmp_path / "map.png")
    with pytest.raises(MetadataError, match="268 million"):
        read_image(tmp_path / "map.png", 8, 8)
    assert not recwarn.list and capfd.readouterr().err == ""
