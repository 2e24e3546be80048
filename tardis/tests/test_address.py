"""Addresses of servers: taken ports are found before anything is loaded."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import psutil
import pytest

from tardis_llm.errors import InvalidInputError
from tardis_llm.integrations.vllm.address import check_free, has_listener, url

HOSTS = ["127.0.0.1", "0.0.0.0", "localhost", "", "::1", "::"]


def bound(host: str) -> socket.socket:
    """A socket bound as vLLM binds its own, at any port."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((host, 0))
    return made


@pytest.fixture(params=HOSTS)
def taken(request: pytest.FixtureRequest) -> Iterator[tuple[str, socket.socket]]:
    """A host and a socket bound to it."""
    if ":" in request.param and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with bound(request.param) as made:
        yield request.param, made


def has_ipv6() -> bool:
    try:
        bound("::1").close()
    except OSError:
        return False
    return True


def test_a_port_where_something_listens_is_taken(taken: tuple[str, socket.socket]):
    host, made = taken
    made.listen()
    port = made.getsockname()[1]
    with pytest.raises(InvalidInputError, match=rf"port {port} .* is taken by process \d+ .*--port"):
        check_free(host, port)


def test_a_port_of_a_server_that_is_still_loading_is_taken(taken: tuple[str, socket.socket]):
    host, made = taken
    with pytest.raises(InvalidInputError, match="is taken"):
        check_free(host, made.getsockname()[1])


def test_a_port_taken_on_all_addresses_is_taken_on_one():
    with bound("0.0.0.0") as made:
        made.listen()
        with pytest.raises(InvalidInputError, match="is taken"):
            check_free("127.0.0.1", made.getsockname()[1])


def test_a_port_is_free_and_stays_so(taken: tuple[str, socket.socket]):
    host, made = taken
    port = made.getsockname()[1]
    made.close()
    check_free(host, port)
    check_free(host, port)


def test_connections_of_a_server_that_has_ended_do_not_take_its_port():
    with bound("127.0.0.1") as made:
        made.listen()
        address = made.getsockname()
        with socket.create_connection(address) as client:
            server, _ = made.accept()
            server.close()  # the side that closes first waits for a minute
            assert client.recv(1) == b""
    assert any(each.laddr == address and each.status == psutil.CONN_TIME_WAIT for each in psutil.net_connections("tcp"))
    check_free(*address)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_is_not_this_machine_is_refused(host: str):
    with pytest.raises(InvalidInputError, match=r"cannot listen on host .*--host"):
        check_free(host, 8000)


@pytest.mark.parametrize(
    ("host", "written"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("", "http://127.0.0.1:80"),
        ("a.example", "http://a.example:80"),
        ("::1", "http://[::1]:80"),
        ("::", "http://[::1]:80"),
    ],
)
def test_addresses_are_written_as_clients_take_them(host: str, written: str):
    assert url("http", host, 80) == written


def test_only_a_port_that_is_listened_on_has_a_listener():
    with bound("127.0.0.1") as made:
        port, me = made.getsockname()[1], [psutil.Process()]
        assert not has_listener(me, port)
        made.listen()
        assert has_listener(me, port)
        assert not has_listener([], port)
