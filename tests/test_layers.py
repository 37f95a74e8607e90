from __future__ import annotations

import pickle
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.address import parse
from portico.errors import SettingError
from portico.layers import Given, Layer, Origin, Source, SourceError, Values, merge

SERVICES = ("web", "dns")
GENERAL = None


def values(source: Source, given: Mapping[str, object], *, is_general: bool = True) -> Values:
    return {
        name: Given(value, value, Origin(source, name, is_general=is_general))
        for name, value in given.items()
    }


def plain(merged: Values) -> dict[str, object]:
    return {name: given.value for name, given in merged.items()}


SAID = st.dictionaries(st.sampled_from([GENERAL, *SERVICES]), st.integers())
"""What one source says of a setting: of all services, or of some of them."""


@given(st.lists(SAID, min_size=4, max_size=4))
def test_the_highest_source_that_says_anything_wins(said: list[dict[str | None, int]]) -> None:
    """And in one source, what it says of this service alone."""
    layers = [
        Layer(
            values(source, {"idle_timeout": each[GENERAL]} if GENERAL in each else {}),
            {
                name: values(source, {"idle_timeout": each[name]}, is_general=False)
                for name in SERVICES
                if name in each
            },
        )
        for source, each in zip(Source, said, strict=True)
    ]
    merged = merge(layers, SERVICES)
    for name in SERVICES:
        answers = [
            (source, each[name] if name in each else each[GENERAL])
            for source, each in zip(Source, said, strict=True)
            if name in each or GENERAL in each
        ]
        found = merged.services[name].get("idle_timeout")
        assert (found and (found.origin.source, found.value)) == (answers[-1] if answers else None)


@given(st.lists(st.none() | st.integers(1, 9), min_size=4, max_size=4))
def test_the_highest_source_wins_for_the_processes_too(said: list[int | None]) -> None:
    layers = [
        Layer(values(source, {} if each is None else {"workers": each}))
        for source, each in zip(Source, said, strict=True)
    ]
    answers = [each for each in said if each is not None]
    assert plain(merge(layers, SERVICES).process) == ({"workers": answers[-1]} if answers else {})


def test_the_settings_of_processes_and_services_are_told_apart() -> None:
    layer = Layer(values(Source.FILE, {"workers": 2, "backlog": 5}))
    merged = merge([layer], ["web"])
    assert plain(merged.process) == {"workers": 2}
    assert plain(merged.services["web"]) == {"backlog": 5}


TLS, TCP = (parse("tls://:1"),), (parse("tcp://:1"),)


@pytest.mark.parametrize(
    ("name", "fitting", "other"),
    [
        ("cert", {"addresses": TLS}, {"addresses": TCP}),
        ("key", {"addresses": TLS}, {"addresses": TCP}),
        ("client_ca", {"addresses": TLS}, {}),
        ("client_certificates", {"addresses": TLS}, {}),
        ("hubs", {"engine": "green"}, {}),
        ("max_workers", {"engine": "pool"}, {"engine": "green"}),
    ],
)
def test_what_is_said_of_all_is_for_those_with_a_use_for_it(
    name: str, fitting: Mapping[str, object], other: Mapping[str, object]
) -> None:
    def merged(general: Mapping[str, object], **services: Mapping[str, object]) -> set[str]:
        own = {
            service: values(Source.FILE, each, is_general=False)
            for service, each in services.items()
        }
        found = merge([Layer(values(Source.FILE, general), own)], services).services
        return {service for service in services if name in found[service]}

    assert merged({name: 1}, web=fitting, dns=other) == {"web"}
    # What nobody has a use for is a mistake, and so is what is said of this one.
    assert merged({name: 1}, web=other, dns=other) == {"web", "dns"}
    assert merged({}, web=fitting, dns={name: 1, **other}) == {"dns"}


@pytest.mark.parametrize(
    ("origin", "shown", "error"),
    [
        (
            Origin(Source.FILE, "services.web.hubs", "a.toml"),
            "a.toml: services.web.hubs",
            'a.toml: services.web.hubs = "x": expected "auto", or "none"',
        ),
        (
            Origin(Source.VARIABLE, "PORTICO_HUBS"),
            "PORTICO_HUBS",
            "PORTICO_HUBS=x: expected 'auto', or none",
        ),
        (Origin(Source.OPTION, "--hubs"), "--hubs", "hubs='x': expected 'auto', or None"),
        (Origin(Source.KEYWORD, "hubs"), "hubs", "hubs='x': expected 'auto', or None"),
    ],
)
def test_an_error_says_where_the_value_stands_in_the_words_of_that_place(
    origin: Origin, shown: str, error: str
) -> None:
    assert str(origin) == shown
    with pytest.raises(SettingError) as caught:
        origin.refuse("hubs", "x", "'auto', or None")
    assert str(caught.value) == error
    assert (caught.value.name, caught.value.value) == ("hubs", "x")


def test_an_error_of_a_source_can_be_sent_to_another_process() -> None:
    error = SourceError("PORTICO_HUBS=x", "hubs", "x", "1 or more")
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), vars(copied)) == (str(error), vars(error))
