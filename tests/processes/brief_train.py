"""examples/train.py, but its runs end soon: see brief_finish.py."""

import runpy
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]

if __name__ == "__main__":
    sys.path.append(str(ROOT / "tests"))
    import brief_finish

    brief_finish.shorten()
    runpy.run_path(str(ROOT / "examples/train.py"), run_name="__main__")
