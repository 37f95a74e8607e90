"""What the program itself does that does not go with how it is run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from portico.configuration import Configuration, ServiceSettings
from portico.doctor.facts import Facts, TargetFacts, Trial
from portico.doctor.findings import Finding, fail, ok, warn

EXTRAS: Final = (("watchfiles", "reload", "portico serve --reload"),)
"""Packages that something needs: the package, the extra that brings it, and for what."""

FORKED: Final = "a child has a copy of every lock, and none of the threads that would release it"


def account(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether the processes can become whom they are to be."""
    found = facts.account
    if found is None:
        return
    if found.problem:
        yield fail(
            "account",
            found.problem,
            "a user and a group that are there, and root to become them",
            "make the user (`useradd --system`), or start it as root, or leave user and group out",
        )
    else:
        yield ok("account", f"it becomes {found.words}")


def workers(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether what is said of workers is said to some."""
    for name in configuration.process.unused():
        yield warn(
            "workers",
            f"{name} = {getattr(configuration.process, name)}, and no workers",
            "workers, of which it says when one is replaced",
            "set workers, or leave it out",
        )


def files(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether the files of the processes can be had, and the owners of their sockets."""
    for each in facts.files:
        if each.problem:
            yield fail(
                "file",
                f"{each.setting} = {each.path}: {each.problem}",
                "a file that can be written",
                "make the directory for it, or give it to the user of the service, or name another",
            )
        elif each.holder:
            yield warn(
                "file",
                f"{each.holder} has {each.path} ({each.setting})",
                "nobody, unless this is the service that is asked about",
                "stop it before another one is started",
            )
        else:
            yield ok("file", f"{each.path} ({each.setting}) can be written")
    for service, problem in facts.owners.items():
        if problem:
            yield fail(
                "file",
                f"{service}: {problem}",
                "a user and a group of this machine to own its Unix sockets",
                "make them, or name others in socket_owner and socket_group",
            )


def targets(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether each handler can be imported, and what the trial has shown."""
    # Once for each: services may share a target, and mind different things of it if their engines
    # differ.
    several = {(each.target, each.settings.engine): each for each in configuration.services}
    for service in several.values():
        found = facts.targets.get(service.target)
        if found is None:
            continue
        if found.problem:
            yield fail(
                "target", found.problem, "a handler that can be imported", "do what is said there"
            )
            continue
        yield ok("target", f"{service.target} can be imported")
        if found.trial is not None:
            yield from _of_trial(service, found.trial)


def _of_trial(service: ServiceSettings, trial: Trial) -> Iterator[Finding]:
    if trial.problem:
        yield fail(
            "trial", f"{service.target}: {trial.problem}", "a handler that serves", "mend it"
        )
        return
    for stall in trial.stalls:
        held = f"held its event loop for {stall.duration:.1f} s or more"
        where = f"at {stall.place}" if stall.place else "outside of the program's own files"
        found = f"{service.target} {held} {where}"
        if service.settings.engine == "green":
            yield warn(
                "trial",
                found,
                "a handler that lets others go on while it waits or computes",
                "portico.to_thread(...) around the call, portico.sleep in the place of "
                "time.sleep, no lock that is held while a handler waits for its client, "
                "another engine, or --hubs",
            )
        else:
            yield ok("trial", f"{found}; the {service.settings.engine} engine can bear that")
    if trial.failures:
        yield warn(
            "trial",
            f"{service.target} raised {', '.join(trial.failures)}",
            "a handler that answers what it was sent",
            "mend it, or give the trial something that it understands: --say TEXT",
        )
    if not trial.stalls and not trial.failures:
        counts = f"{trial.answered} of {trial.clients} requests ended"
        yield ok("trial", f"{service.target} held up nobody; {counts}")


def forks(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether anybody forks beside threads."""
    addresses = sum(len(each.addresses) for each in configuration.services)
    forking = [each for each in configuration.services if each.settings.engine == "forks"]
    for service in forking:
        found = facts.targets.get(service.target, TargetFacts())
        if found.threads:
            yield warn(
                "forks",
                f"{service.target} starts threads when it is imported "
                f"({', '.join(found.threads[:3])}), and {service.name} forks for each request",
                f"no threads before a fork: {FORKED}",
                "start them in the handler, or choose another engine",
            )
        if addresses > 1:
            yield warn(
                "forks",
                f"{service.name} forks for each request, and {addresses} addresses are served in "
                "a thread each",
                f"one address beside forks: {FORKED}",
                "run portico once for each address, or choose another engine",
            )
        elif not found.threads:
            yield ok("forks", f"{service.name} forks, and the program has no threads beside it")


def packages(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether what is used is installed."""
    for service in configuration.services:
        if service.settings.engine == "green" and facts.packages.get("greenlet") is False:
            yield fail(
                "packages",
                f"{service.name} needs greenlet for the green engine",
                "greenlet, which is installed with portico",
                "`pip install greenlet`",
            )
    for package, extra, use in EXTRAS:
        if package in facts.packages:
            is_there = facts.packages[package]
            state = "is installed" if is_there else f"is not; `pip install 'portico[{extra}]'`"
            yield ok("packages", f"{package} (for {use}) {state}")


RULES: Final = (account, workers, files, targets, forks, packages)
