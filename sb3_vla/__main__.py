"""``python -m sb3_vla`` is ``sb3-vla``."""

import sys


def main() -> int:
    """Entry point of both; returns the exit status."""
    if sys.argv[1:2] == ["doctor"]:  # without the imports of the other commands, which may be what fails
        from sb3_vla.cli.doctor import main as doctor

        return doctor(sys.argv[2:])
    from sb3_vla.cli.main import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
