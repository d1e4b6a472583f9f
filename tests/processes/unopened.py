"""The command line, but what it publishes is not opened in clean processes, as test_publish_processes.py does."""

import sys

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.publishing import publish
from llava_llama31.trainer.publishing.doors import Doors


publish.open_doors = lambda *_, **__: Doors("", [])
sys.exit(main())
