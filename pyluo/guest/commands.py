"""What the harness itself runs in a guest."""

from __future__ import annotations

from pyluo.kernel_log import KernelLog

__all__ = ["dmesg", "run"]


def run(argv: list[str], folder: str, timeout: float) -> tuple[int, bytes, bytes]:
    """Runs a program; its exit status, stdout and stderr."""
    import subprocess  # here, since no guest should wait for it that runs no programs

    done = subprocess.run(
        argv, cwd=folder, timeout=timeout, stdin=subprocess.DEVNULL, capture_output=True
    )
    return done.returncode, done.stdout, done.stderr


def dmesg() -> str:
    """The messages of this kernel, one a line."""
    return "\n".join(KernelLog().messages)
