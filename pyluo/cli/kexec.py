"""`pyluo kexec`: load the next kernel, check for it, unload it, or jump."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyluo import kexec
from pyluo.cli.exit import FAILED, PASSED

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Commands

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("kexec", help="load the next kernel, or jump into it")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    load = actions.add_parser("load", help="load an image by kexec_file_load(2)")
    load.add_argument("kernel", type=Path, help="a bzImage")
    load.add_argument("--initrd", type=Path, metavar="FILE")
    line = load.add_mutually_exclusive_group(required=True)
    line.add_argument("--cmdline", metavar="TEXT", help="the next kernel's command line")
    line.add_argument("--reuse-cmdline", action="store_true", help="that of the running kernel")
    load.add_argument(
        "--no-handover",
        action="store_true",
        help="load it even if its command line turns live update off",
    )
    load.set_defaults(run=_load)
    for name, run, text in (
        ("loaded", _loaded, "exit 0 if an image is loaded, else 1"),
        ("unload", _unload, "drop the loaded image"),
    ):
        actions.add_parser(name, help=text).set_defaults(run=run)
    reboot = actions.add_parser(
        "reboot", help="jump now, ending no process; open outgoing sessions go over"
    )
    reboot.add_argument(
        "--trust-image", action="store_true", help="jump into an image that pyluo did not load"
    )
    reboot.set_defaults(run=_reboot)


def _load(arguments: argparse.Namespace) -> int:
    kexec.load(
        arguments.kernel,
        initrd=arguments.initrd,
        cmdline=arguments.cmdline,
        reuse_cmdline=arguments.reuse_cmdline,
        handover=not arguments.no_handover,
    )
    return PASSED


def _loaded(arguments: argparse.Namespace) -> int:
    loaded = kexec.loaded()
    print("an image is loaded" if loaded else "no image is loaded")
    return PASSED if loaded else FAILED


def _unload(arguments: argparse.Namespace) -> int:
    kexec.unload()
    return PASSED


def _reboot(arguments: argparse.Namespace) -> int:
    kexec.reboot(trust_image=arguments.trust_image)
    return FAILED
