"""Progress of the exporter on standard error: stage, what, elapsed, bytes."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

TICKS = 1.0, 60.0  # seconds between signs of life: on a terminal, elsewhere


class Progress:
    """One line per stage; on a terminal the running line is rewritten in place, elsewhere a long
    stage says now and then that it goes on."""

    def __init__(self, stages: int, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stages, self.quiet = stages, quiet
        self.stream = stream or sys.stderr
        self.number = 0
        self.began = time.monotonic()

    @contextmanager
    def stage(self, what: str) -> Iterator[Stage]:
        self.number += 1
        stage = Stage(self, f"[{self.number}/{self.stages}] {what}")
        stage.show("…")
        over = threading.Event()
        clock = threading.Thread(target=stage.tick, args=(over,), daemon=True)
        clock.start()
        try:
            yield stage
        except BaseException:
            over.set()
            clock.join()
            stage.leave()
            raise
        over.set()
        clock.join()
        stage.show(stage.result or "done", final=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began


class Stage:
    """The running stage; ``result`` is what its line ends with."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.title = progress, title
        self.result, self.text = "", ""
        self.lock = threading.Lock()
        self.began = self.shown = time.monotonic()
        self.bytes_done = 0

    def show(self, text: str, *, final: bool = False) -> None:
        self._write(text, end="\n" if final else "", aloud=final)

    def tick(self, over: threading.Event) -> None:
        """Show how long the stage has run, again and again until it is ``over``."""
        terminal = self.progress.stream.isatty()
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            while not over.wait(TICKS[0] if terminal else TICKS[1]):
                self._write(self.text, end="" if terminal else "\n", aloud=True)

    def leave(self) -> None:
        """End the line: what comes next is an error."""
        if not self.progress.quiet and self.progress.stream.isatty():
            print(file=self.progress.stream, flush=True)

    def _write(self, text: str, *, end: str, aloud: bool) -> None:
        """Off a terminal only what is said ``aloud`` is a line."""
        if self.progress.quiet:
            return
        stream, self.text = self.progress.stream, text
        seconds = time.monotonic() - self.began
        line = f"{self.title}  {text}" + (f"  {seconds:.1f} s" if aloud or seconds > 1 else "")
        with self.lock:
            if stream.isatty():
                print(f"\r\033[K{line}", end=end, file=stream, flush=True)
            elif aloud:
                print(line, file=stream, flush=True)

    def add_bytes(self, count: int, total: int) -> None:
        """Progress of copying; shown at most ten times a second."""
        self.bytes_done += count
        if time.monotonic() - self.shown > 0.1:
            self.shown = time.monotonic()
            share = 100 * self.bytes_done / max(total, 1)
            self.show(f"{size(self.bytes_done)} of {size(total)} ({share:.0f} %)")

    def add_item(self, done: int, total: int, *, skipped: int) -> None:
        """Progress over items alike, ``skipped`` of the done ones without work; with the time
        that is left."""
        if time.monotonic() - self.shown > 0.1:
            self.shown = time.monotonic()
            each = (self.shown - self.began) / max(done - skipped, 1)
            self.show(f"{done} of {total}, about {duration(each * (total - done))} left")


def duration(seconds: float) -> str:
    """A time for people: 40 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def size(count: float) -> str:
    """A number of bytes for people: 6.4 MB, 13.5 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
