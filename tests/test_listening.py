"""Addresses: one server alone at a port, or several processes of one at the same."""

from __future__ import annotations

import socket

import pytest

from headrace.errors import ConfigError
from headrace.listening import listen, reserve, url_of


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_processes_share_a_reserved_port_and_nobody_else_does(host: str) -> None:
    with reserve(host, 0) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port))  # it reserves, it does not listen
        with listen(host, port, shared=True) as one, listen(host, port, shared=True) as two:
            assert url_of(one) == url_of(two) == url_of(holder)
            connections = [socket.create_connection((host, port)) for _ in range(32)]
            accepted = []
            for listener in (one, two):
                listener.setblocking(False)
                count = 0
                try:
                    while True:
                        listener.accept()[0].close()
                        count += 1
                except BlockingIOError:
                    accepted.append(count)
            assert sum(accepted) == 32 and min(accepted) > 0
            for connection in connections:
                connection.close()
            for another in (reserve, listen):
                with pytest.raises(ConfigError, match=f"Cannot listen on .*{port}.*--port"):
                    another(host, port)
    with listen(host, port):
        pass
