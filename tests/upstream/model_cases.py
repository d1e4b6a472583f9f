"""Transformers' LlavaNext model and generation tests, for stock's classes and for ours; run.py runs this file."""

from tests.models.llava_next import test_modeling_llava_next as upstream
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

from llava_llama31 import LlavaLlama31Config, LlavaLlama31ForConditionalGeneration, LlavaLlama31Model


def setUpModule() -> None:
    AutoModel.register(LlavaLlama31Config, LlavaLlama31Model)
    # the tests choose labels and checks by these lists of class names
    MODEL_MAPPING_NAMES["llava_llama31"] = LlavaLlama31Model.__name__
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["llava_llama31"] = LlavaLlama31ForConditionalGeneration.__name__


class OurTester(upstream.LlavaNextVisionText2TextModelTester):
    config_class = LlavaLlama31Config
    base_model_class = LlavaLlama31Model
    conditional_generation_class = LlavaLlama31ForConditionalGeneration


class StockTest(upstream.LlavaNextForConditionalGenerationModelTest):
    pass


class OurTest(upstream.LlavaNextForConditionalGenerationModelTest):
    model_tester_class = OurTester
    test_can_init_all_missing_weights_before_2023 = True  # our config's file has no copyright line with a year
