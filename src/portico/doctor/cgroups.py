"""Read what the control groups around this process allow it.

A limit of any group around it holds, so the least of them is what counts.  Reads version 2, and the
hierarchies of version 1 beside it.

Sources: cgroups(7); the kernel's "Control Group v2" (``cpu.max``, ``memory.max``, ``pids.max``) and
"CFS Bandwidth Control" (``cpu.cfs_quota_us``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from portico.doctor.facts import Ceiling
from portico.doctor.pseudofiles import number, text

MOUNTS: Final = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
"""Where version 2 is: alone, or beside version 1."""

UNLIMITED: Final = 1 << 62
"""From here on a number of bytes of version 1 means no limit: it is the largest of whole pages."""


class Groups:
    """The control groups around this process.

    Args:
        root: The folder that stands for ``/``.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._paths: dict[str, str] = {}
        for line in text(root / "proc/self/cgroup").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            for controller in controllers.split(","):  # version 2 has none, and is ""
                self._paths[controller] = path.strip("/")

    def quota(self) -> float | None:
        """Return how many processors' time they may use; ``None`` for no limit."""
        found: list[float] = []
        for folder in self._around(""):
            words = text(folder / "cpu.max").split()
            if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():
                found.append(int(words[0]) / int(words[1]))
        for folder in self._around("cpu"):
            quota, period = (
                number(folder / "cpu.cfs_quota_us"),
                number(folder / "cpu.cfs_period_us"),
            )
            if quota is not None and period and quota > 0:
                found.append(quota / period)
        return min(found, default=None)

    def memory(self) -> Ceiling | None:
        """Return the bytes of memory that they may have; ``None`` for no limit."""
        return _least(
            [
                *self._ceilings("", "memory.max", "memory.current"),
                *self._ceilings("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
            ]
        )

    def tasks(self) -> Ceiling | None:
        """Return how many threads and processes they may have; ``None`` for no limit."""
        return _least(
            [
                *self._ceilings("", "pids.max", "pids.current"),
                *self._ceilings("pids", "pids.max", "pids.current"),
            ]
        )

    def _ceilings(self, controller: str, most: str, used: str) -> Iterator[Ceiling]:
        for folder in self._around(controller):
            limit = number(folder / most)
            if limit is not None and limit < UNLIMITED:
                yield Ceiling(limit, number(folder / used) or 0, f"{most} of its control group")

    def _around(self, controller: str) -> Iterator[Path]:
        """Yield the folders of the groups around this process, the innermost first.

        In a container the path may be one that is seen from outside; the top is then its own.
        """
        path = self._paths.get(controller)
        if path is None:
            return
        if controller:
            joined = next((each for each in self._folders() if controller in each.split(",")), None)
            tops = [] if joined is None else [self._root / MOUNTS[0] / joined]
        else:
            tops = [self._root / each for each in MOUNTS]
        for top in tops:
            inner = top / path
            while inner != top:
                yield inner
                inner = inner.parent
            yield top

    def _folders(self) -> list[str]:
        with suppress(OSError):
            return sorted(each.name for each in (self._root / MOUNTS[0]).iterdir())
        return []


def _least(ceilings: list[Ceiling]) -> Ceiling | None:
    return min(ceilings, key=lambda each: each.room or 0, default=None)
