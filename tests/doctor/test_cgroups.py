from __future__ import annotations

from pathlib import Path

import pytest

from portico.doctor.cgroups import Groups


def write(root: Path, files: dict[str, str]) -> Groups:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Groups(root)


V2 = "0::/outer/inner\n"
V1 = "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n3:pids:/docker/a\n0::/\n"


def test_the_least_limit_of_all_groups_around_a_process_counts(tmp_path: Path) -> None:
    groups = write(
        tmp_path,
        {
            "proc/self/cgroup": V2,
            "sys/fs/cgroup/outer/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
            "sys/fs/cgroup/outer/memory.max": "1000\n",
            "sys/fs/cgroup/outer/memory.current": "400\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/pids.max": "100\n",
            "sys/fs/cgroup/outer/pids.current": "90\n",
            "sys/fs/cgroup/outer/inner/pids.max": "50\n",
            "sys/fs/cgroup/outer/inner/pids.current": "5\n",
        },
    )
    assert groups.quota() == pytest.approx(1.5)
    memory, tasks = groups.memory(), groups.tasks()
    assert memory is not None
    assert (memory.most, memory.room) == (1000, 600)
    assert tasks is not None
    assert (tasks.most, tasks.room) == (100, 10)
    assert tasks.source == "pids.max of its control group"


def test_a_container_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    """The path is that of the host, and the folder is not there."""
    groups = write(
        tmp_path,
        {"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
    )
    assert groups.quota() == pytest.approx(0.5)


def test_version_1_has_a_folder_for_each_controller(tmp_path: Path) -> None:
    groups = write(
        tmp_path,
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": "2048\n",
            "sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes": "48\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "sys/fs/cgroup/pids/docker/a/pids.max": "max\n",
        },
    )
    assert groups.quota() == pytest.approx(2.0)
    memory = groups.memory()
    assert memory is not None
    assert memory.room == 2000
    assert groups.tasks() is None


@pytest.mark.parametrize("told", ["", V1, "0::/\n", "no such thing"])
def test_without_limits_there_are_none(tmp_path: Path, told: str) -> None:
    groups = write(tmp_path, {"proc/self/cgroup": told})
    assert (groups.quota(), groups.memory(), groups.tasks()) == (None, None, None)
