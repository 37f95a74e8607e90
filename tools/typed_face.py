"""Check that every name of portico's public face has a complete, unambiguous type.

Runs pyright's `--verifytypes`, which takes every module for public, and keeps what belongs to the
names in `portico.__all__`: the classes with their members, and the modules.

    python -m tools.typed_face
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import portico


def face() -> tuple[str, ...]:
    """Return where the public names are defined, such as ``portico.families.TCPServer``."""
    values = (getattr(portico, name) for name in portico.__all__)
    return tuple(
        value.__name__
        if isinstance(value, ModuleType)
        else f"{value.__module__}.{value.__qualname__}"
        for value in values
    )


def symbols() -> list[dict[str, Any]]:
    """Return what pyright says of each symbol of the package."""
    # In this mode pyright looks for the package with the first Python on PATH, and no other.
    here = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
    command = (here / "pyright", "--verifytypes", "portico", "--ignoreexternal", "--outputjson")
    answer = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    found: list[dict[str, Any]] = json.loads(answer.stdout)["typeCompleteness"]["symbols"]
    return found


def main() -> int:
    """Print what is wrong with the face; fail when anything is."""
    public = face()
    checked = [
        symbol
        for symbol in symbols()
        if any(f"{symbol['name']}.".startswith(f"{name}.") for name in public)
    ]
    incomplete = [
        symbol for symbol in checked if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]
    ]
    for symbol in incomplete:
        print(symbol["name"])
        for diagnostic in symbol["diagnostics"]:
            print(f"  {diagnostic['message']}")
    print(f"{len(checked)} public symbols, {len(incomplete)} without a complete type")
    # None at all would mean that pyright did not find the package.
    return not checked or bool(incomplete)


if __name__ == "__main__":
    sys.exit(main())
