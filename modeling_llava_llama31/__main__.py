"""`python -m llava_llama31`: the same as `llava-llama31`."""

import runpy


# by name: the model's folder imports nothing of the trainer's
runpy.run_module("llava_llama31.trainer.cli", run_name="__main__", alter_sys=True)
