"""What makes imports quick, here and in the processes that tests start: most of the suite's time is imports."""

import os
import runpy
import sys
from pathlib import Path


QUICK_START = Path(__file__).with_name("quick_start")

runpy.run_path(str(QUICK_START / "sitecustomize.py"))
paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
if str(QUICK_START) not in paths:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(QUICK_START), *filter(None, paths)])
# of processes that tests start; what needs these packages is tested in xdist's workers, which have them, or in forks
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("HIDDEN_PACKAGES", "bitsandbytes,scipy,torchao")
# our package is not compiled again in each process
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Inductor starts a process with torch in it for its compilations, of which each test has a few
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
