"""Keep values under keys and speak Redis's protocol: a whole server in one handler.

    python examples/keyvalue.py             # then, in another terminal, with Redis's own client:
    redis-cli -p 6380 set greeting hello

`COMMANDS` says what a client can ask for.  All clients share the entries; a command has their lock
and waits for nobody meanwhile, so that clients may be threads as well as greenlets.
"""
# ruff: noqa: D102  # redis.io describes the commands.

import fnmatch
import re
import shlex
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable
from math import inf
from threading import Lock
from time import monotonic as now
from typing import Any, ClassVar

import portico

LINE_LIMIT = 64 * 1024 + 1  # bytes of a line, its end included
COMMAND_LIMIT = 16 * 1024 * 1024  # bytes of a command, with 64 for what Python adds to each word
COUNTS = {b"*%d\r\n" % count: count for count in range(64)}  # nearly every header is in here,
SIZES = {b"$%d\r\n" % size: size for size in range(1024)}  # or in here, and costs one look-up
INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")
INT32, INT64 = range(-(2**31), 2**31), range(-(2**63), 2**63)
SETTINGS = {name: (name, value) for name, value in ((b"appendonly", b"no"), (b"save", b""))}
ABSENT, UNITS = (None, inf), {b"EX": 1, b"PX": 1000}


class KeyValueHandler(portico.StreamRequestHandler):
    """Answer the commands of one client, one after the other."""

    disable_nagle_algorithm = True  # a reply does not wait until the client has seen the last one
    entries: ClassVar[OrderedDict[bytes, tuple[Any, float]]] = OrderedDict()  # with deadlines
    lock = Lock()  # guards entries

    def handle(self) -> None:
        try:
            while not self.rfile.closed and (line := self.rfile.readline(LINE_LIMIT)):
                if words := self.read_words(line) if line[:1] == b"*" else split(line):
                    self.wfile.write(self.execute(words))
        except ValueError as error:
            self.wfile.write(b"-ERR Protocol error: %b\r\n" % error.args[0])

    def read_words(self, line: bytes) -> list[bytes]:
        words, room = [], COMMAND_LIMIT
        for _ in range(COUNTS.get(line) or integer(line[1:-2], b"invalid multibulk length", INT32)):
            header = self.rfile.readline(LINE_LIMIT)
            size = SIZES.get(header, -1)
            if not 0 <= size <= room:
                if header[:1] != b"$":
                    raise ValueError(b"expected '$', got '%b'" % header[:1].replace(b"\r", b" "))
                size = integer(header[1:-2], b"invalid bulk length", range(room + 1))
            word = self.rfile.read(size + 2)
            if len(word) < size + 2:
                raise ValueError(b"cut short")
            words.append(word[:-2])
            room -= size + 64
        return words

    def execute(self, words: list[bytes]) -> bytes:
        command = COMMANDS.get(words[0].lower()) or COMMANDS.get(b" ".join(words[:2]).lower())
        try:
            if command is None:
                shown = words[0], b"".join(b"'%.128b' " % word for word in words[1:9])
                raise ValueError(b"unknown command '%.128b', with args beginning with: %b" % shown)
            arity, run = command
            if len(words) not in arity:
                raise ValueError(b"wrong number of arguments for '%b' command" % words[0].lower())
            with self.lock:
                reply = run(self, *words[1:])
        except ValueError as error:
            return b"-ERR %b\r\n" % re.sub(rb"[\r\n]", b" ", error.args[0])
        return ENCODERS[type(reply)](reply)

    def get(self, key: bytes) -> tuple[Any, float]:
        if self.entries.get(key, ABSENT)[1] <= now():
            del self.entries[key]
        return self.entries.get(key, ABSENT)

    def put(self, key: bytes, value: bytes, deadline: float = inf) -> str:
        self.entries[key] = value, deadline
        for _ in range(min(4, len(self.entries)) if deadline < inf else 0):
            oldest, entry = self.entries.popitem(last=False)  # four looks for each that can expire,
            if entry[1] > now():  # so that the dead cannot pile up
                self.entries[oldest] = entry
        return "OK"

    def set(self, key: bytes, value: bytes, *options: bytes) -> str | None:
        condition = unit = amount = b""
        words = iter(options)
        for option in map(bytes.upper, words):
            if option in (b"NX", b"XX") and condition in (b"", option):
                condition = option
            elif option in UNITS and unit in (b"", option) and (amount := next(words, b"")):
                unit = option
            else:
                raise ValueError(b"syntax error")
        if unit and integer(amount) not in range(1, 2**63 // 1000):
            raise ValueError(b"invalid expire time in 'set' command")
        if condition and (self.get(key) is ABSENT) != (condition == b"NX"):
            return None
        return self.put(key, value, now() + int(amount) / UNITS[unit] if unit else inf)

    def add(self, key: bytes, amount: int) -> int:
        old, deadline = self.get(key)
        new = b"%d" % (amount + integer(b"0" if old is None else old))
        total = integer(new, b"increment or decrement would overflow")
        self.put(key, new, deadline)
        return total

    def expire(self, key: bytes, seconds: bytes) -> int:
        value, deadline = self.get(key)[0], now() + integer(seconds)
        return int(value is not None and self.put(key, value, deadline) == "OK")

    def ttl(self, key: bytes) -> int:
        value, deadline = self.get(key)
        return -2 if value is None else -1 if deadline == inf else round(deadline - now())

    def keys(self, glob: bytes) -> list[bytes]:
        if len(glob) > 256:
            raise ValueError(b"pattern is too long")
        text = re.sub(r"\\(.)|\[\^", lambda m: f"[{m[1]}]" if m[1] else "[!", str(glob, "latin-1"))
        matches = re.compile(fnmatch.translate(text)).match
        found = [key for key in self.entries if matches(str(key, "latin-1"))]
        return [key for key in found if self.get(key) is not ABSENT]


def integer(text: bytes, wrong: bytes = b"", allowed: range = INT64) -> int:
    """Return the number that a client wrote, or raise what is `wrong`."""
    if INTEGER.fullmatch(text) and int(text) in allowed:
        return int(text)
    raise ValueError(wrong or b"value is not an integer or out of range")


def split(line: bytes) -> list[bytes]:
    """Return the words of a command that somebody typed, quoted as in a shell."""
    if line[-1:] != b"\n":
        raise ValueError(b"too big inline request" if len(line) == LINE_LIMIT else b"cut short")
    try:
        return [word.encode("latin-1") for word in shlex.split(str(line, "latin-1"))]
    except ValueError:
        raise ValueError(b"unbalanced quotes in request") from None


ENCODERS: dict[type, Callable[[Any], bytes]] = {
    bytes: lambda value: b"$%d\r\n%b\r\n" % (len(value), value),
    int: lambda number: b":%d\r\n" % number,
    list: lambda values: b"*%d\r\n" % len(values) + b"".join(ENCODERS[type(v)](v) for v in values),
    str: lambda status: b"+%b\r\n" % status.encode(),
    type(None): lambda _: b"$-1\r\n",
}
NONE, ONE, TWO = range(1, 2), range(2, 3), range(3, 4)  # words after the command's name
ANY, SOME, MORE = (range(least, 9**9) for least in (1, 2, 3))  # none, one, two or more
COMMANDS: dict[bytes, tuple[range, Callable[..., Any]]] = {
    b"client setinfo": (range(4, 5), lambda self, *_: "OK"),
    b"client setname": (TWO, lambda self, *_: "OK"),
    b"command": (NONE, lambda self: [[n, a[0], [], 0, 0, 0] for n, (a, _) in COMMANDS.items()]),
    b"config get": (MORE, lambda self, *names: [x for n in names for x in SETTINGS.get(n, ())]),
    b"decr": (ONE, lambda self, key: self.add(key, -1)),
    b"decrby": (TWO, lambda self, key, amount: self.add(key, -integer(amount))),
    b"del": (SOME, lambda self, *keys: sum(self.entries.pop(k, (0, 0))[1] > now() for k in keys)),
    b"echo": (ONE, lambda self, text: text),
    b"exists": (SOME, lambda self, *keys: sum(self.get(key) is not ABSENT for key in keys)),
    b"expire": (TWO, KeyValueHandler.expire),
    b"flushall": (range(1, 3), lambda self, mode=b"sync": self.entries.clear() or "OK"),
    b"get": (ONE, lambda self, key: self.get(key)[0]),
    b"incr": (ONE, lambda self, key: self.add(key, 1)),
    b"incrby": (TWO, lambda self, key, amount: self.add(key, integer(amount))),
    b"info": (ANY, lambda self, *_: b"redis_version:7.0\r\ndb0:keys=%d\r\n" % len(self.keys(b"*"))),
    b"keys": (ONE, KeyValueHandler.keys),
    b"mget": (SOME, lambda self, *keys: [self.get(key)[0] for key in keys]),
    b"mset": (range(3, 9**9, 2), lambda self, *pairs: max(map(self.put, pairs[::2], pairs[1::2]))),
    b"ping": (range(1, 3), lambda self, text="PONG": text),
    b"quit": (ANY, lambda self, *_: self.rfile.close() or "OK"),
    b"select": (ONE, lambda self, n: integer(n, b"DB index is out of range", range(1)) or "OK"),
    b"set": (MORE, KeyValueHandler.set),
    b"ttl": (ONE, KeyValueHandler.ttl),
}

if __name__ == "__main__":
    port = sys.argv[1] if len(sys.argv) > 1 else "6380"
    portico.ThreadingTCPServer.allow_reuse_address = True
    portico.ThreadingTCPServer.daemon_threads = True  # no client keeps the program from ending
    try:
        server = portico.ThreadingTCPServer(("127.0.0.1", int(port)), KeyValueHandler)
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"cannot serve on port {port}: {error}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.shutdown())
    ready = "Try: redis-cli -p {0} set a 1, or: redis-benchmark -p {0} -t set,get -n 20000 -q"
    print(ready.format(server.server_address[1]), flush=True)
    with server:
        server.serve_forever()
