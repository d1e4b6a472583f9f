"""The command line on two CPU processes under engines that accelerate and DeepSpeed keep for accelerators.

accelerate launch --config_file CONFIG tests/cpu_engines.py train RECIPE ...

What is changed here stands for the missing devices; the project's code runs as it is.
"""

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def stand_in_for_devices() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        torch.distributed.init_process_group("gloo")
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_: (
            "gloo",
            DistributedType.MULTI_GPU,
        )  # with MULTI_CPU it shards nothing
        torch.Tensor.pin_memory = lambda self: self  # for parameters offloaded to the memory where they are
    else:
        import deepspeed  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # needs no compiler then


def skip_the_blank_tile() -> None:
    """Let a text-only row skip the tower, which other processes run: what must not go unnoticed."""
    from llava_llama31.modeling_llava_llama31 import LlavaLlama31Model

    LlavaLlama31Model._text_only_embeds = lambda self, input_ids: self.get_input_embeddings()(input_ids)


if __name__ == "__main__":
    if "RANK" in os.environ:
        stand_in_for_devices()
    if os.environ.get("WITHOUT_BLANK_TILE"):
        skip_the_blank_tile()
    from llava_llama31.trainer.cli import main

    sys.exit(main())
