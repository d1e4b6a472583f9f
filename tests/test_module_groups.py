"""The three module groups cover the model, and freezing does what a stage says."""

import re

import pytest
import torch

from llava_llama31 import LlavaLlama31Config, LlavaLlama31ForConditionalGeneration
from llava_llama31.trainer.model.module_groups import GROUPS, freeze, group_parameters, lora_target_pattern


def test_every_parameter_belongs_to_exactly_one_group(tiny_model):
    names = [name for group in GROUPS for name, _ in group_parameters(tiny_model, group)]
    assert sorted(names) == sorted(name for name, _ in tiny_model.named_parameters())
    assert "model.image_newline" in dict(group_parameters(tiny_model, "multi_modal_projector"))
    assert "lm_head.weight" in dict(group_parameters(tiny_model, "language_model"))


def test_the_8b_has_the_known_number_of_parameters_per_group():
    config = LlavaLlama31Config(
        text_config={
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128320,
        }
    )
    with torch.device("meta"):
        model = LlavaLlama31ForConditionalGeneration(config)
    counts = {group: sum(p.numel() for _, p in group_parameters(model, group)) for group in GROUPS}
    assert counts == {
        "vision_tower": 303_507_456,
        "multi_modal_projector": 20_979_712 + 4_096,
        "language_model": 525_598_720 * 2 + 6_979_584_000 + 4_096,
    }
    report = {line.group: line for line in freeze(model, dict.fromkeys(GROUPS, 1e-5))}
    # the last of 24 layers and the norm behind it have no path to the loss
    assert report["vision_tower"].num_trainable == 303_507_456 - 12_596_224 - 2_048
    quirk = freeze(model, {"multi_modal_projector": 1e-5}, freeze_image_newline=True)
    assert [line.num_trainable for line in quirk] == [0, 20_979_712, 0]


@pytest.mark.parametrize("groups", [["multi_modal_projector"], ["language_model"], list(GROUPS)])
def test_exactly_the_named_groups_are_trainable(tiny_model, groups):
    report = freeze(tiny_model, dict.fromkeys(groups, 1e-3))
    assert [line.group for line in report if line.num_trainable] == [g for g in GROUPS if g in groups]
    for line in report:
        trainable = sum(p.numel() for _, p in group_parameters(tiny_model, line.group) if p.requires_grad)
        assert trainable == line.num_trainable
        assert line.learning_rate == (1e-3 if line.group in groups else None)


def test_a_trained_tower_gets_a_gradient_for_every_trainable_parameter(tiny_model, processor, make_image):
    freeze(tiny_model, dict.fromkeys(GROUPS, 1e-3))
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]
    encoding = processor.encode(messages, [(30, 50)])
    tiny_model.train()
    tiny_model(
        input_ids=torch.tensor([encoding.input_ids]),
        labels=torch.tensor([encoding.labels]),
        pixel_values=torch.from_numpy(processor.tiles(make_image(30, 50))),
        image_sizes=torch.tensor([[30, 50]]),
        supervised_only=True,
    ).loss.backward()
    without = [name for name, p in tiny_model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_adapters_reach_the_language_model_alone(tiny_model):
    pattern = lora_target_pattern(["q_proj", "v_proj"])
    hit = [name for name, _ in tiny_model.named_modules() if re.fullmatch(pattern, name)]
    assert len(hit) == 4 and all(name.startswith("model.language_model.layers") for name in hit)


def test_an_unknown_group_is_refused(tiny_model):
    with pytest.raises(ValueError, match="one of vision_tower"):
        list(group_parameters(tiny_model, "vision"))
