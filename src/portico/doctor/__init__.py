"""Say what a machine and the settings really allow, with a remedy: ``portico doctor``.

`examine` collects the facts (`machine`, `cgroups`, `papers`, `occupancy`, `files`, `trial`), and
the rules (`rules`) say what follows from them.  Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from portico.configuration import Configuration
from portico.doctor import files, machine, occupancy, papers, trial
from portico.doctor.facts import Account, Facts, TargetFacts
from portico.doctor.findings import Finding
from portico.doctor.rules import Rule, capacity, network, program, tls
from portico.doctor.trial import TrialRequest

RULES: Final[tuple[Rule, ...]] = (
    *program.RULES,
    *network.RULES,
    *capacity.RULES,
    *tls.RULES,
)
"""What is looked at, in the order in which it is said."""


def examine(configuration: Configuration, request: TrialRequest | None = None) -> list[Finding]:
    """Look at everything.

    Args:
        configuration: What is to run.
        request: How the handlers are to be tried; ``None`` to import them alone.
    """
    return list(judge(collect(configuration, request), configuration))


def collect(configuration: Configuration, request: TrialRequest | None = None) -> Facts:
    """Read all facts; takes as long as importing the targets, and the trial, if there is one."""
    account = machine.read_account(configuration.process)
    found = {each.name: papers.read_papers(each.settings) for each in configuration.services}
    return Facts(
        kernel=machine.read_kernel(),
        allowance=machine.read_allowance(),
        account=account,
        papers={name: own for name, own in found.items() if own is not None},
        addresses=tuple(
            occupancy.look_at(address)
            for service in configuration.services
            for address in service.addresses
            if occupancy.is_known(address)
        ),
        files=files.look_at(configuration.process, account),
        owners=files.owner_problems(configuration),
        targets=_targets(configuration, request, account),
        packages=machine.read_packages(),
    )


def judge(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Say what follows from the facts."""
    for rule in RULES:
        yield from rule(facts, configuration)


def _targets(
    configuration: Configuration, request: TrialRequest | None, account: Account | None
) -> dict[str, TargetFacts]:
    """Have the targets imported, as whom they would be; not at all if that cannot be."""
    if account is not None and account.problem:
        return {}
    schemes: dict[str, list[str]] = {}
    for service in configuration.services:
        own = schemes.setdefault(service.target, [])
        own += [str(address.scheme) for address in service.addresses if occupancy.is_known(address)]
    return {
        name: trial.examine(name, own, request, account=account) for name, own in schemes.items()
    }
