"""Python runs this when it starts: imports take less time.

Garbage is collected less often: imports make half a million objects, which stay. Python would look for garbage at
every 700 new ones, a fifth of their time, and once more in all of them as it ends. And the packages of HIDDEN_PACKAGES
are not installed for this process: peft and Transformers import torchao and bitsandbytes wherever they are, which is a
fourth of what `train` imports, and SciPy, which is 379 of the other 3,992 modules.
"""

import atexit
import gc
import os
import sys


gc.set_threshold(50_000, 20, 20)
atexit.register(gc.freeze)
for name in filter(None, os.environ.get("HIDDEN_PACKAGES", "").split(",")):
    sys.modules[name] = None  # type: ignore[assignment]
