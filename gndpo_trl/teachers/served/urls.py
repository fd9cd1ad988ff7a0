"""Where a server is: URLs that are base URLs, and whether two of them are one place."""

import ipaddress
import socket
from urllib.parse import urlsplit

from ...grpo.credentials import has_credentials, url_problem


PORTS = {"http": 80, "https": 443}

THIS_MACHINE = "this machine"


def check_urls(urls: list[str]) -> None:
    """Raise `ValueError` unless these are base URLs of servers, each of them once."""
    for url in urls:
        if has_credentials(url):
            raise ValueError(url_problem("teacher_server_url"))
        parts = urlsplit(url)
        try:
            is_place = parts.scheme in PORTS and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is none
            is_place = False
        if not is_place:
            raise ValueError(
                f"`teacher_server_url` has {url!r}, which is no URL of a server. Write it as `http://host:8000`."
            )
        if parts.path.rstrip("/").endswith("/v1"):
            raise ValueError(f"`teacher_server_url` has {url!r}. Leave out the `/v1` at its end.")
    places = [(urlsplit(url).hostname, *port_and_path(url)) for url in urls]
    for url, place in zip(urls, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"`teacher_server_url` has {url!r} more than once. Name each server once.")
    if not urls:
        raise ValueError("`teacher_server_url` is an empty list. Name at least one server, or leave it unset.")


def are_one_server(url: str, other: str) -> bool:
    """Whether two URLs lead to one place, whatever they call it: the same port and path of the same machine."""
    if port_and_path(url) != port_and_path(other):
        return False
    return bool(machines(urlsplit(url).hostname) & machines(urlsplit(other).hostname))


def port_and_path(url: str) -> tuple[int | None, str]:
    parts = urlsplit(url)
    return parts.port or PORTS.get(parts.scheme), parts.path.rstrip("/")


def machines(host: str | None) -> set[str]:
    """The addresses of a host, with one name for all those of this machine; the host itself if nobody knows it."""
    try:
        found = socket.getaddrinfo(host or "localhost", None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return {str(host).lower()}
    return {name_of(str(address[0])) for *_, address in found}


def name_of(address: str) -> str:
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    # As a destination, 0.0.0.0 is this machine; TRL writes it so.
    if ip.is_loopback or ip.is_unspecified:
        return THIS_MACHINE
    # What goes to an address of one's own comes from it. Nothing is sent.
    with socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(ip), 9))
            is_own = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]) == ip
        except OSError:
            is_own = False
    return THIS_MACHINE if is_own else str(ip)
