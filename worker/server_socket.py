"""Where does the API listen? On a socket that is made before the server runs, by the server itself or its supervisor.

In: a host and a port, with the names of the settings they come from. Out: a listening socket, and its URL. Torch-free.
"""

import errno
import socket

from ablation.errors import ServiceError

BACKLOG = 2048  # requests that may wait for a server that is being started


def listen(host: str, port: int, host_setting: str, port_setting: str) -> socket.socket:
    """Open a listening socket; port 0 takes a free one. Of several addresses of a name, an IPv4 address is preferred.

    Raises:
        ServiceError: the address can't be used; the message names the setting to change.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a possible host name
        raise _not_here(host_setting, host, error) from None
    family, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    try:
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # A new object has the protocol TCP set; else asyncio leaves Nagle's algorithm on, which costs 40 ms an answer.
        return socket.socket(fileno=listener.detach())
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise _not_here(host_setting, host, error) from None
        raise ServiceError(
            f"{port_setting}: got {port}; allowed: a port of {host} that is free for you. ({error.strerror}) "
            f"Choose another with {port_setting} (0: any free one)."
        ) from None


def _not_here(host_setting: str, host: str, error: Exception) -> ServiceError:
    reason = getattr(error, "strerror", None) or "No host has such a name"
    return ServiceError(
        f"{host_setting}: got {host!r}; allowed: an address of this machine, such as 127.0.0.1 or 0.0.0.0. "
        f"({reason}) Choose another with {host_setting}."
    )


def url_of(listener: socket.socket) -> str:
    """URL of a listening socket, for a client on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # all addresses, so the loopback address, too
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
