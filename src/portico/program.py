"""Run what a configuration says: in this very process, or in workers under a supervisor.

Owns which of the two it is.  Leaves what a program is told to `portico.configuration` and to who
reads it, and the two to `portico.soloist` and `portico.supervisor`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from portico.announcement import failure_told
from portico.configuration import Configuration
from portico.directory import Directory
from portico.handover import inherit
from portico.soloist import Soloist
from portico.supervisor import Supervisor
from portico.systemd import Notifier

Load: TypeAlias = Callable[[], Configuration]


def run(load: Load) -> bool:
    """Serve until SIGINT or SIGTERM, in the main thread.

    Args:
        load: Reads the configuration; called again for a reload, in the directory that then has
            the name of the current one.

    Returns:
        Whether handlers still run in threads of this process, with nobody to wait for them.

    Raises:
        PorticoError: What was asked cannot be done.
    """
    heritage = inherit()
    notifier = Notifier.take()
    directory = Directory.current()

    def load_there() -> Configuration:
        directory.enter()
        return load()

    with failure_told(notifier):
        configuration = load()
        if configuration.process.worker_count():
            Supervisor(load_there, configuration, notifier, heritage, directory).run()
            return False
        return Soloist(configuration, notifier, heritage, directory).run()
