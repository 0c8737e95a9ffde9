"""The lives of a guest. A life is one boot: it begins with the cold boot or a jump."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyluo.guest import wire
    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.console import Console

__all__ = ["Life", "Lives"]


@dataclass(frozen=True, slots=True)
class Life:
    """One boot of a guest, from the cold boot or a jump to the next jump.

    Attributes:
        number: 1 after the cold boot, one more after each jump.
        kernel: the name of the kernel that was given to the harness.
        boot_id: the kernel's own id for this boot.
        release: the kernel's release, as `uname -r` prints it.
        updates: the number of live updates that the kernel counts; None if its log does not say.
        blackout: seconds from the old kernel's call of reboot() until the worker of this life was
            up. If the guest jumped by itself, the seconds count from the old kernel's message that
            it starts the new one. None after the cold boot, and if there was no such message.
    """

    number: int
    kernel: str
    boot_id: str
    release: str
    updates: int | None
    blackout: float | None


class Lives:
    """Keeps track of the lives of a guest, and of the jump that is going on.

    Args:
        kernel: the kernel that the guest boots.
        console: the guest's console; a kernel prints on it that it starts the next kernel.

    Attributes:
        current: the current life; None until the guest has spoken.
        number: the number of the current life.
    """

    def __init__(self, kernel: Kernel, console: Console) -> None:
        self._console = console
        self._kernels = [kernel]  # the kernel of each life
        self._next: Kernel | None = None
        self._next_began = False
        self.current: Life | None = None
        self.number: int = 1

    @property
    def kernel(self) -> Kernel:
        """The kernel of the current life, as far as the harness knows."""
        return self._kernels[-1]

    def kernel_of(self, number: int) -> Kernel:
        """Return the kernel of the life with this number; if there is none yet, the last kernel."""
        return self._kernels[min(number, len(self._kernels)) - 1]

    def begin_jump(self, kernel: Kernel) -> None:
        """Begin a jump to another kernel."""
        self._console.left = None
        self._next, self._next_began = kernel, False

    def end_jump(self) -> None:
        """End the jump, which has landed, was refused, or failed."""
        self._next = None

    def note_new_kernel(self) -> None:
        """Note that a kernel printed its first line."""
        self._next_began = True

    def land(self) -> None:
        """Begin another life, on the kernel that the guest jumped to."""
        assert self._next is not None
        self._advance(self._next)

    def land_unasked(self, release: str) -> None:
        """Begin another life after a jump that the harness did not ask for.

        Args:
            release: the release of the kernel that runs now.
        """
        same = release == self.kernel.release
        self._advance(self.kernel if same else _unknown_kernel(self.kernel, release))

    def enter(self, hello: wire.Message, blackout: float | None) -> None:
        """Set the current life, because its worker has sent its first message.

        Args:
            hello: the worker's first message.
            blackout: the blackout that led to this life; see `Life`.
        """
        self._console.left = None
        self.current = Life(
            self.number,
            self.kernel.name,
            hello["boot_id"],
            hello["release"],
            hello["updates"],
            blackout,
        )

    @property
    def has_left(self) -> bool:
        """Whether the guest is in a jump and the old kernel has started the next one.

        Until then, the old kernel may still hang or die, although it was told to reboot.
        """
        started = self._next_began or self._console.left is not None
        return self._next is not None and started

    @property
    def printing_life(self) -> tuple[int, str]:
        """The number of the life, and the name of the kernel, that prints on the console now.

        In a jump, this is the old kernel until the new one has printed its first line.
        """
        if self._next and self._next_began:
            return self.number + 1, self._next.name
        return self.number, self.kernel.name

    @property
    def blamed_life(self) -> tuple[int, Kernel]:
        """The number of the life, and the kernel, to blame if the guest dies now."""
        if self._next and self.has_left:
            return self.number + 1, self._next
        return self.number, self.kernel

    def _advance(self, kernel: Kernel) -> None:
        self.number += 1
        self._kernels.append(kernel)


def _unknown_kernel(before: Kernel, release: str) -> Kernel:
    """Return a kernel of which only the release is known, because the guest jumped by itself.

    Args:
        before: the kernel that ran before the jump.
        release: the release of the kernel that runs now.
    """
    known = replace(before, name=release, release=release, source=None)
    return replace(known, config=None, system_map=None, vmlinux=None, headers=None)
