"""`python -m api`: the HTTP server as a process, at ABLATION_HOST and ABLATION_PORT.

Port 0 takes a free one. A supervisor that must know the port binds the socket itself and passes it as ABLATION_FD, so
that the address is known before the server runs, and stays open while a server that died is restarted.
"""

import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.settings import Address

SHUTDOWN_S = 3  # how long open requests may take to end


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    signal.signal(
        signal.SIGINT, lambda *_: os._exit(130)
    )  # while uvicorn has no handler: before its start and after its end
    from ablation.errors import ServiceError
    from api.app import make_app
    from api.server import make_server
    from worker.settings import Address, load_settings, read_environment, warn_of_unknown_variables

    warn_of_unknown_variables(os.environ)
    try:
        address, settings = read_environment(Address), load_settings()
        app = make_app(settings)
        listener = open_listener(address)
    except ServiceError as error:
        sys.exit(f"Error: {error}")
    make_server(app, settings, SHUTDOWN_S).run([listener])


def open_listener(address: "Address") -> socket.socket:
    """The socket passed by a supervisor, or a new one, whose address is logged.

    Raises:
        ServiceError: the address can't be used; the message names the setting to change.
    """
    from ablation.errors import ServiceError
    from worker.server_socket import listen, url_of

    if address.fd is None:
        listener = listen(address.host, address.port, "ABLATION_HOST", "ABLATION_PORT")
        print(f"The API is running on {url_of(listener)}", file=sys.stderr, flush=True)
        return listener
    try:
        return socket.socket(fileno=address.fd)
    except OSError as error:
        raise ServiceError(
            f"ABLATION_FD: got {address.fd} ({error.strerror}); allowed: an open listening socket. Unset it."
        ) from None


if __name__ == "__main__":
    main()
