"""TextVQA accuracy as a metric of Hugging Face `evaluate`; `llava-llama31 export-metric` copies this file to a Space.

It needs `evaluate`, `datasets` and its sibling `vqa_accuracy.py`, nothing else of this project.
"""

import datasets
import evaluate

from .vqa_accuracy import PROTOCOLS, score_all


ALL = "all"

_DESCRIPTION = """\
TextVQA accuracy: each prediction is compared with the answers of the annotators after both were normalised, and the
scores of all questions are averaged. Published numbers come from three scorers, which normalise differently, so a
number means little without its protocol: `vlmevalkit-2024` (VLMEvalKit until May 2025), `vlmevalkit-2025` (VLMEvalKit
since) and `m4c` (LLaVA's script, lmms-eval).

For one question with the annotators' answers a_1 ... a_n (n is 10 in TextVQA)

    score = 1/n * sum_i min(1, |{j != i : norm(a_j) = norm(prediction)}| / 3)

so ten annotators give 0, 0.3, 0.6, 0.9 or 1. For n < 4 the divisor is n - 1, and for n = 1 the score is 1 or 0.
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions: list of the model's answers, one string a question.
    references: list of the annotators' answers, one list of strings a question.
    protocol: "vlmevalkit-2024", "vlmevalkit-2025", "m4c" or, by default, "all".
Returns:
    For one protocol {"protocol", "accuracy", "low", "high"}: the mean over the questions, in [0, 1], and its 95 %
    interval from 1,000 seeded bootstrap resamples of the questions. For "all" such a dictionary under each name.
Raises:
    ValueError: no predictions, a prediction that is not a string, a question without answers, or an unknown protocol.
Examples:
    >>> metric = evaluate.load("textvqa_accuracy")
    >>> answers = [["8"] * 2 + ["8."] * 8, ["stop"] * 3 + ["halt"] * 7]
    >>> metric.compute(predictions=["8.", "Stop!"], references=answers, protocol="m4c")["accuracy"]
    0.95
"""

_CITATION = """\
@inproceedings{singh2019towards,
  title     = {Towards {VQA} Models That Can Read},
  author    = {Singh, Amanpreet and Natarajan, Vivek and Shah, Meet and Jiang, Yu and Chen, Xinlei and Batra, Dhruv and
               Parikh, Devi and Rohrbach, Marcus},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2019}
}
@inproceedings{antol2015vqa,
  title     = {{VQA}: Visual Question Answering},
  author    = {Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
               Zitnick, C. Lawrence and Parikh, Devi},
  booktitle = {Proceedings of the IEEE International Conference on Computer Vision},
  year      = {2015}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class TextVQAAccuracy(evaluate.Metric):
    """TextVQA accuracy under one protocol or all three."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Value("string"),
            "references": datasets.Sequence(datasets.Value("string")),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(features),
            license="Apache-2.0",
            reference_urls=["https://textvqa.org", "https://visualqa.org/evaluation.html"],
        )

    def _compute(self, predictions: list[str], references: list[list[str]], protocol: str = ALL) -> dict[str, object]:
        names = tuple(PROTOCOLS) if protocol == ALL else (protocol,)
        if not set(names) <= set(PROTOCOLS):
            raise ValueError(f"no protocol is named {protocol!r}; there are {', '.join((*PROTOCOLS, ALL))}")
        pairs = list(zip(predictions, references, strict=True))
        _check(pairs)
        scores = {
            name: {"accuracy": score.accuracy, "low": score.low, "high": score.high}
            for name, score in score_all(pairs, names).items()
        }
        return dict(scores) if protocol == ALL else {"protocol": protocol, **scores[protocol]}


def _check(pairs: list[tuple[str, list[str]]]) -> None:
    if not pairs:
        raise ValueError("there are no predictions to score")
    for number, (prediction, answers) in enumerate(pairs):
        if not isinstance(prediction, str):
            raise ValueError(f"predictions[{number}] is {prediction!r}, not a string; an empty answer is ''")
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"references[{number}] is {answers!r}, not a list of at least one string")
