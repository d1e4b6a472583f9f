"""What is said of a run that has already finished; cheap to import."""

from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.recipes.schema import Recipe


def finished_line(recipe: Recipe, folder: RunFolder) -> str:
    """The line that names the run's summary."""
    return f"{recipe.name} has already finished: {folder.summary}"
