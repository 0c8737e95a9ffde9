"""The program `pyluo`, which `python -m pyluo` runs as well."""

from __future__ import annotations

import sys

__all__ = ["main"]

# The values in pyluo.cli.exit, which may be what cannot be imported.
_UNAVAILABLE, _UNTESTABLE = 69, 125


def main() -> int:
    """Run the command line and return the exit status.

    If pyluo is broken, for example because its extension is not built, the status is not 1, which
    `git bisect run` would take for a bad commit.
    """
    try:
        from pyluo.cli import main as run
    except Exception:
        import traceback

        traceback.print_exc()
        return _UNTESTABLE if sys.argv[1:3] == ["vm", "bisect"] else _UNAVAILABLE
    return run()


if __name__ == "__main__":
    sys.exit(main())
