"""Look for bytes that break the PROXY protocol parser: `make fuzz`.

The seeds in `corpus/proxy` are one header of each kind.
"""

import sys

import atheris

with atheris.instrument_imports(include=["portico.proxy", "tests.proxy_laws"]):
    from tests.proxy_laws import check


def main() -> None:
    """Run libFuzzer with the options of the command line."""
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
