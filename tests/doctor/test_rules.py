"""Each rule, with the facts as literals: a fault, and the healthy case beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from portico.address import parse
from portico.configuration import Configuration, ProcessSettings, ServiceSettings
from portico.doctor import RULES, judge
from portico.doctor.facts import (
    Account,
    AddressFacts,
    Allowance,
    Ceiling,
    Certificate,
    Facts,
    Kernel,
    Occupancy,
    Papers,
    Stall,
    TargetFacts,
    Trial,
)
from portico.doctor.findings import Finding, Severity
from portico.doctor.rules import Rule, capacity, network, program, tls
from portico.settings import Settings

FAIL, WARN, OK = Severity.FAIL, Severity.WARN, Severity.OK

TARGET = "app:Echo"
MIB = 1 << 20
NOW = 1_800_000_000.0
DAY = 86_400


def configured(
    *addresses: str, process: ProcessSettings | None = None, **settings: Any
) -> Configuration:
    """One service, at these addresses."""
    parsed = tuple(parse(each) for each in addresses or ("tcp://127.0.0.1:9000",))
    service = ServiceSettings(
        name="echo", target=TARGET, addresses=parsed, settings=Settings(**settings)
    )
    return Configuration(process=process or ProcessSettings(), services=(service,))


def said(rule: Rule, facts: Facts, configuration: Configuration) -> list[Severity]:
    return [each.severity for each in rule(facts, configuration)]


def only(findings: Iterator[Finding], severity: Severity) -> Finding:
    """The one finding of a severity."""
    (found,) = [each for each in findings if each.severity is severity]
    return found


def test_whatever_is_wrong_has_a_remedy() -> None:
    facts = Facts(
        kernel=Kernel(somaxconn=5, ephemeral_ports=(9000, 9100), conntrack=Ceiling(10, 9)),
        allowance=Allowance(descriptors=100, processors=1, tasks=(Ceiling(10),)),
        addresses=(AddressFacts(parse("tcp://127.0.0.1:9000"), Occupancy.REFUSED, "in use"),),
        targets={TARGET: TargetFacts(problem="no such module")},
    )
    findings = list(judge(facts, configured(max_connections=100)))
    wrong = [each for each in findings if each.severity is not OK]
    assert len(wrong) >= 7
    assert all(each.wanted and each.remedy for each in wrong)


def test_what_is_not_known_is_not_judged() -> None:
    """Of a machine that tells nothing, there is only what is known by itself."""
    assert {each.subject for each in judge(Facts(), configured())} == {"kernel"}


def test_every_rule_is_run() -> None:
    modules = (program, network, capacity, tls)
    assert set(RULES) == {rule for module in modules for rule in module.RULES}


# ---------------------------------------------------------------------------------------- network


def test_a_backlog_beyond_what_the_kernel_holds_is_cut() -> None:
    found = only(
        network.backlog(Facts(kernel=Kernel(somaxconn=128)), configured(backlog=1024)), WARN
    )
    assert "1024 asked for, and the kernel holds 128" in found.found
    assert "net.core.somaxconn=1024" in found.remedy


def test_a_backlog_that_the_kernel_holds_is_fine() -> None:
    facts = Facts(kernel=Kernel(somaxconn=4096, syncookies=True, max_syn_backlog=128))
    assert said(network.backlog, facts, configured()) == [OK]


def test_without_cookies_the_handshakes_are_a_limit_too() -> None:
    facts = Facts(kernel=Kernel(somaxconn=4096, syncookies=False, max_syn_backlog=128))
    assert "tcp_syncookies=1" in only(network.backlog(facts, configured()), WARN).remedy


def test_datagrams_have_no_backlog() -> None:
    facts = Facts(kernel=Kernel(somaxconn=1))
    assert said(network.backlog, facts, configured("udp://:9000")) == []


@pytest.mark.parametrize(
    ("occupancy", "severity"),
    [
        (Occupancy.FREE, OK),
        (Occupancy.STALE, OK),
        (Occupancy.OURS, WARN),
        (Occupancy.REFUSED, FAIL),
    ],
)
def test_an_address_is_as_good_as_it_can_be_had(occupancy: Occupancy, severity: Severity) -> None:
    facts = Facts(addresses=(AddressFacts(parse("unix:/run/a.sock"), occupancy, "why"),))
    assert said(network.addresses, facts, configured()) == [severity]


def test_an_address_that_is_given_twice_cannot_be_had_twice() -> None:
    twice = configured("tcp://:9000", "tcp://:9000")
    assert "given twice" in only(network.addresses(Facts(), twice), FAIL).found
    assert said(network.addresses, Facts(), configured("tcp://:0", "tcp://:0")) == []


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Kernel(ephemeral_ports=(32768, 60999), time_wait=100), [OK]),
        (Kernel(ephemeral_ports=(60000, 60999)), [WARN]),
        (Kernel(ephemeral_ports=(32768, 60999), time_wait=20_000), [WARN]),
        (Kernel(ephemeral_ports=(32768, 60999), time_wait=20_000, time_wait_reuse=2), [WARN]),
        (Kernel(ephemeral_ports=(32768, 60999), time_wait=20_000, time_wait_reuse=1), [OK]),
    ],
)
def test_clients_need_ports(kernel: Kernel, expected: list[Severity]) -> None:
    assert said(network.ephemeral, Facts(kernel=kernel), configured()) == expected


def test_a_port_that_clients_are_given_may_be_taken_when_the_service_starts() -> None:
    kernel = Kernel(ephemeral_ports=(32768, 60999))
    at_risk = configured("tcp://:40000")
    found = only(network.ephemeral(Facts(kernel=kernel), at_risk), WARN)
    assert "ip_local_reserved_ports=40000" in found.remedy
    reserved = replace(kernel, reserved_ports=((39_000, 41_000),))
    assert said(network.ephemeral, Facts(kernel=reserved), at_risk) == [OK]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (Ceiling(262_144, 10), [OK]),
        (Ceiling(262_144, 250_000), [WARN]),
        (Ceiling(1000, 10), [WARN]),  # fewer than there may be connections
        (None, []),
    ],
)
def test_the_firewall_remembers_every_connection(
    table: Ceiling | None, expected: list[Severity]
) -> None:
    facts = Facts(kernel=Kernel(conntrack=table), allowance=Allowance(descriptors=20_000))
    assert said(network.conntrack, facts, configured(max_connections=5000)) == expected


def test_unix_sockets_are_nothing_to_the_firewall() -> None:
    facts = Facts(kernel=Kernel(conntrack=Ceiling(1000, 10)))
    assert said(network.conntrack, facts, configured("unix:/run/a.sock")) == [OK]


def test_an_old_kernel_wakes_every_worker() -> None:
    facts = Facts(kernel=Kernel(release=(4, 4)))
    several = configured(process=ProcessSettings(workers=4))
    assert "EPOLLEXCLUSIVE" in only(network.kernel(facts, several), WARN).found
    assert said(network.kernel, facts, configured()) == [OK]
    assert said(network.kernel, facts, configured(engine="green", hubs=2)) == [WARN]
    assert said(network.kernel, Facts(kernel=Kernel(release=(6, 1))), several) == [OK]


def test_without_tcp_info_it_is_known_less_exactly_who_is_idle() -> None:
    facts = Facts(kernel=Kernel(has_tcp_info=False))
    assert "TCP_INFO" in only(network.kernel(facts, configured()), WARN).found


# --------------------------------------------------------------------------------------- capacity


def test_more_connections_than_descriptors_fail() -> None:
    facts = Facts(allowance=Allowance(descriptors=1024))
    crowded = configured("tcp://:9000", "tcp://:9001", max_connections=1000)
    found = only(capacity.descriptors(facts, crowded), FAIL)
    assert "2032" in found.wanted
    assert "LimitNOFILE=2032" in found.remedy
    assert said(capacity.descriptors, facts, configured(max_connections=900)) == [OK]


def test_auto_is_never_more_than_there_are_descriptors_for_but_may_be_few() -> None:
    assert said(
        capacity.descriptors, Facts(allowance=Allowance(descriptors=20_000)), configured()
    ) == [OK]
    few = only(
        capacity.descriptors(Facts(allowance=Allowance(descriptors=128)), configured()), WARN
    )
    assert "96 connections" in few.found


def test_without_a_limit_of_connections_the_descriptors_end_first() -> None:
    facts = Facts(allowance=Allowance(descriptors=1024))
    assert WARN in said(capacity.descriptors, facts, configured(max_connections=None))


@pytest.mark.parametrize("unlimited", [None, -1])
def test_descriptors_without_a_limit_are_enough(unlimited: int | None) -> None:
    facts = Facts(allowance=Allowance(descriptors=unlimited))
    assert said(capacity.descriptors, facts, configured(max_connections=10**6)) == []


@pytest.mark.parametrize(
    ("settings", "workers", "needed"),
    [
        ({"engine": "threads", "max_connections": 300}, None, 300),
        ({"engine": "threads", "max_connections": 300}, 4, 300),
        ({"engine": "pool", "max_workers": 50}, 4, 200),
        ({"engine": "pool"}, None, 64),
        ({"engine": "forks"}, 4, 160),
        ({"engine": "forks", "max_connections": 10}, None, 10),
        ({"engine": "forks", "max_connections": None}, None, 40),
        ({"engine": "green", "hubs": 3}, 2, 6),
    ],
)
def test_every_engine_needs_room_for_what_it_starts(
    settings: dict[str, Any], workers: int | None, needed: int
) -> None:
    configuration = configured(process=ProcessSettings(workers=workers), **settings)
    enough = Facts(allowance=Allowance(tasks=(Ceiling(), Ceiling(needed + 7, 7, "pids.max"))))
    short = Facts(allowance=Allowance(tasks=(Ceiling(10**6), Ceiling(needed + 6, 7, "pids.max"))))
    assert said(capacity.tasks, enough, configuration) == [OK]
    found = only(capacity.tasks(short, configuration), FAIL)
    assert found.wanted.startswith(f"{needed} ")
    assert found.found.startswith("pids.max leaves room for")


def test_the_serial_engine_starts_nothing() -> None:
    facts = Facts(allowance=Allowance(tasks=(Ceiling(1, 1),)))
    assert said(capacity.tasks, facts, configured(engine="serial")) == []


@pytest.mark.parametrize(
    ("workers", "limits", "expected"),
    [
        (None, Allowance(processors=1), OK),
        (None, Allowance(processors=8), OK),
        (8, Allowance(processors=8), OK),
        (9, Allowance(processors=8), WARN),
        ("auto", Allowance(processors=8), OK),
        ("auto", Allowance(processors=8, quota=1.5), WARN),
        (2, Allowance(processors=8, quota=1.5), OK),
        (3, Allowance(processors=8, quota=1.5), WARN),
        (8, Allowance(processors=8, quota=16.0), OK),
    ],
)
def test_workers_are_as_many_as_can_run(
    workers: Any, limits: Allowance, expected: Severity
) -> None:
    configuration = configured(process=ProcessSettings(workers=workers))
    assert said(capacity.processors, Facts(allowance=limits), configuration) == [expected]


def test_auto_does_not_know_of_a_quota() -> None:
    configuration = configured(process=ProcessSettings(workers="auto"))
    facts = Facts(allowance=Allowance(processors=8, quota=1.5))
    found = only(capacity.processors(facts, configuration), WARN)
    assert (
        found.found
        == "auto, which is 8, workers on 1.5 of 8 processors (the quota of the container)"
    )
    assert "workers = 2" in found.remedy


def test_workers_together_need_their_memory() -> None:
    process = ProcessSettings(workers=4, max_worker_memory=300 * MIB)
    short, enough = (
        Facts(allowance=Allowance(memory=Ceiling(most * MIB, source="memory.max")))
        for most in (512, 2048)
    )
    found = only(capacity.memory(short, configured(process=process)), WARN)
    assert found.found == "4 x 300 MiB of workers, and 512 MiB (memory.max)"
    assert said(capacity.memory, enough, configured(process=process)) == [OK]
    assert said(capacity.memory, short, configured()) == []


# ------------------------------------------------------------------------------------ certificates

LEAF = Certificate(
    subject="www", issuer="one", name="www", not_before=NOW - DAY, not_after=NOW + 60 * DAY
)
ONE = replace(LEAF, subject="one", issuer="two", name="one")
TWO = replace(LEAF, subject="two", issuer="two", name="two")
PAPERS = Papers(certificate="c.pem", key="k.pem", moment=NOW, key_mode=0o600, chain=(LEAF, ONE))


def of_papers(**changes: Any) -> list[Finding]:
    facts = Facts(papers={"echo": replace(PAPERS, **changes)})
    return [each for each in tls.papers(facts, configured()) if each.severity is not OK]


def test_a_certificate_that_is_right_is_fine() -> None:
    assert of_papers() == []
    assert of_papers(chain=(LEAF, ONE, TWO)) == []


@pytest.mark.parametrize(
    ("change", "severity", "words"),
    [
        ({"not_before": NOW + 5 * DAY}, FAIL, "is not valid before 2027-01-20"),
        ({"not_after": NOW - 1}, FAIL, "expired on 2027-01-15"),
        ({"not_after": NOW + 5 * DAY + 1}, WARN, "expires in 5 days"),
    ],
)
def test_a_certificate_has_its_time(change: dict[str, Any], severity: Severity, words: str) -> None:
    (found,) = of_papers(chain=(replace(LEAF, **change),))
    assert (found.severity, words in found.found) == (severity, True)
    (authority,) = of_papers(authorities=(replace(TWO, **change),))
    assert "in client_ca" in authority.found


def test_a_chain_in_another_order_is_not_believed_by_everybody() -> None:
    (found,) = of_papers(chain=(LEAF, TWO, ONE))
    assert (found.severity, found.found) == (
        FAIL,
        "c.pem: after www comes two, which is not its issuer",
    )


@pytest.mark.parametrize(
    ("mode", "severity"),
    [(0o600, None), (0o400, None), (0o640, None), (0o660, WARN), (0o644, FAIL), (None, None)],
)
def test_a_key_is_for_those_who_serve(mode: int | None, severity: Severity | None) -> None:
    assert [each.severity for each in of_papers(key_mode=mode)] == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("uid", "mode", "can"),
    [
        (33, 0o600, True),
        (34, 0o600, False),
        (35, 0o640, True),
        (36, 0o640, False),
        (33, 0o040, False),  # the owner is nobody else
        (0, 0o600, True),
    ],
)
def test_a_key_can_be_read_by_whom_the_service_becomes(uid: int, mode: int, can: bool) -> None:
    account = Account(words=f"user {uid}", uid=uid, gid=35 if uid == 35 else 1)
    papers = replace(PAPERS, key_mode=mode, key_owner=(33, 35))
    facts = Facts(papers={"echo": papers}, account=account)
    wrong = [each for each in tls.papers(facts, configured()) if each.severity is not OK]
    assert [each.found for each in wrong] == (
        [] if can else [f"user {uid} may not read k.pem (mode {mode:04o})"]
    )


def test_files_that_cannot_be_used_fail() -> None:
    (found,) = of_papers(problem="k.pem: this key does not belong to the certificate")
    assert found.severity is FAIL


# ----------------------------------------------------------------------------------------- program


def test_what_is_said_of_workers_is_said_to_some() -> None:
    alone = configured(process=ProcessSettings(max_requests=5))
    assert "max_requests = 5, and no workers" in only(program.workers(Facts(), alone), WARN).found
    several = configured(process=ProcessSettings(max_requests=5, workers=2))
    assert said(program.workers, Facts(), several) == []


def test_whom_the_processes_become_is_there() -> None:
    missing = Facts(account=Account(words="nobody-here", problem="there is no such user"))
    assert said(program.account, missing, configured()) == [FAIL]
    assert said(program.account, Facts(account=Account(words="user www")), configured()) == [OK]
    assert said(program.account, Facts(), configured()) == []


def test_a_target_that_cannot_be_imported_fails() -> None:
    facts = Facts(targets={TARGET: TargetFacts(problem="there is no module 'app'")})
    assert said(program.targets, facts, configured()) == [FAIL]


def test_a_target_of_several_services_is_judged_once() -> None:
    facts = Facts(targets={TARGET: TargetFacts()})
    one = configured()
    both = replace(one, services=(*one.services, replace(one.services[0], name="other")))
    assert said(program.targets, facts, both) == [OK]


def tried(**results: Any) -> Facts:
    return Facts(targets={TARGET: TargetFacts(trial=Trial(clients=4, answered=4, **results))})


def test_a_handler_that_blocks_holds_up_others_on_an_event_loop_alone() -> None:
    facts = tried(stalls=(Stall("app.py:7", 0.25),))
    found = only(program.targets(facts, configured(engine="green")), WARN)
    assert "app.py:7" in found.found
    assert "no lock that is held while a handler waits" in str(found.remedy)
    assert said(program.targets, facts, configured(engine="threads")) == [OK, OK]


def test_a_stall_in_a_library_is_told_without_a_line() -> None:
    facts = tried(stalls=(Stall("", 0.25),))
    found = only(program.targets(facts, configured(engine="green")), WARN)
    assert "0.2 s or more outside of the program's own files" in found.found


@pytest.mark.parametrize(
    ("results", "expected"),
    [({}, OK), ({"failures": ("ValueError",)}, WARN), ({"problem": "it was not served"}, FAIL)],
)
def test_a_trial_says_what_came_of_it(results: dict[str, Any], expected: Severity) -> None:
    assert said(program.targets, tried(**results), configured()) == [OK, expected]


def test_forks_and_threads_do_not_go_together() -> None:
    threaded = Facts(targets={TARGET: TargetFacts(threads=("poller",))})
    alone = Facts(targets={TARGET: TargetFacts()})
    forking = configured(engine="forks")
    assert "poller" in only(program.forks(threaded, forking), WARN).found
    assert said(program.forks, alone, forking) == [OK]
    assert said(program.forks, threaded, configured()) == []


def test_forks_at_several_addresses_are_beside_threads() -> None:
    several = configured("tcp://:9000", "tcp://:9001", engine="forks")
    assert "2 addresses" in only(program.forks(Facts(), several), WARN).found


def test_what_an_engine_needs_is_installed() -> None:
    green = configured(engine="green")
    assert said(program.packages, Facts(packages={"greenlet": False}), green) == [FAIL]
    assert said(program.packages, Facts(packages={"greenlet": True}), green) == []


@pytest.mark.parametrize(
    ("is_there", "words"), [(True, "is installed"), (False, "portico[reload]")]
)
def test_what_is_optional_is_named(is_there: bool, words: str) -> None:
    facts = Facts(packages={"watchfiles": is_there})
    assert words in only(program.packages(facts, configured()), OK).found
