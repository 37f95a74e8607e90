from __future__ import annotations

import copy
import errno
import pickle
from collections.abc import Callable

import pytest

from portico.errors import (
    AddressError,
    CertificateError,
    CoroutineError,
    ListenerError,
    PhaseError,
    PorticoError,
    ProxyHeaderError,
    SettingError,
)

SETTING = SettingError("max_connections", 0, "1 or more, or None for no limit")
ADDRESS = AddressError("http://localhost", "a scheme of tcp, udp or unix")
LISTENER = ListenerError(errno.EINVAL, "it does not listen")
PHASE = PhaseError("created", "draining", "serving or stopped")
CERTIFICATE = CertificateError(errno.ENOENT, "no such file", "cert.pem")
COROUTINE = CoroutineError("sleep", "await asyncio.sleep(...)")
PROXY_HEADER = ProxyHeaderError("CRLF within 107 bytes")


def test_a_setting_error_says_what_would_be_right() -> None:
    assert str(SETTING) == "max_connections=0: expected 1 or more, or None for no limit"


def test_a_setting_error_carries_its_values() -> None:
    assert (SETTING.name, SETTING.value) == ("max_connections", 0)
    assert SETTING.expected == "1 or more, or None for no limit"


def test_an_address_error_says_what_would_be_right() -> None:
    assert str(ADDRESS) == "address='http://localhost': expected a scheme of tcp, udp or unix"


def test_an_address_error_carries_its_values() -> None:
    assert (ADDRESS.address, ADDRESS.expected) == (
        "http://localhost",
        "a scheme of tcp, udp or unix",
    )


def test_a_phase_error_says_what_would_be_right() -> None:
    assert str(PHASE) == "phase='created': expected serving or stopped, to become 'draining'"


def test_a_phase_error_carries_its_values() -> None:
    assert (PHASE.phase, PHASE.wanted) == ("created", "draining")
    assert PHASE.expected == "serving or stopped"


def test_a_coroutine_error_says_what_a_coroutine_does_in_its_place() -> None:
    assert str(COROUTINE) == "portico.sleep in a coroutine: expected `await asyncio.sleep(...)`"
    assert (COROUTINE.name, COROUTINE.expected) == ("sleep", "await asyncio.sleep(...)")


def test_a_proxy_header_error_says_what_was_expected() -> None:
    assert str(PROXY_HEADER) == "PROXY header: expected CRLF within 107 bytes"
    assert PROXY_HEADER.expected == "CRLF within 107 bytes"


def test_a_listener_error_keeps_the_number_of_the_error() -> None:
    assert LISTENER.errno == errno.EINVAL


def test_a_certificate_error_names_the_file_and_keeps_the_number_of_the_error() -> None:
    assert str(CERTIFICATE) == "cert.pem: no such file"
    assert (CERTIFICATE.errno, CERTIFICATE.filename) == (errno.ENOENT, "cert.pem")


@pytest.mark.parametrize(
    ("error", "built_in"),
    [
        (SETTING, ValueError),
        (ADDRESS, ValueError),
        (LISTENER, OSError),
        (CERTIFICATE, OSError),
        (PHASE, RuntimeError),
        (COROUTINE, RuntimeError),
        (PROXY_HEADER, ValueError),
    ],
)
def test_an_error_is_ours_and_what_a_program_catches_already(
    error: PorticoError, built_in: type[Exception]
) -> None:
    with pytest.raises(PorticoError) as caught:
        raise error
    assert isinstance(caught.value, built_in)


def pickled(error: PorticoError) -> PorticoError:
    same: PorticoError = pickle.loads(pickle.dumps(error))
    return same


@pytest.mark.parametrize(
    "error",
    [SETTING, ADDRESS, LISTENER, CERTIFICATE, PHASE, COROUTINE, PROXY_HEADER],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, pickled], ids=["copy", "deep", "pickle"]
)
def test_an_error_can_be_sent_to_another_process(
    error: PorticoError, copied: Callable[[PorticoError], PorticoError]
) -> None:
    same = copied(error)
    assert (type(same), str(same), vars(same)) == (type(error), str(error), vars(error))
