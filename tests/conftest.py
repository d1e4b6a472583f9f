"""Tiny models, processors and pictures, made offline."""

import os


os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from llava_llama31 import LlavaLlama31Config, LlavaLlama31ForConditionalGeneration
from llava_llama31.processing import CHAT_TOKENS, STOP_TOKENS, build_processor


TILE = 28
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["user assistant system", "What does the sign say?", "Answer the question using a single word or phrase."]
    backend.train_from_iterator(corpus * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def processor():
    return build_processor(
        make_tokenizer(),
        image_size=TILE,
        patch_size=14,
        image_mean=(0.48, 0.46, 0.41),
        image_std=(0.27, 0.26, 0.28),
        image_grid_pinpoints=PINPOINTS,
    )


@pytest.fixture(scope="session")
def tiny_config(processor):
    stop_ids = processor.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    text = LlamaConfig(
        vocab_size=448,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=stop_ids,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=14,
        projection_dim=32,
    )
    return LlavaLlama31Config(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=4,
    )


@pytest.fixture
def tiny_model(tiny_config):
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config)
    model.generation_config.eos_token_id = list(tiny_config.text_config.eos_token_id)
    model.generation_config.pad_token_id = tiny_config.text_config.pad_token_id
    return model.eval()


@pytest.fixture(scope="session")
def make_image():
    def make(height: int, width: int, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make
