"""The Space's page: one answer under three protocols, with what each of them compares. `python app.py`"""

from vqa_accuracy import PROTOCOLS, normalize, vqa_accuracy


HEADERS = ["protocol", "score", "the answer as compared", "the annotators' answers as compared"]
EXAMPLES = [
    ["8.", "\n".join(["8"] * 2 + ["8."] * 8)],
    ["New York,NY", "\n".join(["new york ny"] * 4 + ["nyc"] * 6)],
    ["wendy's", "\n".join(["wendy's"] * 7 + ["wendys"] * 3)],
]


def score(prediction: str, answers: str) -> list[list[str]]:
    """One row a protocol; `answers` has one annotator's answer a line."""
    said = answers.splitlines()
    if not said:
        return []
    return [
        [
            name,
            f"{vqa_accuracy(prediction, said, name):.3g}",
            normalize(prediction, name),
            " | ".join(normalize(answer, name) for answer in said),
        ]
        for name in PROTOCOLS
    ]


def main() -> None:
    import gradio

    page = gradio.Interface(
        fn=score,
        inputs=[
            gradio.Textbox(label="The model's answer"),
            gradio.Textbox(label="The annotators' answers, one per line (TextVQA has ten)", lines=10),
        ],
        outputs=gradio.Dataframe(headers=HEADERS, label="Scores", wrap=True),
        examples=EXAMPLES,
        title="TextVQA accuracy under three protocols",
    )
    page.launch()


if __name__ == "__main__":
    main()
