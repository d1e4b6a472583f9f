"""Ask a model about an image.

python examples/chat.py runs/tiny/export image.png "what does the sign say?"
"""

import argparse

from PIL import Image

from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or Hub id that stock Transformers opens as LlavaNext")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    model, processor = load_model(options.model)
    answerer = GreedyAnswerer(model, processor, max_new_tokens=options.max_new_tokens)
    content = [{"type": "image"}, {"type": "text", "text": options.question}]
    prompt = answerer.prompt([{"role": "user", "content": content}], [Image.open(options.image)])
    print(answerer.text(answerer.answer([prompt])[0]))


if __name__ == "__main__":
    main()
