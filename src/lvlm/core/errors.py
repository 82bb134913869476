"""Errors a user can mend. Command lines print them as one line and exit with status 2."""

from __future__ import annotations

LONGEST = 1_000  # characters of a message


class LvlmError(Exception):
    """Base of every error whose message says what is wrong and how to mend it.

    ``details`` are further lines, which command lines print below it.

    Args:
        message: kept as one line, whatever it quotes: what cannot be printed in one becomes spaces,
            and what is longer than 1,000 characters is cut in the middle.
    """

    details = ""

    def __init__(self, message: str = "") -> None:
        text = str(message)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 3 :]}"
        super().__init__("".join(c if c.isprintable() else " " for c in text))


class ParameterError(LvlmError, ValueError):
    """A parameter, flag or name has a value that cannot be used."""


class ImageError(LvlmError, ValueError):
    """An image cannot be opened or is of an unusable size."""


class PromptError(LvlmError, ValueError):
    """A prompt does not fit its images or its template."""


class CapacityError(LvlmError, ValueError):
    """A request needs more cache than the bundle was exported with."""


class BundleError(LvlmError):
    """A bundle is incomplete, changed, of another version, or not a bundle."""


class BackendError(LvlmError):
    """A backend is not installed or cannot run a graph."""


class DeviceMemoryError(BackendError):
    """A device has less free memory than is needed.

    Args:
        message: as of LvlmError.
        free: bytes that are free. None: not known.
    """

    def __init__(self, message: str, free: int | None = None) -> None:
        super().__init__(message)
        self.free = free


class RequestError(LvlmError):
    """A request to an engine ended without an answer."""


class QueueFullError(RequestError):
    """An engine has as many requests waiting as it may have."""


class RequestCancelled(RequestError):  # noqa: N818 - not a mistake
    """A request was cancelled by its caller."""


class RequestTimeout(RequestError, TimeoutError):  # noqa: N818 - named like TimeoutError
    """A request was not answered within its own timeout."""


class EngineClosedError(RequestError):
    """An engine was closed before a request was answered."""


class CheckpointError(LvlmError):
    """A checkpoint is missing, incomplete, or of an unsupported architecture."""


class ExportError(LvlmError):
    """An export could not be finished."""


class ValidationError(ExportError):
    """An exported graph does not compute what the checkpoint computes. ``details``: every check."""

    def __init__(self, message: str = "", details: str = "") -> None:
        super().__init__(message)
        self.details = details


class BuildError(LvlmError):
    """A plugin library or an engine could not be built."""


def shown(value: object, max_length: int = 60) -> str:
    """A value for a message: its ``repr`` on one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of too many digits, or any object's own
        text = f"of type {type(value).__name__}"
    return text if len(text) <= max_length else f"{text[:max_length]}…"
