"""Bytes that the URL of an image or video leads to: from data: URLs, chosen hosts and folders.

Whoever sends a request chooses its URLs, and the server stands where they do not: in a network with
machines and metadata services that only it can reach, on a disk with files that only it may read.
"""

from lvlm.runtime.server.media.media_error import MediaError
from lvlm.runtime.server.media.media_reader import MediaReader
from lvlm.runtime.server.media.media_rules import MediaRules

__all__ = ["MediaError", "MediaReader", "MediaRules"]
