"""URLs of http and https, in one spelling only.

What two parsers of URLs read differently is how a check on one host ends in a request to another:
names are ASCII in plain labels, and all that is rarer is refused rather than normalised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin

from lvlm.core.errors import ParameterError, shown
from lvlm.runtime.server.media.media_error import MediaError

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

LONGEST = 8_192  # characters
PORTS = {"http": 80, "https": 443}

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# The last label begins with a letter: 127.1, 2130706433 and 0x7f.1 are addresses to a resolver
_NAME = rf"(?:{_LABEL}\.)*(?=[a-z]){_LABEL}"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_NAME}", re.ASCII)
_DOMAIN = re.compile(rf"(\*\.)?({_NAME})(?::([0-9]{{1,5}}))?", re.ASCII | re.IGNORECASE)
_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.ASCII | re.IGNORECASE)
_KEPT = "/?:@!$&'()*+,;=-._~%"  # of a path and a query; all else becomes %XX


@dataclass(frozen=True)
class WebUrl:
    """A URL of http or https. ``target``: its path and query, as they are requested."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def of(cls, text: str) -> Self:
        """The URL in a text. Raises MediaError."""
        if len(text) > LONGEST:
            raise MediaError(f"the URL has {len(text):,} characters; give at most {LONGEST:,}")
        if any(c <= " " or c == "\x7f" for c in text):
            raise _wrong(text, "write spaces in it as %20")
        match = _URL.fullmatch(text)
        if match is None:
            raise _wrong(text, "give https://HOST/PATH")
        scheme, place, target = match[1].lower(), match[2].lower(), match[3]
        if "@" in place:
            raise MediaError("the URL has a user name or password; give one without")
        host, colon, port = place.partition(":")
        if not match[2].isascii() or not _HOST.fullmatch(host):  # before lower(), which makes some
            raise _wrong(
                text,
                "name its host by letters, digits, hyphens and dots (xn--… for others), not by an "
                "address",
            )
        if colon and not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII):
            raise _wrong(text, "its port is no number")
        try:
            quoted = quote(target, safe=_KEPT)
        except UnicodeEncodeError:
            raise _wrong(text, "it is not valid Unicode") from None
        if not quoted.startswith("/"):
            quoted = f"/{quoted}"
        return cls(scheme, host, int(port) if colon else PORTS[scheme], quoted)

    def redirected(self, location: str) -> Self:
        """URL where a redirect leads. Raises MediaError."""
        try:
            url = self.of(urljoin(str(self), location))
        except (MediaError, ValueError) as error:
            raise MediaError(f"{self.origin} redirects to what cannot be used: {error}") from None
        if (self.scheme, url.scheme) == ("https", "http"):
            raise MediaError(
                f"{self.origin} redirects from https to http; give a URL that does not"
            )
        return url

    @property
    def address(self) -> str:
        """Its host, with the port where that is not its scheme's own: the header Host."""
        return self.host if self.port == PORTS[self.scheme] else f"{self.host}:{self.port}"

    @property
    def origin(self) -> str:
        """All but its path, which may have a secret in it: for messages."""
        return f"{self.scheme}://{self.address}"

    def __str__(self) -> str:
        return f"{self.origin}{self.target}"


@dataclass(frozen=True)
class Domain:
    """A host that may be downloaded from; ``below``: the hosts below it instead."""

    host: str
    below: bool
    port: int | None

    @classmethod
    def of(cls, text: str) -> Self:
        """Host as it is written for --allow-media-domain. Raises ParameterError."""
        match = _DOMAIN.fullmatch(text) if isinstance(text, str) else None
        if match is None or (match[3] and not 0 < int(match[3]) < 65_536):
            raise ParameterError(
                f"the media domain {shown(text)} cannot be used; give a host, example.com or "
                "example.com:8443, or *.example.com for all hosts below it"
            )
        return cls(match[2].lower(), bool(match[1]), int(match[3]) if match[3] else None)

    def has(self, url: WebUrl) -> bool:
        """True where the URL may be downloaded."""
        named = url.host.endswith(f".{self.host}") if self.below else url.host == self.host
        return named and url.port in (PORTS.values() if self.port is None else (self.port,))


def _wrong(text: str, mend: str) -> MediaError:
    return MediaError(f"the URL {shown(text.partition('?')[0])} cannot be used; {mend}")
