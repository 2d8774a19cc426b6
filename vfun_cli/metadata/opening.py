"""The one way to a media file: regular, by its absolute path, and of a kind that holds all its contents itself."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfun_cli.files import NotRegular, regular_status
from vfun_cli.metadata.facts import ProbeError

if TYPE_CHECKING:
    import av

CONTAINERS = (
    "mov", "matroska", "avi", "asf", "flv", "live_flv", "kux", "ogg", "mpeg", "mpegts", "mxf", "gxf", "nut", "nuv",
    "wtv", "ty", "rm", "nsv", "dv", "dhav", "ivf", "swf", "flic", "yuv4mpegpipe", "gif", "apng", "jpegxl_anim",
    # raw streams of pictures
    "mpegvideo", "m4v", "h261", "h263", "h264", "hevc", "vvc", "av1", "obu", "vc1", "vc1test", "dirac", "dnxhd",
    "cavsvideo", "avs2", "avs3", "evc", "apv", "mjpeg", "mjpeg_2000",
    # sound
    "wav", "w64", "aiff", "au", "caf", "voc", "iff", "dsf", "flac", "mp3", "aac", "loas", "ac3", "ac4", "eac3", "dts",
    "dtshd", "truehd", "mlp", "ape", "wv", "tta", "tak", "mpc", "mpc8", "shn", "oma", "amr", "amrnb", "amrwb", "gsm",
    "qcp", "nistsphere", "sox", "ircam",
    # one picture: opened to see that it is one, and then read as one
    "jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "gif_pipe", "jpegxl_pipe", "j2k_pipe", "psd_pipe",
    "exr_pipe", "hdr_pipe", "pbm_pipe", "pgm_pipe", "ppm_pipe", "pam_pipe", "pfm_pipe",
)  # fmt: skip
"""FFmpeg's names of what is opened. All other kinds are refused, also as a part of these: playlists and lists (hls,
dash, concat, imf), descriptions of streams (sdp), numbered pictures and SVG may name files and addresses to open."""

CONFINED = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}


def absolute(path: str | Path) -> str:
    """Absolute and without dots, but links kept: data sets are full of links, and their names are what people know.

    To FFmpeg ``http:/127.0.0.1/1.wav`` is an address, and ``/data/http:/127.0.0.1/1.wav`` a file.
    """
    return os.path.abspath(path)  # noqa: PTH100 - resolve() follows links


def open_media(
    path: str | Path,
    *,
    kind: str | None = None,
    options: Mapping[str, str] | None = None,
    timeout: Any = None,
) -> "av.container.InputContainer":
    """A file of one of CONTAINERS, opened with PyAV; of no other kind than ``kind``, if it is given.

    Raises:
        ProbeError: it is no regular file, or of another kind.
        av.FFmpegError: it cannot be read.
    """
    import av

    try:
        regular_status(path)
        return av.open(absolute(path), format=kind, options={**CONFINED, **(options or {})}, timeout=timeout)
    except NotRegular as error:
        raise ProbeError("not-a-file", str(error.strerror)) from None
    except av.ArgumentError:  # what FFmpeg says of a kind that is not in its list, too
        raise ProbeError(
            "unreadable-media",
            "not a kind of media that is opened (playlists and others that name further files never are), "
            "or its header is wrong",
        ) from None
