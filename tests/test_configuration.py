from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from portico.configuration import ProcessSettings
from portico.errors import SettingError
from portico.options import flag

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "configuration.md"


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
        ({"log_level": "trace"}, "log_level='trace': expected one of 'debug', 'info', 'warning'"),
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingError, match=f"^{expected}"):
        ProcessSettings(**values)


def test_every_setting_has_a_row_on_its_page_with_its_default_and_its_option() -> None:
    text = PAGE.read_text().partition("## The processes")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    defaults = {field.name: field.default for field in dataclasses.fields(ProcessSettings)}
    assert [[cell.strip("`") for cell in row] for row in rows] == [
        [name, f"{value:g}" if isinstance(value, float) else json.dumps(value), flag(name)]
        if value is not None
        else [name, "None", flag(name)]
        for name, value in defaults.items()
    ]


def test_workers_are_counted() -> None:
    assert ProcessSettings().worker_count() == 0
    assert ProcessSettings(workers=3).worker_count() == 3
    assert ProcessSettings(workers="auto").worker_count() == len(os.sched_getaffinity(0))


def test_what_is_said_of_workers_has_no_use_without_them() -> None:
    alone = ProcessSettings(
        max_requests=5, max_worker_memory=1, worker_timeout=None, start_timeout=1
    )
    assert alone.unused() == ["max_requests", "max_worker_memory", "worker_timeout"]
    assert dataclasses.replace(alone, workers=1).unused() == []
    assert ProcessSettings().unused() == []
