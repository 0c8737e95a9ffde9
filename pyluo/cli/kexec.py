"""`pyluo kexec`: load the next kernel, check whether one is loaded, unload it, or jump to it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo import kexec
from pyluo.cli.exit import FAILED, PASSED
from pyluo.cli.parsers import add_command
from pyluo.open_sessions import require_sessions

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers

__all__ = ["add_image_options", "add_parser", "load_image"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the `kexec` command."""
    parser = add_command(
        subparsers,
        "kexec",
        "Load the next kernel, or jump to it",
        "pyluo kexec load /boot/vmlinuz-next --reuse-cmdline",
        "pyluo kexec reboot",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    load = add_command(
        actions,
        "load",
        "Load the next kernel with kexec_file_load(2)",
        "pyluo kexec load /boot/vmlinuz-next --reuse-cmdline",
        "pyluo kexec load bzImage --initrd initrd.img --cmdline 'liveupdate=on root=/dev/vda1'",
        more="Refuses an image or a command line that would take nothing over.",
    )
    load.add_argument(
        "kernel", type=Path, help="a bzImage, a unified kernel image (UKI), or a compressed one"
    )
    add_image_options(load)
    load.add_argument("--json", action="store_true", help="print what was loaded, as JSON")
    load.set_defaults(run=_load, parser=load)
    loaded = add_command(
        actions,
        "loaded",
        "Exit with 0 if a kernel is loaded, else with 1",
        "pyluo kexec loaded",
        "pyluo kexec loaded && pyluo kexec reboot",
    )
    loaded.add_argument("--json", action="store_true", help="print JSON")
    loaded.set_defaults(run=_loaded)
    unload = add_command(
        actions,
        "unload",
        "Unload the kernel that was loaded",
        "pyluo kexec unload",
        "pyluo kexec loaded && pyluo kexec unload",
    )
    unload.set_defaults(run=_unload)
    reboot = add_command(
        actions,
        "reboot",
        "Jump now, without stopping processes first",
        "pyluo kexec reboot",
        "pyluo kexec reboot --require vm0 vm1",
        more="Open outgoing sessions are preserved.",
    )
    reboot.add_argument(
        "--trust-image", action="store_true", help="jump even if pyluo did not load the kernel"
    )
    reboot.add_argument(
        "--require",
        metavar="NAME",
        nargs="+",
        default=[],
        help="refuse to jump unless a process has outgoing sessions of these names open",
    )
    reboot.set_defaults(run=_reboot)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for `load_image`, beside the argument `kernel`."""
    parser.add_argument("--initrd", type=Path, metavar="FILE")
    parser.add_argument(
        "--cmdline",
        metavar="TEXT",
        help="the next kernel's command line; by default the one in a UKI",
    )
    parser.add_argument(
        "--reuse-cmdline",
        action="store_true",
        help="use the running kernel's command line, without repeated words; "
        "the text of --cmdline is appended",
    )
    parser.add_argument(
        "--no-handover",
        action="store_true",
        help="load the kernel even if it or its command line turns live update off",
    )


def load_image(arguments: argparse.Namespace) -> kexec.LoadedImage:
    """Load the image that the options choose; `parser` is what they were parsed by."""
    try:
        loaded = kexec.load(
            arguments.kernel,
            initrd=arguments.initrd,
            cmdline=arguments.cmdline,
            reuse_cmdline=arguments.reuse_cmdline,
            handover=not arguments.no_handover,
        )
    except ValueError:
        arguments.parser.error("give --cmdline or --reuse-cmdline: the image has no command line")
    for sentence in loaded.unknown:
        print(f"pyluo: {sentence}", file=sys.stderr)
    return loaded


def _load(arguments: argparse.Namespace) -> int:
    image = load_image(arguments)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(image)))
    return PASSED


def _loaded(arguments: argparse.Namespace) -> int:
    loaded = kexec.loaded()
    if arguments.json:
        print(json.dumps({"loaded": loaded}))
    else:
        print("an image is loaded" if loaded else "no image is loaded")
    return PASSED if loaded else FAILED


def _unload(arguments: argparse.Namespace) -> int:
    kexec.unload()
    return PASSED


def _reboot(arguments: argparse.Namespace) -> int:
    require_sessions(arguments.require)
    kexec.reboot(trust_image=arguments.trust_image)
    return FAILED
