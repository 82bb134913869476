"""The error a caller gets for an exception in the middle of the work."""

from __future__ import annotations

from lvlm.core.errors import BackendError, LvlmError


def typed(error: BaseException) -> LvlmError:
    """The error for one request's caller, and no other's.

    Without its traceback, whose frames would keep the cache alive for as long as someone keeps the
    error.
    """
    if isinstance(error, LvlmError):
        return type(error)(str(error))
    return BackendError(f"the backend failed ({described(error)}); the request is lost")


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
