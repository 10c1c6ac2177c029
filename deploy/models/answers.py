"""What an HTTP server may answer when it is asked for a file, and which of it is worth asking again."""

from __future__ import annotations

import contextlib
import email.message
import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO, Any
from urllib.parse import urlsplit

from deploy.errors import DownloadError

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class InterruptedTransferError(Exception):
    """The transfer broke in a way that asking again may mend."""


class StalePartError(InterruptedTransferError):
    """The part that is here does not belong to the file that the server has now."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but never from https to something that can be changed on its way."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Decide on one redirect; urllib counts them and knows circles."""
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new != "https" and (old, new) != ("http", "http"):
            raise urllib.error.HTTPError(newurl, code, f"redirected from {old} to {new}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextlib.contextmanager
def opened(url: str, headers: dict[str, str], timeout: float) -> Iterator[http.client.HTTPResponse]:
    """Open a URL and translate what can go wrong on the way to the first byte.

    Raises:
        DownloadError: a refusal that asking again does not change, or an answer that is no file.
        InterruptedTransferError: asking again may help.
        StalePartError: asking again from the beginning may help.
    """
    opener = urllib.request.build_opener(_Redirects)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refused(url, error) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{url}: its certificate is not trusted: {error.reason.verify_message}",
                hint="behind a company proxy, set SSL_CERT_FILE to its certificates",
            ) from error
        raise InterruptedTransferError(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise InterruptedTransferError(str(error) or type(error).__name__) from error
    with response:
        _require_file(url, response)
        yield response


def read(response: http.client.HTTPResponse, count: int) -> bytes:
    """Read what is there, at most ``count`` bytes; empty at the end.

    Raises:
        InterruptedTransferError: the connection broke.
    """
    try:
        return response.read1(count)
    except (OSError, http.client.HTTPException) as error:
        raise InterruptedTransferError(str(error) or type(error).__name__) from error


def validator_of(headers: email.message.Message) -> str:
    """Return what tells this version of a file from others, for If-Range: a strong ETag, else the date."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _refused(url: str, error: urllib.error.HTTPError) -> Exception:
    """Say what an HTTP status means: asking again, starting over, or an end."""
    said = f"the server says {error.code} {str(error.reason).splitlines()[0]}"
    if error.code == 416:
        return StalePartError(f"{said}: the part that is here does not fit its file")
    if error.code in _TRANSIENT:
        return InterruptedTransferError(said)
    hints = {
        401: "it is not public: download it yourself, then --weights PATH",
        403: "it is not public: download it yourself, then --weights PATH",
        404: "check the address in a browser",
        410: "check the address in a browser",
    }
    circle = "the address redirects in a circle or where it must not; find the final one in a browser"
    hint = circle if error.code // 100 == 3 else hints.get(error.code, "download it yourself, then --weights PATH")
    return DownloadError(f"{url}: {said}", hint=hint)


def _require_file(url: str, response: http.client.HTTPResponse) -> None:
    """Refuse what is a success for a browser and no file."""
    kind = response.headers.get_content_type() if response.headers.get("Content-Type") else ""
    encoding = response.headers.get("Content-Encoding", "identity")
    wrong = ""
    if response.status not in (200, 206) or response.length == 0:
        wrong = f"status {response.status} with {response.length or 0} bytes"
    elif kind == "text/html":
        wrong = "a web page, perhaps a login"
    elif encoding != "identity":
        wrong = f"{encoding}-compressed bytes although plain ones were asked for"
    if wrong:
        raise DownloadError(f"{url}: expected a file, got {wrong}", hint="download it yourself, then --weights PATH")
