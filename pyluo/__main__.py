"""The program `python -m pyluo`, which is the same as `pyluo`."""

from __future__ import annotations

import sys

from pyluo.cli import main

if __name__ == "__main__":
    sys.exit(main())
