"""Serve with workers: echo what comes, or compute for a millisecond before it.

For example: python benchmarks/servers/workers.py 2 green compute
"""

import sys
import time

import portico
from portico import program
from portico.address import parse
from portico.configuration import Configuration, ProcessSettings, ServiceSettings
from portico.settings import Settings

COMPUTING = 0.001
"""Seconds of processor time for each message; by the clock on the wall, a worker that has to share
its core would seem to have computed while another one did."""


class Echo(portico.BaseRequestHandler):
    def handle(self) -> None:
        while message := self.request.recv(65536):
            self.work()
            self.request.sendall(message)

    def work(self) -> None:
        """Do nothing."""


class Compute(Echo):
    def work(self) -> None:
        end = time.thread_time() + COMPUTING
        while time.thread_time() < end:
            pass


def main() -> None:
    workers, engine, handler = sys.argv[1:]
    configuration = Configuration(
        process=ProcessSettings(workers=int(workers), log_level="error"),
        services=(
            ServiceSettings(
                name="benchmark",
                target=f"{__file__}:{handler.capitalize()}",
                addresses=(parse("tcp://127.0.0.1:0"),),
                settings=Settings(engine=engine, max_connections_per_peer=None),
            ),
        ),
    )
    program.run(lambda: configuration)


if __name__ == "__main__":
    main()
