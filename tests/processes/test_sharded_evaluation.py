"""Questions asked of a model whose weights are spread over two processes: FSDP2 and DeepSpeed's ZeRO-3."""

import importlib.util
import json

import pytest

from llava_llama31.trainer.evaluation.in_training import TrainingQuestions
from llava_llama31.trainer.evaluation.presets import PRESETS
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.model.opening import open_model


WORKER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.evaluation.in_training import TrainingQuestions
from llava_llama31.trainer.evaluation.presets import PRESETS
from llava_llama31.trainer.evaluation.questions import load_questions

engine, folder, data, output = sys.argv[1:]
torch.set_num_threads(1)
model, processor = open_model(folder)
whole = sum(parameter.numel() for parameter in model.parameters())
if engine == "fsdp":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        fully_shard(layer, mesh=mesh)
    sharded = fully_shard(model, mesh=mesh)
    here = sum(parameter.to_local().numel() for parameter in model.parameters())
else:
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # needs no compiler then
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    sharded = deepspeed.initialize(model=model, config=config)[0]
    here = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
assert here < 0.6 * whole, (here, whole)
model.train()
asked = TrainingQuestions(load_questions(data), PRESETS["card"], 6, 2, Path(output))
state = torch.get_rng_state()
metrics = asked.ask(model, processor, step=7, sharded=sharded)
assert torch.equal(state, torch.get_rng_state()) and model.training and metrics["unanswered"] == 0
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_sharded_weights_answer_as_whole_ones(forks, lively_folder, data_folder, tmp_path, engine):
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    data = str(data_folder / "questions.jsonl")
    weights, processor = open_model(lively_folder)
    asked = TrainingQuestions(load_questions(data), PRESETS["card"], 6, 2, tmp_path / "whole")
    asked.ask(weights, processor, step=7)
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    arguments = (engine, lively_folder, data, tmp_path / engine)
    job = forks.start(*arguments, processes=2, engines=True, script=str(worker))
    output, _ = job.communicate(timeout=100)
    assert job.codes == [0, 0], output
    ids = {}
    for name in ("whole", engine):
        lines = (tmp_path / name / "step-7.jsonl").read_text().splitlines()
        ids[name] = [json.loads(line)["token_ids"] for line in lines]
    assert ids["whole"] == ids[engine]
    assert len(set(map(tuple, ids["whole"]))) > 1
