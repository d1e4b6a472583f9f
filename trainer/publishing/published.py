"""Whether a finished run still has to be published; cheap to import."""

from collections.abc import Mapping
from typing import Any

from llava_llama31.trainer.recipes.schema import Publish


def is_outstanding(spec: Publish | None, summary: Mapping[str, Any]) -> bool:
    """Whether the recipe asks for a publication that the summary does not record.

    Args:
        summary: content of the run's summary.json.
    """
    recorded = summary.get("publish", {})
    return spec is not None and not (recorded.get("repo") == spec.repo_id and recorded.get("published"))
