"""`python -m api`: the HTTP server as a process, at ABLATION_HOST and ABLATION_PORT.

Port 0 is a free one. A supervisor that has to know the port binds the socket itself and passes it on as ABLATION_FD:
so the address is known before the server runs, and stays open while a server that died is started again.
"""

import socket
import sys

import uvicorn
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from ablation.errors import ServiceError
from api.app import make_app
from worker.settings import load_settings, read_environment

SHUTDOWN_S = 3  # how long open requests may take to end


class Address(BaseSettings):
    """Where to listen."""

    model_config = SettingsConfigDict(env_prefix="ABLATION_", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    fd: int | None = Field(default=None, ge=0)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    try:
        address = read_environment(Address)
        app = make_app(load_settings())
    except ServiceError as error:
        sys.exit(f"Error: {error}")
    config = uvicorn.Config(
        app,
        host=address.host,
        port=address.port,
        timeout_graceful_shutdown=SHUTDOWN_S,
        access_log=False,  # /metrics counts; a poll a second would drown the log
    )
    sockets = None if address.fd is None else [socket.socket(fileno=address.fd)]
    uvicorn.Server(config).run(sockets)


if __name__ == "__main__":
    main()
