"""The address of a server: its URL, whether it is free, and which process listens there."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket

import psutil

from ...errors import InvalidInputError

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def url(scheme: str, host: str, port: int) -> str:
    """The URL at which this machine reaches a server that listens on a host and a port."""
    reached = _EVERYWHERE.get(host, host)
    return f"{scheme}://{f'[{reached}]' if _is_ipv6(reached) else reached}:{port}"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:  # a host name
        return False


def check_free(host: str, port: int) -> None:
    """Check that a server can listen on an address, by listening there for a moment.

    Raises:
        InvalidInputError: the port is taken, or the host is not an address of this machine.
    """
    try:
        if _binds(host, port, reuse=False):
            return
        # remains of closed connections do not keep a server from listening; a server that is still loading does
        free = _binds(host, port, reuse=True) and _is_recent(port)
    except OSError as error:
        raise InvalidInputError(
            f"cannot listen on host {host!r}, port {port}: {error.strerror}. Choose others with --host and --port."
        ) from error
    if not free:
        raise InvalidInputError(
            f"port {port} of host {host!r} is taken{_by(port)}. Stop that process, or choose another with --port."
        )


def _binds(host: str, port: int, reuse: bool) -> bool:
    """Whether a socket can listen on an address, with or without SO_REUSEADDR."""
    family = socket.AF_INET6 if _is_ipv6(host) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def _is_recent(port: int) -> bool:
    """Whether the system still lists connections of a server that had the port; True if it lists none to this user."""
    try:
        return any(each.laddr and each.laddr.port == port for each in psutil.net_connections("tcp"))
    except psutil.AccessDenied:
        return True


def _by(port: int) -> str:
    """For a message: the process that listens on a port; "" if the system does not tell."""
    with contextlib.suppress(psutil.Error):
        for each in psutil.net_connections("tcp"):
            if each.pid and each.status == psutil.CONN_LISTEN and each.laddr.port == port:
                return f" by process {each.pid} ({psutil.Process(each.pid).name()})"
    return ""


def has_listener(processes: list[psutil.Process], port: int) -> bool:
    """Whether any of some processes listens on a port."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if any(
                each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in process.net_connections("tcp")
            ):
                return True
    return False
