"""Read Debian's archive with a private apt, beside the system's own.

The state of the system's own apt does not change: the sources list, the package lists and the cache
are private, and nothing is installed. The mirror is the same as the system's, and so are the
settings in apt.conf; signatures are checked against Debian's keyring.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm import cache, progress
from pyluo.vm.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

__all__ = [
    "command", "environment", "find_program", "first_error", "folder", "lock", "run",
    "source_lines", "update_lists", "use_suites",
]  # fmt: skip

_KEYRING_SUFFIXES = ("gpg", "pgp")  # up to Debian 12, and since Debian 13
_MIRROR = "PYLUO_DEBIAN_MIRROR"


def folder() -> Path:
    """Return the folder of the private apt."""
    return cache.folder() / "apt"


def lock() -> AbstractContextManager[None]:
    """Hold a lock in the block, which whoever uses the private apt needs."""
    return cache.lock("apt", lambda: progress.say("waiting for another run to read the archive"))


def update_lists(suite: str) -> bool:
    """Update the package lists of a suite, and return whether the suite can be read.

    If not, the user is told why. `use_suites` must be called afterwards.
    """
    use_suites([suite])
    # Without List-Cleanup=0, apt would remove the lists of the other suites.
    words = [*command("apt-get"), "-o", "APT::Get::List-Cleanup=0", "update"]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment()
    )
    if done.returncode == 0 and not re.search(r"^(E|W: Failed)", done.stderr, re.MULTILINE):
        return True
    progress.say(f"leaving out the suite {suite}: {first_error(done.stderr)}")
    return False


def use_suites(suites: Sequence[str]) -> None:
    """Make suites the ones whose packages the private apt knows."""
    lines = source_lines(suites)
    for name in ("lists/partial", "archives/partial", "packages"):
        (folder() / name).mkdir(parents=True, exist_ok=True)
    cache.write(folder() / "sources.list", "".join(f"{line}\n" for line in lines))


def source_lines(suites: Sequence[str]) -> list[str]:
    """Return the lines of a sources list for suites of Debian.

    Raises:
        HarnessError: the system's apt uses no Debian archive, or has not its keyring.
    """
    mirror, keyring = _find_mirror(), _find_keyring()
    return [f"deb [signed-by={keyring}] {mirror} {suite} main" for suite in suites]


def run(name: str, *arguments: str) -> str:
    """Run a program of apt on the private state, and return its output.

    Raises:
        HarnessError: the program is missing, or failed.
    """
    words = [*command(name), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise HarnessError(f"{name} failed ({first_error(done.stderr)})")
    return done.stdout


def first_error(complaint: str) -> str:
    """Return the first error among the messages of a program of apt."""
    lines = [line for line in complaint.splitlines() if line.startswith(("E:", "W: Failed"))]
    return lines[0][2:].strip() if lines else complaint.strip() or "no reason given"


def environment() -> dict[str, str]:
    """Return the environment for apt: its messages must not be translated, as they are parsed."""
    return {**os.environ, "LC_ALL": "C"}


def command(name: str) -> list[str]:
    """Return the first words of a command that runs a program of apt on the private state.

    Raises:
        HarnessError: the program is not installed.
    """
    state = folder()
    options = {
        "Dir::Etc::SourceList": state / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::Etc::Preferences": "-",
        "Dir::Etc::PreferencesParts": "-",
        "Dir::State": state,
        "Dir::State::Lists": state / "lists",
        "Dir::Cache": state,
        "Dir::Cache::Archives": state / "archives",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "APT::Update::Error-Mode": "any",
        # Without this, apt would switch to the user _apt if it is run by root; the folder belongs
        # to the user who runs this process.
        "APT::Sandbox::User": "root",
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return [find_program(name), *words]


def find_program(name: str) -> str:
    """Return the path of a program of apt or dpkg.

    Raises:
        HarnessError: the program is not installed.
    """
    path = shutil.which(name)
    if path is None:
        raise HarnessError(
            f"{name} is not installed",
            "kernels and roots are downloaded by apt; on other systems, give the path of a bzImage "
            "or of a folder",
        )
    return path


def _find_keyring() -> Path:
    for suffix in _KEYRING_SUFFIXES:
        path = Path(f"/usr/share/keyrings/debian-archive-keyring.{suffix}")
        if path.exists():
            return path
    raise HarnessError(
        "Debian's keyring is not installed", "install it: apt install debian-archive-keyring"
    )


def _find_mirror() -> str:
    """Return the URI of the Debian archive that the system's own apt uses.

    Archives of security updates and of third parties do not count. PYLUO_DEBIAN_MIRROR takes
    precedence.

    Raises:
        HarnessError: the system's apt uses no Debian archive.
    """
    if forced := os.environ.get(_MIRROR):
        return forced
    pattern = "$(REPO_URI) $(RELEASE) $(ORIGIN)"
    words = [find_program("apt-get"), "indextargets", "--format", pattern, "Created-By: Packages"]
    listed = subprocess.run(words, capture_output=True, text=True, env=environment())
    targets = listed.stdout.split("\n")
    fields = [target.split() for target in targets if target]
    for uri, release, *origin in fields:
        is_main = "/" not in release and not release.endswith("-security")
        if is_main and origin[:1] in ([], ["Debian"]):
            return uri
    raise HarnessError(
        "the system's apt uses no Debian archive", f"set {_MIRROR} to the address of one"
    )
