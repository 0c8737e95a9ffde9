"""The snippets of the pages, and what runs each of them."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["NOT_RUN", "PAGES", "ROOT", "SNIPPETS", "blocks", "snippets"]

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "examples/*/*.md", ".github/**/*.md")
    for page in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "not run: "

_HARNESS = "vm-tests/harness/test_harness.py"
_GUEST = "vm-tests/commands/test_snippets.py"
_HOST = "tests/project/test_snippets.py"

SNIPPETS = {
    "CONTRIBUTING.md": [_HARNESS],
    "README.md": [_GUEST, _HARNESS],
    "docs/explanation/guest-deaths.md": [
        f"{NOT_RUN}boots guests that have to warn, as vm-tests/deaths/test_deaths.py does",
        f"{NOT_RUN}needs the memory of a dead guest, as vm-tests/deaths/test_vmcore.py does",
    ],
    "docs/guides/ci.md": [f"{NOT_RUN}a workflow for GitHub; its command lines are parsed"],
    "docs/guides/dma.md": [_GUEST, _GUEST, _GUEST],
    "docs/guides/faults.md": [_GUEST],
    "docs/guides/guest-ram.md": [_GUEST],
    "docs/guides/handoff.md": [_GUEST, _GUEST, _HOST, _HOST],
    "docs/guides/kvm.md": [_GUEST, _GUEST],
    "docs/guides/matrix.md": [_GUEST],
    "docs/guides/network.md": [_GUEST],
    "docs/guides/roots.md": [
        f"{NOT_RUN}boots a guest with systemd, as vm-tests/harness/test_root.py does",
    ],
    "docs/guides/several-vms.md": [_HOST],
    "docs/guides/stores.md": [
        _GUEST,
        _GUEST,
        f"{NOT_RUN}a part of a unit, which vm-tests/stores/test_vm_service.py has as a whole",
    ],
    "docs/guides/test-suite.md": [_GUEST, _GUEST],
    "docs/guides/vfio.md": [_GUEST],
    "docs/reference/kernel-bugs.md": [
        f"{NOT_RUN}kills its guest, as vm-tests/sessions/test_kernel_bugs.py does",
    ],
    "docs/tutorials/first-live-update.md": [_HARNESS, _GUEST, _GUEST],
    "docs/tutorials/first-test.md": [_HARNESS],
    "examples/mini_vmm/README.md": ["vm-tests/kvm/test_mini_vmm.py"] * 2,
    "examples/passthrough_vm/README.md": ["vm-tests/kvm/test_passthrough_vm.py"] * 2,
    "examples/qemu_live_update/README.md": ["vm-tests/kvm/test_qemu_live_update.py"] * 2,
}
"""The file of the test that runs each snippet of a page, in order, or why none can."""


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the texts of the blocks of a page that are in these languages."""
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def snippets(page: str, language: str = "python") -> list[str]:
    """Return the snippets of a page.

    Args:
        page: the path of the page.
        language: the language of the snippets.
    """
    return blocks(ROOT / page, language)
