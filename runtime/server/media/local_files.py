"""Files of the server's own disk, in folders that are allowed.

About a path outside of them nothing is asked of the disk, and one answer is given. Links are
followed first and what they lead to is checked; then the file is opened by its folders, one by one
and without following any link, so that none can be put in its way between the two.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

from lvlm.core.errors import ParameterError, shown
from lvlm.runtime.server.media.media_error import MediaError, too_large
from lvlm.runtime.server.media.media_rules import MediaRules


class LocalFiles:
    """Files in the folders of ``rules.allow_paths``. Raises ParameterError if one is no folder."""

    def __init__(self, rules: MediaRules) -> None:
        self._max_bytes = rules.max_bytes
        self._roots = [_folder(path) for path in rules.allow_paths]
        # A path may begin with a folder as it was given, or with what that leads to
        self._starts = [*map(os.path.abspath, rules.allow_paths), *self._roots]

    def read(self, text: str) -> bytes:
        """Content of a file, by its absolute path or ``file://`` URL. Raises MediaError.

        It blocks while the disk does; it does not wait for writers of named pipes.
        """
        root, parts = self._found(_path(text))
        name = f"the file {shown(text, 300)}"
        try:
            descriptor = _opened(root, parts)
        except FileNotFoundError:
            raise MediaError(f"{name} does not exist; check it") from None
        except OSError as error:
            raise MediaError(f"{name} cannot be opened: {error.strerror}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise MediaError(f"{name} is not a regular file; name one")
            if status.st_size > self._max_bytes:
                raise too_large(text, self._max_bytes)
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(status.st_size)  # not what is written to it meanwhile
        finally:
            os.close(descriptor)

    def _found(self, path: str) -> tuple[str, Sequence[str]]:
        """The allowed folder that a path leads into, and the names from there on."""
        if any(_is_below(path, start) for start in self._starts):
            real = os.path.realpath(path)
            for root in self._roots:
                if _is_below(real, root):
                    return root, [part for part in real[len(root) :].split(os.sep) if part]
        raise MediaError(
            "the file is in no folder that this server reads; send it as a data: URL, or have the "
            "server started with --allow-media-path"
        )


def _folder(path: str | os.PathLike[str]) -> str:
    try:
        real = os.path.realpath(path, strict=True)
        if not os.path.isdir(real):
            raise NotADirectoryError
    except (OSError, ValueError, TypeError):
        raise ParameterError(
            f"the media folder {shown(path, 300)} does not exist; give a folder"
        ) from None
    return real


def _path(text: str) -> str:
    """The path in a text, without what only spells it: "//", "/.". Raises MediaError."""
    path = text
    if text[:5].lower() == "file:":
        place, slash, path = text[5:].removeprefix("//").partition("/")
        if not text[5:].startswith("//") or place.lower() not in ("", "localhost") or not slash:
            raise MediaError(f"the URL {shown(text)} cannot be used; write file:///FOLDER/FILE")
        try:
            path = os.fsdecode(unquote_to_bytes(path))
        except UnicodeEncodeError:
            raise MediaError("the file:// URL is not valid Unicode; percent-encode it") from None
    parts = [part for part in path.split("/") if part not in ("", ".")]
    try:
        # "..": what it leads to depends on links, also on those in other folders
        if ".." in parts or b"\0" in os.fsencode(path):
            raise ValueError
    except ValueError:
        raise MediaError(
            "the file's path has '..' in it or is no valid path; write it out"
        ) from None
    return "/" + "/".join(parts)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


def _opened(root: str, parts: Sequence[str]) -> int:
    """A descriptor of the file."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for index, part in enumerate(parts, 1):
        kind = os.O_DIRECTORY if index < len(parts) else os.O_NONBLOCK
        try:
            found = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = found
    return descriptor
