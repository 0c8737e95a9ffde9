from __future__ import annotations

import os

# Each of pytester's runs has a home of its own, where no kernel is cached.
os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")

pytest_plugins = ["pytester"]
