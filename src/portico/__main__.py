"""Make ``python -m portico`` the command ``portico``."""

from portico.cli import main

if __name__ == "__main__":
    main()
