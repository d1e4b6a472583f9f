"""Transformers' LlavaNext processor tests, for stock's class and for ours; run.py runs this file."""

from tests.models.llava_next import test_processing_llava_next as upstream
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_llama31.processing import LlavaLlama31Processor


class Offline:
    """Stands in for a tokenizer that upstream downloads."""

    __module__ = upstream.__name__  # the tests find a processor's other parts by the name of this file

    @classmethod
    def _setup_tokenizer(cls) -> PreTrainedTokenizerFast:
        pieces = ["<unk>", "<s>", "</s>", "[PAD]", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="[PAD]",
            extra_special_tokens={"image_token": "<image>"},
        )


class StockTest(Offline, upstream.LlavaNextProcessorTest):
    __module__ = upstream.__name__


class OurTest(Offline, upstream.LlavaNextProcessorTest):
    __module__ = upstream.__name__
    processor_class = LlavaLlama31Processor
