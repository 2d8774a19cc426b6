"""Files and paths that would make a decoder open further files, reach an address or wait for ever."""

import os
import re
import socket
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import pytest
from small_media import ROW, encode_video

import vfun_cli
from tests.hostile_media import PLAYLISTS, SDP, accepted
from vfun_cli.config.datasets import parse_data_sets
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import MetadataError
from vfun_cli.families.wan_s2v import SPEC
from vfun_cli.metadata import decoder
from vfun_cli.metadata.checks import Report
from vfun_cli.modeling.media.frames import read_frames
from vfun_cli.modeling.media.sound import read_audio
from vfun_cli.training.data.stream import row_reader


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Nobody is to connect to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("name", PLAYLISTS)
def test_files_that_name_other_files_or_addresses_are_never_followed(
    name: str, tmp_path: Path, listener: socket.socket
) -> None:
    port = listener.getsockname()[1]
    encode_video(tmp_path / "whole.ts")
    for target in ("whole.ts", str(tmp_path / "whole.ts"), f"http://127.0.0.1:{port}/1.ts"):
        (tmp_path / name).write_text(PLAYLISTS[name].format(target))
        assert accepted(tmp_path / name) == []


def test_a_description_of_a_stream_opens_no_port(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "stream.mp4").write_text(SDP.format(port))
    assert accepted(tmp_path / "stream.mp4") == []


def test_paths_of_rows_are_files_whatever_they_look_like(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a data root of ".", the reader of training saw an address where validation had seen a file."""
    monkeypatch.chdir(tmp_path)
    address = f"http:/127.0.0.1:{listener.getsockname()[1]}/1.mp4"
    film = encode_video(tmp_path / "1.mp4").read_bytes()
    for path in (address, "subfile,,start,0,end,0,,:1.mp4", "concat:1.mp4|1.mp4", "file:2.mp4", "pipe:0", "a%d.mp4"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(film)
        (tmp_path / "m.json").write_text(f'[{{"file_path": "{path}", "text": "", "type": "video"}}]')
        config = RunConfig(train_data_meta=parse_data_sets("m.json", "meta"), train_data_dir=Path())
        read = row_reader(config, SPEC)(0).record["file_path"]
        assert read == str(tmp_path / path)
        for each in (read, path):
            assert read_frames(each, [0, 1], 32, 32).shape == (2, 3, 32, 32)
            assert decoder.decode_visual(each) == "24"


def test_media_are_opened_for_reading_in_one_place() -> None:
    package = Path(vfun_cli.__file__).parent
    opening = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r'av\.open\((?!str\(\w+\), "w")', path.read_text(encoding="utf-8"))
    }
    assert opening == {"metadata/opening.py"}


@pytest.mark.parametrize("name", ["pipe.mp4", "pipe.mkv", "pipe.wav", "pipe.png"])
def test_a_pipe_is_never_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / f"device{Path(name).suffix}").symlink_to("/dev/zero")
    for path in (tmp_path / name, tmp_path / f"device{Path(name).suffix}"):
        assert accepted(path) == []
        with pytest.raises(MetadataError, match="not a regular file"):
            read_audio(path, Fraction(0), Fraction(1))


def test_numbers_in_headers_ask_for_no_more_memory_or_time_than_the_file_is_worth(data: Path) -> None:
    box = (1).to_bytes(4, "big")
    (data / "a.mp4").write_bytes(box + b"moov" + (2**62).to_bytes(8, "big") + bytes(200))
    (data / "b.mp4").write_bytes(box + b"free" + (2**64 - 1).to_bytes(8, "big") + bytes(200))
    (data / "c.wav").write_bytes(b"RIFF\xff\xff\xff\xffWAVE" + b"abcd\0\0\0\0" * 20_000)
    for name in ("a.mp4", "b.mp4", "c.wav"):
        assert accepted(data / name) == []


def test_what_the_disk_says_in_the_midst_of_reading_is_said_of_the_file(
    check: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("vfun_cli.metadata.wav.regular_status", fail)
    monkeypatch.setattr(av, "open", fail)
    said = {(problem.field, problem.message) for problem in check([ROW]).errors}
    assert {field for field, message in said if "Input/output error" in message} >= {"file_path", "audio_path"}
