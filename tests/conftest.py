from __future__ import annotations

import resource

from hypothesis import settings

# How long an example takes says more of the machine's load than of the code.
settings.register_profile("pyluo", deadline=None)
settings.load_profile("pyluo")

# A thousand descriptors handed over are open on both sides, and what is usual is 1024.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(_hard, max(_soft, 4096)), _hard))
