"""How large a request's head may be: its URL, its headers' number and size. Who reads heads asks here.

Serve's proxy and uvicorn's parser have no bounds of their own (`actors.front.bounded_http` is what sets them there).
"""

from collections.abc import Iterable

from actors.front.openai_errors import ApiError

MAX_URL_BYTES = 8 * 1024
MAX_HEADERS = 128
MAX_HEAD_BYTES = 64 * 1024
"""Of names and values together."""


def url_too_long() -> ApiError:
    """414."""
    return ApiError(414, f"The URL is longer than {MAX_URL_BYTES} bytes.", code="url_too_long")


def too_many_headers() -> ApiError:
    """431."""
    return ApiError(431, f"The request has more than {MAX_HEADERS} headers.", code="headers_too_large")


def headers_too_large() -> ApiError:
    """431."""
    return ApiError(431, f"The request's headers are larger than {MAX_HEAD_BYTES} bytes.", code="headers_too_large")


def head_timeout(seconds: float) -> ApiError:
    """408."""
    message = f"The request's headers did not arrive within {seconds:g} s."
    return ApiError(408, message, type="timeout_error", code="request_timeout")


def check_head(raw_path: bytes, query: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raises ApiError 414 or 431 naming the limit."""
    if len(raw_path) + len(query) > MAX_URL_BYTES:
        raise url_too_long()
    size = count = 0
    for name, value in headers:
        count += 1
        size += len(name) + len(value)
    if count > MAX_HEADERS:
        raise too_many_headers()
    if size > MAX_HEAD_BYTES:
        raise headers_too_large()
