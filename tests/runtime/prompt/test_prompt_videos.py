"""Videos from files, and what is wrong with them or with asking for them, in one line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lvlm
from lvlm.core.errors import (
    CapacityError,
    ImageError,
    LvlmError,
    ParameterError,
    PromptError,
)
from lvlm.runtime.media.video import Video, open_video
from lvlm.runtime.processors.parts.frames import MAX_FRAMES
from lvlm.runtime.run_cli import main

SMOL = "smolvlm:gqa-tiles"


@pytest.fixture(scope="session")
def av() -> Any:
    return pytest.importorskip("av", reason="PyAV (extra video) is not installed")


@pytest.fixture(scope="session")
def file(av: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames of 64 x 48, five a second, each one lighter than the one before."""
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    path.write_bytes(written(av, range(10)))
    return path


def written(av: Any, frames: Sequence[int], container: str = "mp4") -> bytes:
    data = io.BytesIO()
    with av.open(data, "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in frames:
            frame = np.full((48, 64, 3), 20 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return data.getvalue()


def test_a_files_frames(file: Path) -> None:
    for source in (file, str(file), file.read_bytes()):
        video = open_video(source)
        assert (video.frames, video.fps, video.seconds) == (10, 5.0, 2.0)
        assert (video.height, video.width) == (48, 64)
        found = list(video.read([0, 3, 9]))
        assert [frame.shape for frame in found] == [(48, 64, 3)] * 3
        for frame, light in zip(found, (0, 60, 180), strict=True):
            assert abs(frame.mean() - light) < 6


def test_frames_are_those_of_transformers(file: Path) -> None:
    from transformers.video_utils import read_video_pyav

    wanted = [1, 4, 8]
    theirs, about = read_video_pyav(str(file), lambda **_: wanted)
    video = open_video(file)
    np.testing.assert_array_equal(np.stack(list(video.read(wanted))), theirs)
    assert (video.frames, video.fps) == (about.total_num_frames, about.fps)
    assert video.seconds == about.duration


def test_frames_are_counted_where_the_header_does_not_say(av: Any) -> None:
    video = open_video(written(av, range(7), "matroska"))
    assert video.frames == 7
    assert len(list(video.read(range(7)))) == 7


def test_what_is_no_video(av: Any, file: Path, tmp_path: Path) -> None:
    def refused(source: Any, problem: str) -> None:
        with pytest.raises(ImageError, match=problem):
            list(open_video(source).read([9]))

    refused(tmp_path / "none.mp4", "does not exist")
    refused("https://example.org/a.mp4", "URLs are not downloaded")
    refused(b"nothing", "given as 7 bytes is not a video that can be read")
    refused(7, "from int")
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXTINF:2,\n{file}\n#EXT-X-ENDLIST\n")
    refused(playlist, "is not a video that can be read")
    sound = io.BytesIO()
    with av.open(sound, "w", format="matroska") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        samples = np.zeros((1, 8000), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            out.mux(packet)
    refused(sound.getvalue(), "sound only")
    whole = written(av, range(10), "avi")
    refused(whole[: len(whole) // 2], "video given")


def test_frames_that_are_there_already() -> None:
    frames = [np.full((4, 6, 3), n, np.uint8) for n in range(3)]
    video = Video.of(frames, 2.0)
    assert (video.frames, video.seconds, video.height, video.width) == (3, 1.5, 4, 6)
    assert [int(f[0, 0, 0]) for f in video.read([0, 2])] == [0, 2]
    with pytest.raises(ImageError, match="same size"):
        Video.of([*frames, np.zeros((5, 6, 3), np.uint8)], 2.0)
    with pytest.raises(ImageError, match="same size"):
        Video.of([], 2.0)
    with pytest.raises(ParameterError, match="fps is 0"):
        Video.of(frames, 0)


def long(frames: int) -> Video:
    """One of which nothing can be read: what is too long is known before that."""
    return Video(frames, 1.0, float(frames), 48, 64, lambda _: iter(()))


def test_room_is_known_before_anything_is_decoded(bundle: Callable[..., Path]) -> None:
    def refused(name: str, problem: str, images: int = 0, **options: Any) -> None:
        images_ = [np.zeros((8, 8, 3), np.uint8)] * images
        videos = [long(400)]
        with (
            lvlm.load(bundle(name, max_images=2)) as model,
            pytest.raises(CapacityError, match=problem),
        ):
            model.generate("Which?", images_, videos, **options)

    refused("qwen2-vl:gqa", r"400 frames make 200 images \(2 frames each\).*--frames 4")
    refused("qwen2-vl:gqa", r"--max-images 2; take fewer \(--frames 2\)", images=1, frames=8)
    refused("qwen2-vl:gqa", "leave the video out or export", images=2, frames=8)
    refused(SMOL, r"take fewer \(--frames 1\)", images=1)
    with (
        lvlm.load(bundle("qwen2-vl:gqa", max_images=2)) as model,
        pytest.raises(CapacityError, match=f"{MAX_FRAMES + 1} frames of a video"),
    ):
        model.generate("Which?", [], [long(MAX_FRAMES + 1)])


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("digits-llava", {"videos": [long(4)]}, "takes no video .*kind llava"),
        (SMOL, {"videos": [long(4), long(4)]}, "takes one in a prompt"),
        (SMOL, {"frames": 4}, "give one"),
        (SMOL, {"videos": [long(2)], "frames": 0}, "frames is 0"),
        (SMOL, {"videos": "video.mp4"}, r"videos=\[video\]"),
        (SMOL, {"videos": [long(2)], "prompt": "<video> and <video>"}, "2 video placeholders"),
        (
            SMOL,
            {"prompt": "<video> there"},
            "for 0 videos; <video> stands for a video",
        ),
        (
            "qwen2-vl:gqa",
            {"videos": [long(4)], "frames": 1},
            "1 frames are too few",
        ),
        ("qwen2-vl:gqa", {"videos": [long(4)], "frames": 8}, "asked for, but the video has 4"),
        ("qwen3-vl:gqa", {"videos": [long(1)]}, "needs 2 frames or more"),
    ],
)
def test_requests_that_cannot_be(
    name: str, arguments: dict[str, Any], problem: str, bundle: Callable[..., Path]
) -> None:
    given = {"prompt": "Which?", "chat_template": "prompt" not in arguments} | arguments
    with (
        lvlm.load(bundle(name, max_images=2)) as model,
        pytest.raises(LvlmError, match=problem) as caught,
    ):
        model.generate(**given)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ParameterError | PromptError | ImageError)


def test_from_the_command_line(
    file: Path, bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolVLM's prompts with videos have a template of their own."""
    folder = bundle(SMOL, max_images=2)
    argv = [str(folder), "--video", str(file), "What moves?", "--max-new-tokens", "4", "--json"]
    assert main([*argv, "--frames", "2"]) == 0
    stats = json.loads(capsys.readouterr().out)["stats"]
    with lvlm.load(folder) as model:
        own = model.generate("What moves?", [], [file], frames=2, max_new_tokens=4)
    assert stats["image_tokens"] == own.stats.image_tokens == 2 * 4
    assert main(argv) == 2  # two a second
    assert "4 frames make 4 images" in capsys.readouterr().err
    assert main([*argv, "--show-merge", "a.png"]) == 2
    assert "not on videos" in capsys.readouterr().err


def test_a_batch_has_lists_of_videos(bundle: Callable[..., Path]) -> None:
    frames = [np.full((20, 30, 3), 80 * n, np.uint8) for n in range(2)]
    videos = [[Video.of(frames, 1.0)], [], [Video.of(frames[::-1], 1.0)]]
    with lvlm.load(bundle(SMOL, max_images=2)) as model:
        options: dict[str, Any] = {"max_new_tokens": 6}
        alone = [model.generate("Which?", [], c, **options).token_ids for c in videos]
        together = model.generate(["Which?"] * 3, [], videos, **options)
        assert [g.token_ids for g in together] == alone
        with pytest.raises(PromptError, match="3 prompts but 2 lists of videos"):
            model.generate(["Which?"] * 3, [], videos[:2], **options)
    with lvlm.Engine(bundle(SMOL, max_images=2), slots=1) as engine:
        assert engine.generate("Which?", [], videos[0], **options).token_ids == alone[0]
