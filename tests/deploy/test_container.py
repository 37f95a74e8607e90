"""The recipe of the image, read by hadolint; its commands, run here where there is no container."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from tests.deploy.places import DEPLOY, LAST_WORDS, option, serving, tool
from tests.support import ROOT, eventually

RECIPE = DEPLOY / "container" / "Containerfile"


def instructions(name: str) -> list[str]:
    """What follows each instruction of a name, its continued lines joined."""
    text = RECIPE.read_text().replace("\\\n", " ")
    return [match.strip() for match in re.findall(rf"^{name} (.*)$", text, re.MULTILINE)]


def final(name: str) -> list[str]:
    """The last instruction of a name, which is a list."""
    found: list[str] = json.loads(instructions(name)[-1])
    return found


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [tool("hadolint"), str(RECIPE)], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    wrong = tmp_path / "Containerfile"
    wrong.write_text("FROM python\nRUN cd /tmp && pip install portico\nUSER root\n")
    done = subprocess.run([tool("hadolint"), str(wrong)], check=False, capture_output=True)
    assert done.returncode == 1


def test_it_does_not_run_as_root() -> None:
    """By a number: Kubernetes' runAsNonRoot cannot look up a name."""
    user, group = instructions("USER")[-1].split(":")
    assert int(user) > 0
    assert int(group) > 0


def test_what_it_copies_is_there_and_not_ignored() -> None:
    """The builder is not sent what the ignore file leaves out."""
    ignored = RECIPE.with_name("Containerfile.dockerignore").read_text()
    kept = [line[1:] for line in ignored.splitlines() if line.startswith("!")]
    (application,) = [each for each in instructions("ARG") if each.startswith("APPLICATION=")]
    copied = [each.split()[:-1] for each in instructions("COPY") if not each.startswith("--from")]
    for name in [name for names in copied for name in names]:
        source = name.replace("${APPLICATION}", application.removeprefix("APPLICATION="))
        assert (ROOT / source).exists(), source
        assert any(source == each or source.startswith(f"{each}/") for each in kept), source


def test_its_command_serves_and_its_health_check_fails_when_draining_starts(
    tmp_path: Path,
) -> None:
    arguments = final("CMD")
    assert final("ENTRYPOINT") == ["portico", "serve"]
    check = json.loads(instructions("HEALTHCHECK")[0].partition(" CMD ")[2])

    def is_healthy(port: int) -> bool:
        command = [tool("python"), *(each.replace("9000", str(port)) for each in check[1:])]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    with serving(tmp_path, arguments) as service:
        assert is_healthy(service.port)
        with service.draining():
            eventually(lambda: not is_healthy(service.port), "the check fails")


def test_the_time_that_is_asked_of_the_runtime_is_longer_than_the_drain() -> None:
    asked = re.search(r"--stop-timeout (\d+)", RECIPE.read_text())
    assert asked is not None
    assert int(asked[1]) > option(final("CMD"), "--drain-timeout") + LAST_WORDS
