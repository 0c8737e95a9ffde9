"""A VMM of the examples, which kills itself by SIGKILL before a line of its source.

The first argument is the name of its module, the second one is FUNCTION:TEXT, where only one line
of the function has the text; the others are the VMM's.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType


def main() -> int:
    vmm: Any = importlib.import_module(sys.argv[1])  # from the folder of the example
    name, _, text = sys.argv[2].partition(":")
    function = operator.attrgetter(name)(vmm)
    source, first = inspect.getsourcelines(function)
    [where] = [number for number, line in enumerate(source, first) if text in line]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is not function.__code__:
            return None
        if event == "line" and frame.f_lineno == where:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    return int(vmm.main(sys.argv[3:]))


if __name__ == "__main__":
    sys.exit(main())
