"""Name what can go wrong, in words that say what would be right.

Every error that portico raises derives from `PorticoError` and, where one fits, from the
built-in that a program already catches.
"""

from __future__ import annotations


class PorticoError(Exception):
    """The root of every error that portico raises."""


class SettingError(PorticoError, ValueError):
    """A setting is outside its range.

    Attributes:
        name: The setting.
        value: What it was given.
        expected: What would be right.
    """

    name: str
    value: object
    expected: str

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(name, value, expected)
        self.name, self.value, self.expected = name, value, expected

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}: expected {self.expected}"


class AddressError(PorticoError, ValueError):
    """An address cannot be read.

    Attributes:
        address: The text that was given.
        expected: What would be right.
    """

    address: str
    expected: str

    def __init__(self, address: str, expected: str) -> None:
        super().__init__(address, expected)
        self.address, self.expected = address, expected

    def __str__(self) -> str:
        return f"address={self.address!r}: expected {self.expected}"


class ListenerError(PorticoError, OSError):
    """A listener cannot do its work, for a reason that waiting does not mend."""


class PhaseError(PorticoError, RuntimeError):
    """A server cannot do this in the phase of its life that it is in.

    Attributes:
        phase: The phase that it is in.
        wanted: The phase that it would have come to.
        expected: What would be right.
    """

    phase: str
    wanted: str
    expected: str

    def __init__(self, phase: str, wanted: str, expected: str) -> None:
        super().__init__(phase, wanted, expected)
        self.phase, self.wanted, self.expected = phase, wanted, expected

    def __str__(self) -> str:
        return f"phase={self.phase!r}: expected {self.expected}, to become {self.wanted!r}"


class CoroutineError(PorticoError, RuntimeError):
    """A coroutine called a function that waits, and would have held up its event loop.

    Attributes:
        name: The function of portico's.
        expected: What would be right.
    """

    name: str
    expected: str

    def __init__(self, name: str, expected: str) -> None:
        super().__init__(name, expected)
        self.name, self.expected = name, expected

    def __str__(self) -> str:
        return f"portico.{self.name} in a coroutine: expected `{self.expected}`"


class CountersError(PorticoError, ValueError):
    """What all workers count together cannot be kept, or cannot be taken over."""


class CertificateError(PorticoError, OSError):
    """A certificate, a key or a list of authorities cannot be used.

    Says what is wrong, and never shows what is in a file nor a password.

    Attributes:
        errno: The number of the system's error; ``None`` if the file could be read and its
            contents are wrong.
        strerror: What is wrong, and what would be right.
        filename: The file.
    """

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class ProxyHeaderError(PorticoError, ValueError):
    """A connection does not begin with a PROXY protocol header.

    It says what was expected and nothing of what came: that is a peer's, and may be secret.

    Attributes:
        expected: What would be right.
    """

    expected: str

    def __init__(self, expected: str) -> None:
        super().__init__(expected)
        self.expected = expected

    def __str__(self) -> str:
        return f"PROXY header: expected {self.expected}"


class PreambleError(PorticoError, OSError):
    """What has to come before the handler did not: a PROXY header, or a TLS handshake.

    Attributes:
        stage: Which of the two.
        reason: What happened.
        is_late: Whether the peer took too long.
    """

    stage: str
    reason: str
    is_late: bool

    def __init__(self, stage: str, reason: str, is_late: bool = False) -> None:
        super().__init__(stage, reason, is_late)
        self.stage, self.reason, self.is_late = stage, reason, is_late

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"
