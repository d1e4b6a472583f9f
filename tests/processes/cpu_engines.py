"""The command line on two CPU processes under engines that accelerate and DeepSpeed keep for accelerators.

accelerate launch --config_file CONFIG tests/processes/cpu_engines.py train RECIPE ...

What is changed here stands for the missing devices; the project's code runs as it is. With PEAK_MEMORY=FOLDER every
process leaves there the most bytes of tensors that lived at once in each of its steps. With BRIEF_FINISH a real
process leaves out what brief_finish.py does.
"""

import gc
import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

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


def emulate_float8() -> None:
    """Take fp8 on a CPU, with products in wider types."""
    from torchao.float8 import Float8LinearConfig

    from llava_llama31.trainer.model import device_options

    device_options._check_fp8 = lambda where: None
    original = Float8LinearConfig.__init__

    def emulated(self: Float8LinearConfig, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "emulate": True})

    Float8LinearConfig.__init__ = emulated


def measured_steps(folder: Path) -> Any:
    """Counts the tensors of this process; their most of each step goes into `folder`, by the process's rank."""
    from transformers import TrainerCallback

    from llava_llama31.trainer.training.llava_trainer import LlavaTrainer

    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from peak_memory import PeakMemory

    memory = PeakMemory(fake=False)
    peaks: list[int] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            # weights are loaded in threads, which the mode does not see
            memory.watch([x for x in gc.get_objects() if isinstance(x, torch.Tensor)])
            memory.restart()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            peaks.append(memory.restart())
            (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peaks))

    initialise = LlavaTrainer.__init__

    def with_steps(self: LlavaTrainer, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        self.add_callback(Steps())

    LlavaTrainer.__init__ = with_steps
    return memory


def as_asked() -> AbstractContextManager:
    """Change what the environment asks for; the command line is to run within."""
    if "RANK" in os.environ:
        stand_in_for_devices()
    if os.environ.get("WITHOUT_BLANK_TILE"):
        skip_the_blank_tile()
    if os.environ.get("EMULATE_FLOAT8"):
        emulate_float8()
    measured = os.environ.get("PEAK_MEMORY")
    return measured_steps(Path(measured)) if measured else nullcontext()


if __name__ == "__main__":
    with as_asked():
        from llava_llama31.trainer.cli import main

        if os.environ.get("BRIEF_FINISH"):
            sys.path.append(str(Path(__file__).parents[1]))
            import brief_finish

            brief_finish.shorten()
        sys.exit(main())
