from collections import Counter

from portico import events

ended: Counter[str] = Counter()


def count(event: events.ConnectionClosed) -> None:
    """Called in the thread that served the connection, so it returns at once."""
    ended[event.reason] += 1


stop_counting = events.subscribe(count, events.ConnectionClosed)
