"""From judgements to metrics: sums per category and image first, so that resampled images give an interval.

| summary          | metrics                                                        | definition                     |
|------------------|----------------------------------------------------------------|--------------------------------|
| `mean`           | the mean value, called as the protocol says                    |                                |
| `points`         | the sum of the values                                          | OCRBench (Liu et al., 2023)    |
| `yes_no`         | accuracy, precision, recall, F1 and share of yes               | POPE (Li et al., 2023)         |
| `pairs`          | accuracy + accuracy of images with all questions right         | MME (Fu et al., 2023)          |
| `hallusionbench` | aAcc of questions, fAcc of figures, qAcc of questions over     | HallusionBench (Guan et al.,   |
|                  | figures                                                        | 2024)                          |
| `circular`       | accuracy of questions with all turns right                     | MMBench (Liu et al., 2023)     |
| `fields`         | F1 over all fields, share of exact objects                     | Donut (Kim et al., 2022)       |
| `error_rate`     | edits over reference length                                    |                                |
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

from llava_llama31.trainer.evaluation.judging import Judgement
from llava_llama31.trainer.evaluation.metrics.fields import field_f1
from llava_llama31.trainer.evaluation.metrics.yes_no import yes_no_rates
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.task_files import ProtocolOf


ALL = ""
"""The group of all questions."""
Sums = dict[tuple[str, str], float]
"""(group, what) -> sum."""

PAIR_SCORE = "score"
# summary -> the units that it needs: their names, in the order of Question.units
UNITS = {"pairs": ("pairs",), "circular": ("questions",), "hallusionbench": ("figures", "sets")}


def sums_of(questions: Sequence[Question], judgements: Sequence[Judgement], protocol: ProtocolOf) -> dict[str, "Sums"]:
    """Sums of each cluster: the questions that share an image, or the turns of one question."""
    clusters: dict[str, Sums] = defaultdict(lambda: defaultdict(float))
    units: dict[tuple[str, str], list[float]] = defaultdict(list)
    owner: dict[tuple[str, str], Question] = {}
    for question, judgement in zip(questions, judgements, strict=True):
        counts = {"count": 1.0, "value": judgement.value, **judgement.counts}
        weight = len(question.groups) if protocol.weighted == "groups" else 1
        sums = clusters[_cluster(question, protocol)]
        for name, amount in counts.items():
            sums[ALL, name] += weight * amount
            for group in question.groups:
                sums[group, name] += amount
        for name, unit in zip(UNITS.get(protocol.summary, ()), question.units, strict=False):
            units[name, unit].append(judgement.value)
            owner.setdefault((name, unit), question)
    for (name, unit), values in units.items():
        question = owner[name, unit]
        sums = clusters[_cluster(question, protocol)]
        for group in (ALL, *question.groups):
            sums[group, f"{name} in all"] += 1
            sums[group, f"{name} right"] += all(value == 1 for value in values)
    return dict(clusters)


def _cluster(question: Question, protocol: ProtocolOf) -> str:
    if protocol.summary == "circular" and question.units:
        return question.units[0]
    return question.image_id or str(question.question_id)


def metrics_of(sums: Mapping[tuple[str, str], float], protocol: ProtocolOf, groups: Sequence[str]) -> dict[str, float]:
    """Metrics over all questions.

    Args:
        sums: of all clusters together.
        protocol: says which metrics.
        groups: all categories.
    """
    if protocol.over == "groups":
        parts = protocol.averaged or groups
        each = [found for group in parts if (found := group_metrics(sums, protocol, group))]
        if each or not protocol.averaged:
            return {name: sum(found[name] for found in each) / len(each) for name in each[0]} if each else {}
    metrics = group_metrics(sums, protocol, ALL)
    added = PAIR_SCORE if protocol.summary == "pairs" else protocol.called
    for name, parts in protocol.sums.items():
        scores = [group_metrics(sums, protocol, part).get(added, 0.0) for part in parts]
        # one after the other, as the evaluators add; since Python 3.12 `sum` rounds otherwise
        metrics[name] = reduce(add, scores, 0.0)
    if protocol.summary == "pairs":
        metrics.pop(PAIR_SCORE, None)  # a category has one, and all together their sums
    return metrics


def wider_metrics(
    sums: Mapping[tuple[str, str], float], protocol: ProtocolOf, questions: Sequence[Question], group: str
) -> dict[str, float]:
    """Metrics of a category; of one that holds finer ones which the protocol averages, the mean of these."""
    within = {part for question in questions if group in question.groups for part in question.groups}
    finer = [part for part in protocol.averaged if part in within]
    if group in finer or not finer:
        return group_metrics(sums, protocol, group)
    each = [found for part in finer if (found := group_metrics(sums, protocol, part))]
    return {name: sum(found[name] for found in each) / len(each) for name in each[0]} if each else {}


def group_metrics(sums: Mapping[tuple[str, str], float], protocol: ProtocolOf, group: str) -> dict[str, float]:
    """Metrics over the questions of a category; none if there is no question."""

    def total(name: str) -> float:
        return sums.get((group, name), 0.0)

    def percent(part: str, whole: str) -> float:
        return total(part) / total(whole) * 100 if total(whole) else 0.0

    if not total("count"):
        return {}
    accuracy = percent("value", "count")
    if protocol.summary == "points":
        return {protocol.called: total("value")}
    if protocol.summary == "yes_no":
        return yes_no_rates(*(total(name) for name in ("true_yes", "false_yes", "false_no", "true_no", "wrong")))
    if protocol.summary == "pairs":
        pairs = percent("pairs right", "pairs in all")
        return {PAIR_SCORE: accuracy + pairs, "accuracy": accuracy, "accuracy_of_pairs": pairs}
    if protocol.summary == "hallusionbench":
        figures, sets = percent("figures right", "figures in all"), percent("sets right", "sets in all")
        return {"aAcc": accuracy, "fAcc": figures, "qAcc": sets}
    if protocol.summary == "circular":
        return {"accuracy": percent("questions right", "questions in all"), "accuracy_of_turns": accuracy}
    if protocol.summary == "fields":
        return {"f1": 100 * field_f1(total("matched"), total("unmatched")), "exact": percent("exact", "count")}
    if protocol.summary == "error_rate":
        # an empty reference has no rate of its own, and its edits count
        return {protocol.called: 100 * total("edits") / max(1.0, total("length")), "exact": accuracy}
    return {protocol.called: accuracy}
