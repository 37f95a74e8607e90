"""A service as a type checker sees it: every setting has its type."""

from ipaddress import ip_network
from pathlib import Path

import portico
from portico.tally import Tally


class Echo(portico.StreamRequestHandler):
    """Send every line back."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


def serve_with_tls(folder: Path) -> list[Tally]:
    """Say each kind of setting."""
    return portico.serve(
        Echo,
        "tls://127.0.0.1:9443",
        engine="green",
        hubs=4,
        max_connections=500,
        max_connections_per_peer=None,
        when_full="refuse",
        farewell=b"full\n",
        allowed_networks=["10.0.0.0/8", ip_network("::1/128")],
        idle_timeout=60,
        cert=folder / "cert.pem",
        key=str(folder / "key.pem"),
    )


def longest(tallies: list[Tally]) -> float:
    """Look at what became of the connections."""
    reports = (tally.drained for tally in tallies)
    return max((report.longest or 0.0 for report in reports if report is not None), default=0.0)
