"""The benchmarks measure what they say: tried with runs that are too short to mean anything."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Thread
from xml.etree import ElementTree as ET

import pytest

from benchmarks import loads, machine, plot
from benchmarks.events_cost import REQUESTS, measure_events
from benchmarks.loads import Load, LoadFailed
from benchmarks.peers import PEERS, Peer, sequential
from benchmarks.process import Server
from benchmarks.report import Finding, render_markdown, render_text, table
from benchmarks.rounds import Sample, in_rounds, measure, summarise
from benchmarks.side_by_side import in_turns
from benchmarks.toolchain import generator
from benchmarks.works import WORKS, Result, Scale

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
ECHO = WORKS[0]

needs_cc = pytest.mark.skipif(
    shutil.which("cc") is None, reason="the load generators are C, and there is no compiler"
)


def benchmarks(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def sample(peer: str, number: int, cost: float, size: float | None = None) -> Sample:
    load = Load(1000, 0, 2.0, cost * 1000, 0.001, 0.002, 0.003)
    return Sample("echo", peer, number, cost, Result(load, size))


@needs_cc
def test_one_command_measures_servers_and_keeps_the_results(tmp_path: Path) -> None:
    """A table on the terminal, and table, samples and plot in the folder."""
    works = ("echo", "pipelined", "connect", "datagram", "idle")
    chosen = [f"--work={work}" for work in works]
    servers = ["--server=limit", "--server=standard", "--server=portico-threads"]
    scale = ["--rounds=2", "--seconds=0.05", "--connections=4", "--idle=10"]
    done = benchmarks("run", *chosen, *servers, *scale, f"--results={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "ratio to C, epoll" in done.stdout
    markdown = (tmp_path / "measurements.md").read_text()
    for title in ("C, epoll", "standard library, threads", "portico, threads"):
        assert title in done.stdout
        assert f"| {title} |" in markdown
    samples = json.loads((tmp_path / "measurements.json").read_text())["samples"]
    assert {(one["work"], one["peer"], one["round"]) for one in samples} == {
        (work, peer, number)
        for work in works
        for peer in ("limit", "standard", "portico-threads")
        for number in (0, 1)
    }
    assert all(one["cost"] > 0 and one["result"]["load"]["p50"] > 0 for one in samples)
    ET.parse(tmp_path / "measurements.svg")


@needs_cc
def test_two_workers_are_compared_with_one() -> None:
    """They compute more, whatever else the machine does, and are both loaded."""
    done = benchmarks("workers", "--pairs=1", "--seconds=0.3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "1 ms of computing, on all cores",
        "1 ms of computing, a connection each, on all cores",
        "Echo, workers and load on a core each",
        "Connect, echo, close, on a core each",
    ]
    assert all("times as many messages" in line for line in lines)


@needs_cc
def test_two_servers_are_compared_side_by_side() -> None:
    """The exit status says whether a limit was kept; a ratio of two like servers is near 1."""
    compare = ["compare", *["socketserver:ThreadingTCPServer"] * 2, "--work=echo"]
    scale = ["--pairs=1", "--seconds=0.05", "--connections=4"]
    done = benchmarks(*compare, *scale, "--at-most=100")
    assert done.returncode == 0, done.stderr
    assert "Echo of 64 bytes: " in done.stdout
    done = benchmarks(*compare, *scale, "--at-most=0.01")
    assert done.returncode == 1
    assert "above 0.01" in done.stderr


def test_what_cannot_be_imported_is_not_compared() -> None:
    """The message says which name is missing."""
    done = benchmarks("compare", "socketserver:TCPServer", "socketserver:Sky", "--work=echo")
    assert done.returncode == 1
    assert "cannot import name 'Sky'" in done.stderr


def test_a_peer_that_is_not_installed_is_skipped_with_a_word() -> None:
    """So that one command works everywhere."""
    absent = Peer("absent", "The absent one", {"echo": sequential("not_installed:Server", "echo")})
    words: list[str] = []
    scale = Scale(machine.choose_cores())
    assert measure(ECHO, [absent], 1, scale, sys.executable, words.append) == []
    assert words == [
        "echo: The absent one is skipped: ModuleNotFoundError: No module named 'not_installed'"
    ]


@needs_cc
def test_a_server_that_fails_is_left_out_with_its_last_word() -> None:
    """Here it has no such role."""
    command = [sys.executable, "-c", "raise SystemExit('no such role')"]
    failing = Peer("failing", "The failing one", {"echo": lambda _: command})
    words: list[str] = []
    scale = Scale(machine.choose_cores())
    assert measure(ECHO, [failing], 2, scale, sys.executable, words.append) == []
    assert words == ["echo: The failing one failed: no such role"]


class Shout(BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1024):
            self.request.sendall(data.upper())


@needs_cc
@pytest.mark.parametrize(
    "arguments", [["messages", "{port}", "2", "64", "64", "1"], ["hold", "{port}", "2"]]
)
def test_a_generator_reports_a_server_that_answers_wrongly(arguments: list[str]) -> None:
    """What it counts are right answers, not bytes."""
    with ThreadingTCPServer(("127.0.0.1", 0), Shout) as server:
        server.daemon_threads = True
        serving = Thread(target=server.serve_forever)
        serving.start()
        try:
            name, *rest = (part.format(port=server.server_address[1]) for part in arguments)
            pid = [] if name == "hold" else ["1"]
            done = subprocess.run(
                [generator(name), *rest, *pid], capture_output=True, text=True, check=False
            )
        finally:
            server.shutdown()
            serving.join()
    assert (done.returncode, done.stderr) == (1, "the reply is not what was sent\n")


@needs_cc
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["messages"], "usage: messages PORT"),
        (["messages", "0", "1", "64", "64", "1", "1"], "PORT=0: expected"),
        (["messages", "80", "1", "64", "65", "1", "1"], "LINE_BYTES=65: expected"),
        (["connections", "80", "many", "1", "1"], "CONCURRENCY=many: expected"),
        (["datagrams", "80", "1", "64", "0", "1"], "SECONDS=0: expected"),
        (["hold", "80", "1.5"], "CONNECTIONS=1.5: expected"),
    ],
)
def test_a_generator_refuses_wrong_arguments(arguments: list[str], word: str) -> None:
    """By name, and with the exit status of a wrong usage."""
    name, *rest = arguments
    done = subprocess.run([generator(name), *rest], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(word)


@needs_cc
def test_a_load_on_a_port_where_nobody_listens_fails() -> None:
    """And names the generator and the error."""
    command = [sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"]
    with (
        Server(command, machine.choose_cores().server, {}) as silent,
        pytest.raises(LoadFailed, match=r"messages: connect: Connection refused"),
    ):
        loads.send_messages(silent, machine.choose_cores().load, 1, 64, 64, 0.05)


def test_ratios_are_made_within_a_round_and_the_median_counts() -> None:
    """Rounds in which the whole machine was slow change no ratio."""
    samples = [
        *(sample("limit", number, cost) for number, cost in enumerate((1e-5, 5e-5, 2e-5))),
        *(sample("ours", number, cost) for number, cost in enumerate((2e-5, 10e-5, 8e-5))),
        sample("ours", 3, 1.0),  # a round in which the reference is missing
    ]
    limit, ours = summarise(samples, "limit")
    assert (limit.peer, limit.ratio) == ("limit", 1.0)
    assert ours.ratios == pytest.approx((2.0, 2.0, 4.0))
    assert ours.ratio == pytest.approx(2.0)
    assert ours.cost == pytest.approx(9e-5)
    assert ours.throughput == pytest.approx(500.0)


def test_every_round_begins_with_another_server() -> None:
    """Whoever follows a heavy load would otherwise do so in every round."""
    first, second, third = (Peer(name, name, {}) for name in "abc")
    assert [(number, peer.name) for number, peer in in_rounds([first, second, third], 2)] == [
        *((0, "a"), (0, "b"), (0, "c")),
        *((1, "b"), (1, "c"), (1, "a")),
    ]


def test_turns_favour_neither_server() -> None:
    """A machine that becomes slower adds as much to the one as to the other."""
    turns = list(in_turns(6))
    places = {who: [place for place, turn in enumerate(turns) if turn == who] for who in (0, 1)}
    assert len(places[0]) == len(places[1]) == 6
    assert sum(places[0]) == sum(places[1])


def test_a_table_leaves_out_what_nobody_measured() -> None:
    """Memory, p99.9 and failures have a column only where there is something to say."""
    samples = [sample("limit", 0, 1e-5), sample("ours", 0, 2.5e-5)]
    heading, limit, ours = table(Finding(ECHO, samples), {"limit": "C", "ours": "Ours"})
    assert heading[:5] == ["server", "ratio to C", "from - to", "µs for a message", "a second"]
    assert heading[5:] == ["p50 ms", "p99 ms", "p99.9 ms"]
    assert limit == ["C", "1.00", "1.00 - 1.00", "10.0", "500", "1.00", "2.00", "3.00"]
    assert ours == ["Ours", "2.50", "2.50 - 2.50", "25.0", "500", "1.00", "2.00", "3.00"]
    held = table(Finding(ECHO, [sample("limit", 0, 1e-5, size=8192.0)]), {})
    assert (held[0][-1], held[1][-1]) == ("KB a connection", "8.0")


def test_tables_are_drawn_for_a_terminal_and_for_markdown() -> None:
    """Figures are aligned to the right in both."""
    rows = [["server", "ratio"], ["C", "1.00"], ["Ours", "12.50"]]
    assert render_text(rows) == "server  ratio\nC        1.00\nOurs    12.50"
    assert render_markdown(rows) == (
        "| server | ratio |\n| --- | ---: |\n| C | 1.00 |\n| Ours | 12.50 |"
    )


def test_the_table_of_redis_benchmark_is_read() -> None:
    """Commands run one after the other: their times add up, the slower one's latencies count."""
    output = (
        '"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms",'
        '"p99_latency_ms","max_latency_ms"\n'
        '"SET","20000.00","1.0","0.1","0.9","1.2","1.5","3.0"\n'
        '"GET","10000.00","2.0","0.1","1.9","2.2","2.5","4.0"\n'
    )
    load = loads.read_redis_benchmark(output, requests=10_000, processor_seconds=0.5)
    assert load.messages == 20_000
    assert load.p999 is None
    assert [load.seconds, load.p50, load.p99] == pytest.approx([1.5, 0.0019, 0.0025])
    assert load.cost == pytest.approx(25e-6)
    with pytest.raises(LoadFailed):
        loads.read_redis_benchmark("", requests=1, processor_seconds=0.0)


def test_a_plot_is_well_formed_whatever_the_names_are() -> None:
    """Names and titles are text, not markup."""
    bars = [plot.Bar("a <b> & c", "own", 2.0, 1.5, 9.0), plot.Bar("limit", "reference", 1, 1, 1)]
    svg = plot.draw("<title>", "&", [plot.Panel("one", 2, bars), plot.Panel("two", 1, bars[:1])])
    texts = [element.text for element in ET.fromstring(svg).iter()]
    assert "a <b> & c" in texts
    assert texts.count("2.00") == 1


def test_events_that_nobody_subscribed_to_are_not_built() -> None:
    """Somebody subscribed: two events a request.  Nobody: none, not one."""
    cost = measure_events()
    assert cost.built_unheard == 0
    assert cost.built_heard == 2 * REQUESTS


def test_peers_and_works_fit_together() -> None:
    """Every work has a reference that can do it, and portico beside the standard library."""
    roles = {peer.name: set(peer.programs) for peer in PEERS}
    for work in WORKS:
        for name in (work.reference, "portico-green", "portico-threads", "standard"):
            assert work.role in roles[name], (work.name, name)
