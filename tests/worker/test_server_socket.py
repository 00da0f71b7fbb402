"""Where the API listens: a socket, or an error that names the setting."""

import socket

import pytest

from ablation.errors import ServiceError
from worker.server_socket import listen, url_of


def test_port_0_is_a_free_one_and_the_url_has_it() -> None:
    with listen("127.0.0.1", 0, "--host", "--port") as first, listen("0.0.0.0", 0, "--host", "--port") as second:
        assert first.proto == second.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on
        assert url_of(first) == f"http://127.0.0.1:{first.getsockname()[1]}"
        assert url_of(second) == f"http://127.0.0.1:{second.getsockname()[1]}"


def test_of_the_addresses_of_a_name_one_of_ipv4_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listen("localhost", 0, "--host", "--port") as listener:
        assert listener.family == socket.AF_INET


def test_a_port_that_is_taken_names_the_setting() -> None:
    with listen("127.0.0.1", 0, "--host", "--port") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"^--port: got {port}; allowed: a port of 127\.0\.0\.1 that is free"):
            listen("127.0.0.1", port, "--host", "--port")


@pytest.mark.parametrize("host", ["nohost.invalid", "192.0.2.1", "a" * 300])
def test_a_host_that_is_not_here_names_the_setting(host: str) -> None:
    """192.0.2.1 is an address of nobody (RFC 5737); 300 letters are too many for a name."""
    with pytest.raises(ServiceError, match=rf"^--host: got '{host}'; allowed: an address of this machine"):
        listen(host, 0, "--host", "--port")
