"""Videos of the validation rows: one each, whatever becomes of the others, and nothing of the training touched."""

import errno
import gc
import json
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import av
import pytest
import torch
from live_models import LiveModel
from torch import Tensor, nn
from trainer_parts import Parts, loaded

from vfun_cli.encoding.cache import Cache
from vfun_cli.families import adapter_of
from vfun_cli.modeling.adapter import SampleRequest, VideoRequest
from vfun_cli.modeling.media import writing
from vfun_cli.modeling.media.animation import GIF_SIDE, animation
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.plan.samples import SampleSettings
from vfun_cli.run.rundir import RunDir
from vfun_cli.sampling import films
from vfun_cli.sampling.films import Film, write_film
from vfun_cli.sampling.schedules import make_schedule
from vfun_cli.training import looking
from vfun_cli.training.data import loader
from vfun_cli.training.looking import Stopped, asking, heeding, patiently
from vfun_cli.training.sampled_rows import RowReader, rows_to_sample
from vfun_cli.training.samples import Samples
from vfun_cli.training.signals import CONTINUE, PREEMPTED
from vfun_cli.training.trackers import TensorBoard
from vfun_cli.training.validation import Validation, samples_look

pytestmark = pytest.mark.slow

LIVE = Callable[[str], LiveModel]
STEPS = 2
SETTINGS = SampleSettings(steps=STEPS, guidance=4.0, negative_prompt="nothing")
PASSES = 2 * STEPS
"""Of a video, with guidance."""
CPU = torch.device("cpu")


class Look:
    """A trainer over a live model, and the samples that are made beside it."""

    def __init__(
        self, live: LiveModel, folder: Path, rows: Sequence[SampleRequest], *, cache: Cache | None = None,
        in_step: bool = False, dates: Sequence[int] = (), first_step: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        folder.mkdir(exist_ok=True)
        self.live, self.run, self.passes = live, RunDir(folder), 0
        self.pixels: dict[int, list[Tensor]] = defaultdict(list)
        """Of the videos of each row; what x264 makes of them may differ."""
        model = live.transformer()
        model.register_forward_pre_hook(self._count)
        self.adapter: Any = adapter_of(live.spec).from_pretrained(live.adapter.options)
        self.adapter.pixels = partial(self._noted, self.adapter.pixels)
        self.parts = Parts(
            folder,
            model,
            live,
            self.adapter,
            live.objective,
            cache=cache,
            first_step=first_step,
            learning_rate=1e-3,
            **options,
        )
        self.samples = Samples(
            accelerator=self.parts.accelerator,
            adapter=self.adapter,
            state=self.parts.trainer.state,
            schedule=partial(make_schedule, live.spec, live.folder, STEPS),
            dtype=torch.float32,
            rows=rows_to_sample(SETTINGS, live.spec, rows),
            reader=RowReader(adapter=self.adapter, cache=cache, stop=self.parts.stop, clips=self.run.sampled_clips),
            in_step=in_step,
        )
        look = samples_look(self.samples, self.parts.trainer.metrics, self.run, first_step)
        self.parts.trainer.validation = Validation(iter(dates), [look])

    def _noted(self, pixels: Callable[..., Tensor], latents: Tensor, branches: Any, request: VideoRequest) -> Tensor:
        found = pixels(latents, branches, request)
        self.pixels[request.key.row].append(found)
        return found

    def _count(self, *given: Any) -> None:
        self.passes += not torch.is_grad_enabled()

    def train(self, steps: int, first_step: int = 0) -> int:
        request, sample = self.live.cached(8, 64, 64)
        self.parts.trainer.total_steps = steps
        return self.parts.trainer.train(
            iter(loaded(step, [request], [sample]) for step in range(first_step, steps)), first_step
        )

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.parts.lines()]

    def records(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.parts.metrics_file.read_text().splitlines()]
        return [line for line in lines if line.get("event") == "samples"]


def row(live: LiveModel, number: int, **changed: Any) -> SampleRequest:
    request = live.request(number, 8, 64, 64)
    return replace(request, key=SampleKey(seed=1, epoch=0, row=number, drops=False), **changed)


def without(request: SampleRequest, field: str) -> SampleRequest:
    return replace(request, record={**request.record, field: "/gone/away.mp4"})


def said(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_row_becomes_a_video_with_its_sound_beside_its_own_clip(live_model: LIVE, tmp_path: Path) -> None:
    live = live_model("wan-s2v")
    look = Look(live, tmp_path, [row(live, 3)])
    made = look.samples.make(look.run.samples(5))
    assert made.videos == [look.run.samples(5) / "row-3.mp4"] and made.failed == {}
    about = said(look.run.samples(5), "row-3")
    assert (about["prompt"], about["row"], about["steps"], about["weights"], about["guidance"]) == (
        "a red circle moves", 3, STEPS, "trained", 4.0,
    )  # fmt: skip
    assert about["audio"].endswith("wav/00000001.wav") and about["negative_prompt"] == "nothing"
    for file in (made.videos[0], look.run.sampled_clips / "row-3.mp4"):
        with av.open(str(file)) as container:
            assert [stream.type for stream in container.streams] == ["video", "audio"]
    assert look.passes == PASSES


def test_a_picture_becomes_a_picture(live_model: LIVE, tmp_path: Path) -> None:
    live = live_model("cogvideox-fun")
    look = Look(live, tmp_path, [picture(live, tmp_path)])
    made = look.samples.make(look.run.samples(0))
    assert [path.name for path in made.videos] == ["row-0.png"]
    assert names(look.run.sampled_clips) == ["row-0.json", "row-0.png"]


def picture(live: LiveModel, folder: Path) -> SampleRequest:
    films.write_png(folder / "one.png", torch.rand(3, 80, 80))
    record = {"file_path": str(folder / "one.png"), "text": "a square", "type": "image"}
    return row(live, 0, record=record, kind="image", frames=1, total_frames=1)


@pytest.mark.parametrize("in_step", [False, True])
def test_rows_that_cannot_be_made_say_why_and_the_others_are_what_they_are_alone(
    in_step: bool, live_model: LIVE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_model("wan-s2v")
    alone = Look(live, tmp_path / "alone", [row(live, 1)])
    alone.samples.make(alone.run.samples(0))
    look = Look(live, tmp_path / "all", [without(row(live, 0), "control_file_path"), row(live, 1), row(live, 2)])
    look.samples.in_step = in_step
    folder, pixels = look.run.samples(0), look.adapter.pixels
    write_film(Film(pixels=torch.zeros(2, 3, 64, 64), fps=Fraction(8), heard_from=Fraction(0)), folder / "row-0", {})

    def without_memory_for_row_2(latents: Tensor, branches: Any, request: Any) -> Tensor:
        if request.key.row == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return pixels(latents, branches, request)

    monkeypatch.setattr(look.adapter, "pixels", without_memory_for_row_2)
    made = look.samples.make(folder)
    assert [path.name for path in made.videos] == ["row-1.mp4"]
    assert list(made.failed) == ["row-0", "row-2"] and "/gone/away.mp4" in made.failed["row-0"]
    assert made.failed["row-2"] == "CUDA out of memory. Tried to allocate 2 GiB"
    assert names(folder) == ["row-0.json", "row-1.json", "row-1.mp4", "row-2.json"], "no video of an earlier attempt"
    for name, reason in made.failed.items():
        assert said(folder, name)["error"] == reason and said(folder, name)["weights"] == "trained"
    assert list(look.pixels) == [1] and torch.equal(look.pixels[1][0], alone.pixels[1][0])
    assert look.passes == 2 * PASSES


def test_a_row_that_fails_before_a_step_makes_the_passes_of_the_ranks_and_after_one_it_ends_them(
    live_model: LIVE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_model("wan-s2v")
    look = Look(live, tmp_path, [row(live, 0)], in_step=True)
    begin = look.adapter.begin
    monkeypatch.setattr(look.adapter, "begin", fail)
    made = look.samples.make(look.run.samples(0))
    assert made.failed == {"row-0": "it is broken"} and look.passes == PASSES
    monkeypatch.setattr(look.adapter, "begin", begin)
    model = look.parts.trainer.state.model
    forward, passes = model.forward, iter([fail])
    monkeypatch.setattr(model, "forward", lambda *given, **named: next(passes, forward)(*given, **named))
    with pytest.raises(ValueError, match="broken"):
        look.samples.make(look.run.samples(0))
    assert model.training
    look.samples.in_step, passes = False, iter([fail])
    assert look.samples.make(look.run.samples(0)).failed == {"row-0": "it is broken"}


def fail(*given: Any, **named: Any) -> Any:
    raise ValueError("it is broken.")


def test_a_full_disk_costs_the_videos_and_leaves_no_half_of_one(
    live_model: LIVE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_model("wan-s2v")
    look = Look(live, tmp_path, [row(live, 0)], dates=[0])

    def half(path: Path, *given: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(films, "write_video", half)
    monkeypatch.setattr(films, "write_atomically", half)
    assert look.train(0) == CONTINUE
    [failed] = [record["failed"] for record in look.records()]
    assert list(failed) == ["row-0"] and "No space left on device" in failed["row-0"]
    assert not list(look.run.samples_folder.rglob("*.mp4"))


def test_media_may_go_when_the_first_samples_are_made(live_model: LIVE, tmp_path: Path) -> None:
    live = live_model("wan-s2v")
    request, media = row(live, 0), tmp_path / "media"
    media.mkdir()
    for field in ("file_path", "control_file_path", "audio_path"):
        copy = media / Path(request.record[field]).with_stem(field).name
        copy.write_bytes(Path(request.record[field]).read_bytes())
        request = replace(request, record={**request.record, field: str(copy)})
    look = Look(live, tmp_path, [request])
    look.samples.make(look.run.samples(0))
    for path in media.iterdir():
        path.unlink()
    assert look.samples.make(look.run.samples(1)).videos == [look.run.samples(1) / "row-0.mp4"]
    assert torch.equal(*look.pixels[0])


def test_the_losses_of_the_training_are_the_same_with_and_without_samples(live_model: LIVE, tmp_path: Path) -> None:
    live = live_model("wan-s2v")
    looks = {
        name: Look(live, tmp_path / name, [row(live, 0)], dates=dates, use_ema=True)
        for name, dates in (("without", []), ("with", [0, 1, 2]))
    }
    for look in looks.values():
        assert look.train(2) == CONTINUE
    assert looks["with"].losses() == looks["without"].losses() and len(looks["with"].losses()) == 2
    look = looks["with"]
    assert [(record["step"], record["made"], record["failed"]) for record in look.records()] == [
        (0, 2, {}), (1, 2, {}), (2, 2, {}),
    ]  # fmt: skip
    before, before_ema, *_, trained, average = look.pixels[0]
    assert torch.equal(before, before_ema)
    assert not torch.equal(before, trained) and not torch.equal(trained, average)
    assert said(look.run.samples(2), "row-0-ema")["weights"] == "ema"
    assert look.adapter.encoders.loaded == {}, "no encoder stays that the training does not need"


@pytest.mark.parametrize("asked_at", [0, 2, 6])
def test_a_wish_to_stop_is_heard_within_a_step_and_the_continuation_makes_all_once(
    asked_at: int, live_model: LIVE, tmp_path: Path
) -> None:
    live = live_model("wan-s2v")
    rows = [row(live, 0), row(live, 1)]
    look = Look(live, tmp_path, rows, dates=[0])
    look.parts.stop.reason = lambda: PREEMPTED if look.passes >= asked_at else CONTINUE
    assert look.train(0) == PREEMPTED
    assert look.passes == asked_at and look.records() == []
    assert look.parts.saves.steps == [0] and look.parts.trainer.state.model.training
    for passes in (2 * PASSES, 0):
        again = Look(live, tmp_path, rows, dates=[0])
        assert again.train(0) == CONTINUE
        assert [(record["step"], record["made"]) for record in again.records()] == [(0, 2)]
        assert again.passes == passes, "what is recorded is not made again"
    assert names(look.run.samples(0)) == ["row-0.json", "row-0.mp4", "row-1.json", "row-1.mp4"]


def test_a_wish_to_stop_is_heard_between_the_parts_of_what_comes_before_and_after_the_steps(
    live_model: LIVE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "ASKED_EVERY", 0)
    live = live_model("wan-s2v")
    look = Look(live, tmp_path, [row(live, 0)])
    [given] = look.samples.rows
    look.samples.rows = [replace(given, request=replace(given.request, start_from_ref=True))]
    look.samples.make(look.run.samples(0))
    look.samples.mine = None
    done = parts_done(look, monkeypatch)
    for moment in ("a row is encoded", "history is encoded", "frames are decoded", "a file is written"):
        done.clear()
        monkeypatch.setattr(
            look.parts.stop, "reason", lambda moment=moment: PREEMPTED if done[moment] > 1 else CONTINUE
        )
        with pytest.raises(Stopped):
            look.samples.make(look.run.samples(1))
        assert done[moment] == 2
        assert not look.run.samples(1).exists() or names(look.run.samples(1)) == [], "no half a video"
    monkeypatch.setattr(look.parts.stop, "reason", lambda: CONTINUE)
    assert look.samples.make(look.run.samples(1)).failed == {}
    assert torch.equal(look.pixels[0][-1], look.pixels[0][0])


def parts_done(look: Look, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the convolutions of the VAE's networks, and the pictures of a file."""
    done, vae, branches = defaultdict[str, int](int), look.adapter.encoders["vae"], look.adapter.branches
    encodes, picture_bytes = ["a row is encoded"], writing._picture_bytes

    def counted(work: Callable[..., Any], moment: Callable[[], str]) -> Callable[..., Any]:
        def count(*given: Any) -> Any:
            found = work(*given)
            done[moment()] += 1
            return found

        return count

    def in_branches(*given: Any) -> Any:
        encodes.append("history is encoded")
        try:
            return branches(*given)
        finally:
            encodes.pop()

    monkeypatch.setattr(look.adapter, "branches", in_branches)
    monkeypatch.setattr(writing, "_picture_bytes", counted(picture_bytes, lambda: "a file is written"))
    for network, moment in (
        (vae.model.encoder, lambda: encodes[-1]),
        (vae.model.decoder, lambda: "frames are decoded"),
    ):
        for module in network.modules():
            if isinstance(module, nn.Conv3d):
                module.register_forward_hook(counted(lambda *given: None, moment))
    return done


def test_with_a_full_cache_only_the_vae_is_loaded_and_it_goes_again(live_model: LIVE, tmp_path: Path) -> None:
    live = live_model("wan-s2v")
    cache = Cache.for_encoders(tmp_path / "cache", live.adapter.encoders)
    filling = Look(live, tmp_path / "fills", [row(live, 0)], cache=cache)
    with filling.adapter.encoders.for_now():
        filling.samples.make(filling.run.samples(0))
        assert set(filling.adapter.encoders.loaded) == {"vae", "text", "speech"}
    look = Look(live, tmp_path / "reads", [row(live, 0)], cache=cache)
    with look.adapter.encoders.for_now():
        look.samples.make(look.run.samples(0))
        assert set(look.adapter.encoders.loaded) == {"vae"}
    assert look.adapter.encoders.loaded == {} and torch.equal(look.pixels[0][0], filling.pixels[0][0])


def test_what_hangs_is_given_up_and_a_wish_to_stop_is_heard_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PATIENCE", 0.01)
    monkeypatch.setattr(looking.loader, "LOAD_TIMEOUT", 0.05)
    never = Event()
    quiet: Any = type("Quiet", (), {"reason": staticmethod(lambda: CONTINUE)})
    ask = asking(quiet, CPU)
    assert heeding(quiet, lambda: patiently(ask, lambda: 3)) == 3
    assert heeding(quiet, lambda: patiently(ask, never.wait)) is None
    with pytest.raises(ValueError, match="broken"):
        heeding(quiet, lambda: patiently(ask, fail))
    monkeypatch.setattr(looking.loader, "LOAD_TIMEOUT", 100)
    asked = iter([CONTINUE, CONTINUE, PREEMPTED])
    wishes: Any = type("Wishes", (), {"reason": staticmethod(lambda: next(asked))})
    with pytest.raises(Stopped):
        heeding(wishes, lambda: patiently(asking(wishes, CPU), never.wait))
    never.set()


def test_what_work_held_goes_with_its_failure() -> None:
    held: list[Any] = []

    def work() -> None:
        large = torch.ones(3)
        held.append(weakref.ref(large))
        raise ValueError

    gc.disable()
    try:
        with pytest.raises(ValueError):
            heeding(SimpleNamespace(reason=lambda: CONTINUE), work)  # type: ignore[arg-type]
        assert held[0]() is None
    finally:
        gc.enable()


def test_tensorboard_holds_the_videos_and_pictures(tmp_path: Path, live_model: LIVE) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, wide = RunDir(tmp_path), torch.rand(4, 3, 120, 2 * GIF_SIDE)
    files = [
        write_film(Film(pixels=pixels, fps=Fraction(8), heard_from=Fraction(0)), tmp_path / name, {})
        for name, pixels in (("row-0", wide), ("row-1", wide[:1]))
    ]
    board: Any = TensorBoard(run, live_model("cogvideox-fun").config)
    board.log_videos(files, 7)
    board.close()
    found = EventAccumulator(str(run.tensorboard()))
    found.Reload()
    assert sorted(found.Tags()["images"]) == ["samples/row-0", "samples/row-1"]
    (video,), (still,) = (found.Images(f"samples/row-{number}") for number in (0, 1))
    assert (video.step, video.width, video.height) == (7, GIF_SIDE, 60)
    assert video.encoded_image_string[:6] == b"GIF89a" and animation(files[0])[2] == video.encoded_image_string
    assert still.encoded_image_string == files[1].read_bytes() and still.width == 2 * GIF_SIDE
