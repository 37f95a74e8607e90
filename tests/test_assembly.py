from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest

import portico
from portico import address
from portico.address import Scheme
from portico.assembly import FAMILIES, server_class
from portico.engines import ENGINES
from portico.listener import OpenListener, open_listener, resolve
from portico.settings import Settings

LOOPBACK = "tcp://127.0.0.1:0"

PREFIXES = {
    "threads": "Threading",
    "forks": "Forking",
    "pool": "ThreadPool",
    "green": "Green",
    "serial": "",
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("scheme", "family"), FAMILIES.items())
def test_a_server_is_an_engine_before_a_family(
    engine: str, scheme: Scheme, family: type[portico.TCPServer], tmp_path: Path
) -> None:
    """And is called like the combination of that name, where there is one."""
    text = f"{scheme}:{tmp_path}/a" if scheme.is_unix else f"{scheme}://127.0.0.1:0"
    with closing(open_listener(address.parse(text))) as opened:
        made = server_class(opened, Settings(engine=engine).resolved(1024))
    assert issubclass(made, family)
    prefix = PREFIXES[engine]
    assert made.__name__ == f"{prefix}{family.__name__}"
    assert issubclass(made, getattr(portico, f"{prefix}MixIn", portico.BaseServer))


def test_engines_are_set_up_as_they_know_it() -> None:
    opened = OpenListener(resolve(address.parse(LOOPBACK)), socket.socket())
    opened.close()
    green = Settings(engine="green", hubs=4)
    assert vars(server_class(opened, green.resolved(1024)))["max_hubs"] == 4
    assert "max_hubs" not in vars(server_class(opened, Settings(engine="green").resolved(1024)))
    pool = Settings(engine="pool", max_workers=3)
    assert vars(server_class(opened, pool.resolved(1024)))["max_workers"] == 3
