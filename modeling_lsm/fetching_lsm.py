"""Bytes from addresses that strangers name: http(s) and `data:`, within limits of size, time and network."""

import base64
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit


MAX_REDIRECTS = 5
READ_BYTES = 2**16
URL_CHARACTERS = "/%:@!$&'()*+,;=~?"  # the rest, like spaces, is escaped
WHITESPACE = b" \t\r\n"
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What of IPv6 is routed. Beyond it, `is_global` also takes addresses that stand for any IPv4 address for public.
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def fetch(url: str, max_bytes: int, timeout: float, private_hosts: Collection[str] = ()) -> bytes:
    """
    Gets what an http(s) URL names, directly: proxies of the environment are not used, as they would resolve the name
    once more.

    Args:
        url (`str`): The URL.
        max_bytes (`int`): The most to read.
        timeout (`float`): Seconds that it may take in all, redirects included.
        private_hosts (`Collection[str]`, *optional*): Hosts that may be asked although their address is not public.

    Returns:
        `bytes`: The content.

    Raises:
        ValueError: If the URL, or one that it redirects to, is not one of http(s) or of a private host, or the content
            is too large.
        OSError: If it cannot be had: no such host, a status other than 200, too slow, cut off.
    """
    with deadline(timeout) as watch:
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"It leads to {url[:200]!r}; expected http:// or https:// and a host.")
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            with closing(http.client.HTTPConnection(parts.hostname, port, timeout=timeout)) as connection:
                connect(connection, parts.scheme, private_hosts, watch)
                try:
                    location, content = ask(connection, parts, max_bytes)
                except http.client.HTTPException as error:
                    raise OSError(f"{parts.hostname} broke off or does not speak HTTP: {error!r}.") from error
            if location is None:
                return content
            url = urljoin(url, location)
    raise OSError(f"It redirects more than {MAX_REDIRECTS} times.")


@contextmanager
def deadline(timeout: float) -> Iterator[Callable[[socket.socket], None]]:
    """
    Gives a function that puts a socket under a deadline: whatever it is doing ends after `timeout` seconds with a
    `TimeoutError`. A socket's own time-out begins anew with every byte.
    """
    sockets, is_over = [], threading.Event()

    def watch(connected: socket.socket) -> None:
        sockets.append(connected)
        if is_over.is_set():
            raise TimeoutError

    def end() -> None:
        is_over.set()
        for connected in list(sockets):
            with suppress(OSError):  # closed by now
                socket.socket.shutdown(connected, socket.SHUT_RDWR)  # TLS's own would wait for the other side

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield watch
        if is_over.is_set():  # content of an undeclared length looks whole
            raise TimeoutError
    except OSError as error:
        if is_over.is_set() or isinstance(error, TimeoutError):
            raise TimeoutError(f"It took longer than {timeout:g} seconds. Try again, or raise `timeout`.") from error
        raise
    finally:
        timer.cancel()


def connect(
    connection: http.client.HTTPConnection,
    scheme: str,
    private_hosts: Collection[str],
    watch: Callable[[socket.socket], None],
) -> None:
    """Connects to the very address that was looked at: a name may have another one when asked again."""
    host, port = connection.host, connection.port
    found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    addresses = found if host in private_hosts else [address for address in found if is_public(address)]
    if not addresses:
        raise ValueError(
            f"The address of {host} is {found[0]}, which is not public. If it may be asked, name it: "
            f"private_hosts=({host!r},)."
        )
    for number, address in enumerate(addresses, 1):
        try:
            connection.sock = socket.create_connection((address, port), connection.timeout)
            break
        except OSError as error:
            # After a time-out there is no time left for another one.
            if isinstance(error, TimeoutError) or number == len(addresses):
                raise
    watch(connection.sock)
    if scheme == "https":
        connection.default_port = 443
        connection.sock = ssl.create_default_context().wrap_socket(
            connection.sock, server_hostname=host, do_handshake_on_connect=False
        )
        watch(connection.sock)
        connection.sock.do_handshake()


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and so is an IPv4 address that it stands for."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        ip = ip.ipv4_mapped or ip.sixtofour or (ipaddress.ip_address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip)
    return ip.is_global and not ip.is_multicast and (ip.version == 4 or ip in GLOBAL_UNICAST)


def ask(connection: http.client.HTTPConnection, parts: SplitResult, max_bytes: int) -> tuple[str | None, bytes]:
    """Where a redirect leads to, or `None` and the content."""
    target = quote(parts.path or "/", safe=URL_CHARACTERS)
    if parts.query:
        target += "?" + quote(parts.query, safe=URL_CHARACTERS)
    connection.request("GET", target, headers={"Accept-Encoding": "identity", "User-Agent": "modeling_lsm"})
    response = connection.getresponse()
    location = response.getheader("Location")
    if response.status in (301, 302, 303, 307, 308) and location:
        return location, b""
    if response.status != 200:
        raise OSError(f"{parts.hostname} answers {response.status} {response.reason}.")
    content, declared = bytearray(), response.length
    if declared is not None and declared > max_bytes:
        raise too_large(declared, max_bytes)
    while piece := response.read1(READ_BYTES):
        content += piece
        if len(content) > max_bytes:
            raise too_large(len(content), max_bytes)
    if declared is not None and len(content) < declared:
        raise OSError(f"{parts.hostname} sent {len(content)} of {declared} bytes.")
    return None, bytes(content)


def is_fetched(source: Any) -> bool:
    """Whether `source` is a URL that names no file of this machine."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://", "data:"))


def decode_data_uri(uri: str, max_bytes: int) -> bytes:
    """The content of a `data:` URI; a `ValueError` if it is too large or not one."""
    header, comma, content = uri.partition(",")
    if not comma:
        raise ValueError("It has no comma; expected 'data:audio/wav;base64,…'.")
    is_base64 = header.lower().endswith(";base64")
    least = len(content) // 4 if is_base64 else len(content) // 3  # were every character escaped
    if least > max_bytes:
        raise too_large(least, max_bytes)
    content = unquote_to_bytes(content)
    if is_base64:
        content = base64.b64decode(content.translate(None, WHITESPACE), validate=True)
    if len(content) > max_bytes:
        raise too_large(len(content), max_bytes)
    return content


def too_large(size: int, max_bytes: int) -> ValueError:
    return ValueError(f"It has {size} bytes or more, but at most {max_bytes} are read. Raise `max_bytes` if it may.")


__all__ = ["decode_data_uri", "fetch", "is_fetched"]
