from __future__ import annotations

import os
from typing import Any

import pytest

from portico.configuration import ProcessSettings
from portico.errors import SettingError


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"workers": 0}, "workers=0: expected 1 to 1024, 'auto', or None"),
        ({"workers": 1025}, "workers=1025: expected 1 to 1024"),
        ({"workers": "two"}, "workers='two': expected 1 to 1024"),
        ({"max_requests": 0}, "max_requests=0: expected 1 or more, or None"),
        ({"max_requests_jitter": -1}, "max_requests_jitter=-1: expected 0 or more"),
        ({"max_worker_memory": True}, "max_worker_memory=True: expected a number of bytes"),
        ({"worker_timeout": 0}, "worker_timeout=0: expected a number of seconds above 0"),
        ({"user": " "}, "user=' ': expected a name, a number from 0 to 4294967294, or None"),
        ({"group": -1}, "group=-1: expected a name, a number"),
        ({"start_timeout": "1"}, "start_timeout='1': expected a number of seconds above 0"),
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingError, match=f"^{expected}"):
        ProcessSettings(**values)


def test_workers_are_counted() -> None:
    assert ProcessSettings().worker_count() == 0
    assert ProcessSettings(workers=3).worker_count() == 3
    assert ProcessSettings(workers="auto").worker_count() == len(os.sched_getaffinity(0))
