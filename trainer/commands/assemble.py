"""`llava-llama31 assemble`."""

import argparse
import logging


HELP = "join a vision tower, a projector and a Llama into one checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision-tower", required=True, metavar="DIR", help="LLaVA, CLIP, SigLIP or DINOv2")
    parser.add_argument("--language-model", required=True, metavar="DIR", help="a Llama-family model with tokenizer")
    parser.add_argument("--projector", metavar="DIR", help="a LLaVA checkpoint or safetensors file; default: fresh")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder; it appears when it is complete")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="type of the weights; default: auto, the language model's",
    )
    parser.add_argument("--image-size", type=int, metavar="PX", help="side of a tile; default: the tower's own")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="use every grid shape of up to N tiles")
    parser.add_argument(
        "--vision-feature-layer", type=int, metavar="N", help="hidden state that the projector reads; default: -2"
    )
    parser.add_argument("--add-chat-tokens", action="store_true", help="add Llama 3.1's turn tokens if missing")
    parser.add_argument("--seed", type=int, default=0, help="seed of a fresh projector")


def run(options: argparse.Namespace) -> int:
    from llava_llama31.assembly import VisionChoices
    from llava_llama31.trainer.model.assemble import assemble
    from llava_llama31.trainer.model.locating import local_checkpoint

    logging.getLogger("llava_llama31").setLevel(logging.INFO)
    assemble(
        local_checkpoint(options.vision_tower, where="--vision-tower"),
        local_checkpoint(options.language_model, where="--language-model"),
        options.output,
        projector=local_checkpoint(options.projector, where="--projector", file=True) if options.projector else None,
        vision=VisionChoices(
            image_size=options.image_size,
            max_tiles=options.max_tiles,
            vision_feature_layer=options.vision_feature_layer,
        ),
        add_chat_tokens=options.add_chat_tokens,
        dtype=options.dtype,
        seed=options.seed,
    )
    return 0
