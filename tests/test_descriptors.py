from __future__ import annotations

import pytest

from portico.descriptors import raise_descriptor_limit


def test_a_process_may_have_all_descriptors_that_it_could_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: asked.append(limits))
    raise_descriptor_limit()
    assert asked == [(4096, 4096)]


def test_a_limit_that_the_system_does_not_grant_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr("resource.setrlimit", refuse)
    raise_descriptor_limit()
