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


if __name__ == "__main__":
    stand_in_for_devices()
    from llava_llama31.trainer.cli import main

    sys.exit(main())
