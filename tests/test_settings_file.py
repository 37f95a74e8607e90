from __future__ import annotations

from pathlib import Path

import pytest

from portico.address import parse
from portico.errors import PorticoError
from portico.layers import Layer, Values
from portico.settings_file import SettingsFile

THREE = """
workers = 2
idle_timeout = 60
target = "app:Echo"

[services.web]
addresses = ["tls://:443", "tcp://:80"]
idle_timeout = "none"

[services.name-server]
target = "names.py:Names"
addresses = "udp://:53"
"""


def plain(values: Values) -> dict[str, object]:
    return {name: given.value for name, given in values.items()}


def read(folder: Path, text: str, name: str = "portico.toml") -> Layer:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return SettingsFile.named(name, folder).read()


def refused(folder: Path, text: str | bytes, name: str = "portico.toml") -> str:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(PorticoError) as caught:
        SettingsFile.named(name, folder).read()
    return str(caught.value)


def test_a_file_has_settings_for_all_and_a_table_for_each_service(tmp_path: Path) -> None:
    layer = read(tmp_path, THREE)
    assert plain(layer.general) == {"workers": 2, "idle_timeout": 60, "target": "app:Echo"}
    assert {name: plain(values) for name, values in layer.services.items()} == {
        "web": {"addresses": (parse("tls://:443"), parse("tcp://:80")), "idle_timeout": None},
        "name-server": {"target": "names.py:Names", "addresses": (parse("udp://:53"),)},
    }
    assert str(layer.general["workers"].origin) == "portico.toml: workers"
    own = layer.services["name-server"]["target"].origin
    assert (str(own), own.is_general) == ("portico.toml: services.name-server.target", False)


def test_the_file_of_a_project_has_a_table_for_it(tmp_path: Path) -> None:
    text = THREE.replace("[services", "[tool.portico.services").lstrip()
    layer = read(tmp_path, f"[project]\nname = 'x'\n[tool.portico]\n{text}", "pyproject.toml")
    assert layer.general["workers"].value == 2
    given = layer.services["web"]["idle_timeout"]
    assert str(given.origin) == "pyproject.toml: tool.portico.services.web.idle_timeout"
    file = SettingsFile.named("pyproject.toml", tmp_path)
    assert file.place("web") == "pyproject.toml: tool.portico.services.web"


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "") == Layer()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('idle_timeout = "x"', 'idle_timeout = "x": expected a number of seconds, or "none" for'),
        ("idel_timeout = 5", 'idel_timeout = 5: expected the name of a setting: "idle_timeout"'),
        ("idle-timeout = 5", 'idle-timeout = 5: expected the name of a setting: "idle_timeout"'),
        ('address = ":1"', 'address = ":1": expected the name of a setting: "addresses"'),
        ("[service.web]", 'service = {web = {}}: expected the name of a setting: "services"'),
        ("frobnicate = 5", 'frobnicate = 5: expected the name of a setting: one of "workers", '),
        ("services = 5", "services = 5: expected tables such as [services.web]"),
        ("[[services]]", "services = [{}]: expected tables such as [services.web]"),
        ("[services]\nweb = 5", "services.web = 5: expected a table [services.web]"),
        ('[services."a b"]', 'services."a b": expected a name of letters, digits and hyphens'),
        ("[services.2]", "services.2: expected a name of letters, digits and hyphens"),
        (
            "[services.web]\nidel_timeout = 5",
            'services.web.idel_timeout = 5: expected the name of a setting: "idle_timeout"',
        ),
        (
            "[services.web]\nworkers = 5",
            "services.web.workers = 5: expected it at the top of the file, since it holds for all",
        ),
        (
            '[services.web]\naddresses = ["tcp://:1", "x"]',
            'services.web.addresses = "x": expected tcp://HOST:PORT, tls://HOST:PORT',
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_key(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert refused(tmp_path, text).startswith(f"portico.toml: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = = 3", "portico.toml:1:5: Invalid value"),
        ("workers = 2\nworkers = 3\n", "portico.toml:2:12: Cannot overwrite a value"),
        ('workers = 2\nuser = "abc', "portico.toml:2:12: "),
        (b"workers = 2\n# \xff", "portico.toml:2: expected text in UTF-8"),
    ],
)
def test_what_is_no_toml_is_told_with_its_line_and_column(
    tmp_path: Path, text: str | bytes, expected: str
) -> None:
    assert refused(tmp_path, text).startswith(expected)


@pytest.mark.parametrize("value", ["[" * 3000, "9" * 5000])
def test_what_is_too_much_for_the_parser_is_an_error_of_the_file(
    tmp_path: Path, value: str
) -> None:
    assert refused(tmp_path, f"workers = {value}").startswith("portico.toml: expected no deeper")


def test_an_error_of_toml_without_a_place_is_told_without(tmp_path: Path) -> None:
    file = SettingsFile.named("portico.toml", tmp_path)
    assert str(file._malformed("something is wrong", "")) == "portico.toml: something is wrong"


@pytest.mark.parametrize("text", ["", "[tool.other]", "tool = 5", "[tool]\nportico = 5"])
def test_the_file_of_a_project_that_was_named_has_the_table(tmp_path: Path, text: str) -> None:
    message = "pyproject.toml: expected a table [tool.portico]"
    assert refused(tmp_path, text, "pyproject.toml") == message


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(PorticoError, match=r"^a\.toml: cannot read it: No such file or directory$"):
        SettingsFile.named("a.toml", tmp_path).read()


# --- where it is ------------------------------------------------------------------------


def test_the_file_is_looked_for_in_one_directory(tmp_path: Path) -> None:
    """A project's file counts if it has the table, and one of our own comes before it."""
    assert SettingsFile.found(tmp_path) is None
    project = tmp_path / "pyproject.toml"
    project.write_text("[project]\nname = 'x'\n")
    assert SettingsFile.found(tmp_path) is None
    project.write_text("[tool.portico]\n")
    assert SettingsFile.found(tmp_path) == SettingsFile.named("pyproject.toml", tmp_path)
    (tmp_path / "portico.toml").write_text("")
    assert SettingsFile.found(tmp_path) == SettingsFile.named("portico.toml", tmp_path)


RELATIVE = """
pid_file = "a.pid"
log_file = "none"
[services.web]
target = "app.py:Echo"
addresses = ["unix:a.sock", "unix:@name", "unix:/run/a.sock", "tls://:1"]
cert = "/etc/a.pem"
key = "../a.key"
[services.other]
target = "app:Echo"
"""


def test_paths_are_those_of_the_folder_of_the_file(tmp_path: Path) -> None:
    layer = read(tmp_path, RELATIVE, "etc/a.toml")
    assert plain(layer.general) == {"pid_file": "etc/a.pid", "log_file": None}
    assert plain(layer.services["web"]) == {
        "target": "etc/app.py:Echo",
        "addresses": (
            parse("unix:etc/a.sock"),
            parse("unix:@name"),
            parse("unix:/run/a.sock"),
            parse("tls://:1"),
        ),
        "cert": "/etc/a.pem",
        "key": "etc/../a.key",
    }
    assert plain(layer.services["other"]) == {"target": "app:Echo"}


def test_the_path_of_a_socket_has_its_folder_before_it_when_it_is_measured(
    tmp_path: Path,
) -> None:
    folder = "d" * 110
    (tmp_path / folder).mkdir()
    file = refused(tmp_path, 'addresses = ["unix:run.sock"]', f"{folder}/portico.toml")
    assert file == (
        f'{folder}/portico.toml: addresses = "unix:{folder}/run.sock": '
        "expected a path of at most 107 bytes (this one has 119)"
    )


@pytest.mark.parametrize(
    ("folder", "expected"), [("@conf", "./@conf/run.sock"), ("//etc", "/etc/run.sock")]
)
def test_a_folder_is_no_abstract_name_and_no_host(folder: str, expected: str) -> None:
    file = SettingsFile.named(f"{folder}/portico.toml", Path())
    assert file._address(parse("unix:run.sock")) == parse(f"unix:{expected}")


def test_in_the_current_directory_paths_stay_as_they_are(tmp_path: Path) -> None:
    """Short, as a Unix address has to be, and as on the command line."""
    web = plain(read(tmp_path, RELATIVE).services["web"])
    assert (web["target"], web["key"]) == ("app.py:Echo", "../a.key")


def test_a_file_is_found_again_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler's module may go elsewhere before the file is read anew."""
    (tmp_path / "portico.toml").write_text("workers = 3")
    file = SettingsFile.found(tmp_path)
    monkeypatch.chdir("/")
    assert file is not None
    assert plain(file.read().general) == {"workers": 3}
