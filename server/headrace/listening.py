"""Listening sockets: alone at an address, or beside other processes of the same server."""

from __future__ import annotations

import socket

from headrace.errors import ConfigError


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket; `shared`: with other processes, at a port that `reserve` holds.

    Raises ConfigError, with a remedy, if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=shared)
    except (OSError, OverflowError) as error:
        raise _no_address(host, port, error) from None


def reserve(host: str, port: int) -> socket.socket:
    """A socket that holds an address for processes that are to share it, and gets no connections.

    Raises ConfigError, with a remedy, if the address cannot be had.
    """
    with listen(host, port) as probe:  # alone: two servers must not share it by accident
        address = probe.getsockname()
        family = probe.family
    holder = socket.socket(family, socket.SOCK_STREAM)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        holder.bind(address)
    except OSError as error:
        holder.close()
        raise _no_address(host, port, error) from None
    return holder


def _no_address(host: str, port: int, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or "a port is 0 to 65535"
    return ConfigError(
        f"Cannot listen on {host}:{port}: {reason.partition(' (while')[0]}. Choose another "
        "--port (0 picks a free one) or --host, or stop what uses it."
    )


def url_of(listener: socket.socket) -> str:
    """Where clients reach it."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
