"""Codes that need a special file or a special user: permissions, raw streams, crashes, rotation, old caches."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from small_media import ROW, encode_video, write_sound

from tests.coded_clips import MATRIX, encode, turn
from vfun_cli.metadata import decoder
from vfun_cli.metadata.checks import Report
from vfun_cli.metadata.deep import decode_many
from vfun_cli.metadata.facts import AudioFacts, Failure, VisualFacts, decode_facts, encode_facts
from vfun_cli.metadata.probe import probe_many, probe_visual
from vfun_cli.metadata.remembered import FACTS_VERSION


def codes(report: Report) -> list[str]:
    return [problem.code for problem in report.problems]


def test_a_file_that_may_not_be_read_is_unreadable(data: Path, check: Callable[..., Report]) -> None:
    (data / "train/loop.mp4").symlink_to("loop.mp4")
    report = check([{**ROW, "file_path": "train/loop.mp4"}])
    assert codes(report) == ["unreadable-file"]
    assert "symbolic links" in report.problems[0].message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["file_path", "audio_path"])
def test_a_file_without_read_permission_is_unreadable(name: str, data: Path, check: Callable[..., Report]) -> None:
    (data / ROW[name]).chmod(0)
    report = check([ROW])
    assert codes(report) == ["unreadable-file"] and report.problems[0].message == "permission denied"


def raw_stream(path: Path, source: Path) -> Path:
    """The H.264 of a file without a container: nothing tells when a frame is shown."""
    with av.open(str(source)) as container, av.open(str(path), "w", format="h264") as out:
        stream = out.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return path


def test_a_raw_stream_has_no_frame_rate(data: Path, check: Callable[..., Report]) -> None:
    raw_stream(data / "train/raw.h264", data / "train/1.mp4")
    assert codes(check([{**ROW, "file_path": "train/raw.h264"}])) == ["unknown-frame-rate"]


def test_frames_that_an_edit_list_hides_do_not_count(data: Path, check: Callable[..., Report]) -> None:
    video = data / "train/1.mp4"
    content = bytearray(video.read_bytes())
    entry = content.find(b"elst") + 12  # how long the file asks to be shown (ISO/IEC 14496-12, 8.6.6)
    length = int.from_bytes(content[entry : entry + 4], "big")
    content[entry : entry + 4] = (length // 2).to_bytes(4, "big")
    video.write_bytes(bytes(content))
    report = check([{**ROW, "control_file_path": "train/1.mp4"}], deep=True)
    assert report.clips[0].frames == 12
    assert not {"fewer-frames", "decode-error"} & set(codes(report))


def test_the_sound_of_a_trimmed_video_need_only_last_as_long_as_what_is_shown(
    data: Path, check: Callable[..., Report]
) -> None:
    """48 pictures, 20 of them hidden by an edit list: 28 at 25 a second are 1.12 s."""
    trimmed = next(clip for clip in MATRIX if clip.name == "trim.mov")
    encode(trimmed, data / "train")
    write_sound(data / "wav/short.wav", seconds=1.12)
    report = check([{**ROW, "file_path": "train/trim.mov", "audio_path": "wav/short.wav", "control_file_path": None}])
    assert report.clips[0].frames == 28 and not report.errors


def test_deep_counts_packets_of_which_no_picture_comes(data: Path, check: Callable[..., Report]) -> None:
    """The last picture of VP9 without its bit ``show_frame`` (specification, 6.2): it decodes, and stays unseen."""
    video = data / "train/1.mp4"
    with av.open(str(data / "control/1.mp4")) as source, av.open(str(video), "w") as out:
        stream = out.add_stream("libvpx-vp9", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        packets = [packet for frame in source.decode(video=0) for packet in stream.encode(frame)] + stream.encode()
        out.mux(packets)
        last = bytes(packets[-1])
    before, _, behind = video.read_bytes().rpartition(last)
    video.write_bytes(before + bytes([last[0] & 0b1111_1101]) + last[1:] + behind)
    report = check([ROW], deep=True)
    assert "fewer-frames" in codes(report)
    assert "decoded 23" in next(p.message for p in report.problems if p.code == "fewer-frames")


@pytest.mark.parametrize("name", [b"CRAW", b"BRAW", b"xxxx"])
def test_a_codec_that_nothing_decodes_is_refused_with_the_conversion(
    name: bytes, data: Path, check: Callable[..., Report]
) -> None:
    video = data / "train/1.mp4"
    video.write_bytes(video.read_bytes().replace(b"avc1", name))
    report = check([ROW])
    assert codes(report) == ["unsupported-codec"]
    assert name.decode() in report.problems[0].message and "ffmpeg -i" in report.problems[0].message


def test_a_decoder_that_dies_is_reported_and_the_next_file_decoded(data: Path, monkeypatch: Any) -> None:
    """The first decoding process is killed as soon as it is there, as a segmentation fault would end it."""
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def start_and_kill_the_first(*args: Any, **kwargs: Any) -> Any:
        started.append(start(*args, **kwargs))
        if len(started) == 1:
            started[0].send_signal(signal.SIGSEGV)
            started[0].wait()
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start_and_kill_the_first)
    paths = [str(data / "train/1.mp4"), str(data / "control/1.mp4")]
    found = decode_many([(path, "visual") for path in paths], threads=1)
    dead, alive = (found[path, "visual"] for path in paths)
    assert isinstance(dead, Failure) and dead.code == "decode-crash" and "-11" in dead.message
    assert not isinstance(alive, Failure) and alive.frames == 24
    assert len(started) == 2


def test_the_decoder_answers_a_line_for_a_line(data: Path) -> None:
    lines = f'["{data}/train/1.mp4", "visual"]\n["{data}/wav/1.wav", "audio"]\n["{data}/nothing.mp4", "visual"]\n'
    done = subprocess.run([sys.executable, "-m", decoder.__name__], input=lines, capture_output=True, text=True)
    ready, video, sound, nothing = done.stdout.split("\n")[:4]
    assert (ready, video, sound) == ("", "24", "16000")
    assert nothing.startswith("decode-error|")


def test_a_turned_film_has_the_size_it_is_shown_in(tmp_path: Path) -> None:
    turn(encode_video(tmp_path / "1.mp4", width=64, height=48), 90)
    facts = probe_visual(tmp_path / "1.mp4")
    assert (facts.width, facts.height) == (48, 64)
    with av.open(str(tmp_path / "1.mp4")) as container:
        frame = next(container.decode(video=0))
    assert frame.rotation % 180 == 90 and (frame.width, frame.height) == (64, 48)


def test_what_a_cache_holds_reads_back_and_keeps_its_form() -> None:
    """When the texts below have to change, FACTS_VERSION has to be raised too: older caches read differently."""
    visual = VisualFacts(
        kind="video", width=640, height=360, frames=99, fps=Fraction(30000, 1001), variable=False,
        square=True, truncated=False, codec="h264",
    )  # fmt: skip
    sound = AudioFacts(
        rate=16000, channels=1, duration=Fraction(3), offset=Fraction(1, 5), silent=True, truncated=False, codec="aac"
    )
    failure = Failure(code="unreadable-media", message="a | b")
    texts = {
        "VisualFacts|video|640|360|99|30000/1001|False|True|False|False|h264": visual,
        "AudioFacts|16000|1|3|1/5|True|False|aac": sound,
        "Failure|unreadable-media|a | b": failure,
    }
    assert FACTS_VERSION == 5
    for text, facts in texts.items():
        assert encode_facts(facts) == text
        assert decode_facts(text) == facts


def test_a_file_with_the_old_size_and_time_is_read_again(tmp_path: Path) -> None:
    path, cache = encode_video(tmp_path / "1.mp4"), tmp_path / "cache.sqlite"
    key, status = (str(path), "visual"), path.stat()
    probe_many([key], cache=cache)
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert isinstance(probe_many([key], cache=cache)[key], Failure)


def test_a_path_that_is_no_utf8_is_remembered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, cache = (str(encode_video(tmp_path / os.fsdecode(b"\xff.mp4"))), "visual"), tmp_path / "cache.sqlite"
    before = probe_many([key], cache=cache)
    monkeypatch.setattr(av, "open", None)
    assert probe_many([key], cache=cache) == before


def test_facts_that_do_not_read_back_are_not_believed(tmp_path: Path) -> None:
    path, cache = str(encode_video(tmp_path / "1.mp4")), tmp_path / "cache.sqlite"
    (before,) = probe_many([(path, "visual")], cache=cache).values()
    with closing(sqlite3.connect(cache)) as database, database:
        database.execute("UPDATE facts SET facts = 'VisualFacts|video'")
    assert probe_many([(path, "visual")], cache=cache) == {(path, "visual"): before}


def test_facts_of_another_version_are_not_believed(tmp_path: Path) -> None:
    path, cache = str(encode_video(tmp_path / "1.mp4")), tmp_path / "cache.sqlite"
    (before,) = probe_many([(path, "visual")], cache=cache).values()
    with closing(sqlite3.connect(cache)) as database, database:
        database.execute("UPDATE facts SET facts = 'VisualFacts|video|1|1|1|1|0|1|1|0|h264'")
        database.execute(f"PRAGMA user_version = {FACTS_VERSION - 1}")
    assert probe_many([(path, "visual")], cache=cache) == {(path, "visual"): before}
