"""Where does the API listen? On a socket that is made before the server runs, by the server itself or its supervisor.

In: a host and a port, with the names of the settings they come from. Out: a listening socket, and its URL. Torch-free.
"""

import errno
import socket

from ablation.errors import ServiceError

BACKLOG = 2048  # requests that may wait for a server that is being started


def listen(host: str, port: int, host_setting: str, port_setting: str) -> socket.socket:
    """A listening socket; port 0 is a free one. Of the addresses of a name, one of IPv4 goes first.

    Raises:
        ServiceError: the address can't be had; the message names the setting to change.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the second, of a name that no host could have
        raise _not_here(host_setting, host, error) from None
    family, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    try:
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # Made anew it knows that it is TCP, without which asyncio leaves Nagle's algorithm on: 40 ms an answer.
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
    """The address of what listens there, for a client on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # every address: this machine's own is one of them
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
