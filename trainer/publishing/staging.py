"""What is published, under its public name: RUN/publish of a finished run, FOLDER-publish of an exported folder."""

import os
import shutil
from pathlib import Path

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.publishing.contents import CARD, Contents
from llava_llama31.trainer.publishing.gate_files import check_manifest


STAGED = "publish"


def public_copy(run: Path, repo_id: str) -> Path:
    """Write RUN/publish, the run's export under its public name: files are linked, the card is made for `repo_id`.

    Edited sections of the card in RUN/export are kept; a card without sections is the user's own and is copied as is.
    """
    from llava_llama31.model_card.sections import has_sections
    from llava_llama31.trainer.export.export import card_text, export_again

    folder = RunFolder(run)
    export = folder.export
    if not (export / atomic_folders.MANIFEST).is_file() or any(check_manifest(Contents(export, ""))):
        export = export_again(folder)
    (entry,) = (entry for entry in atomic_folders.read_manifest(export)["files"] if entry["name"] == CARD)
    card = former = (export / CARD).read_text(encoding="utf-8")
    if atomic_folders.sha256(export / CARD) == entry["sha256"] or has_sections(former):
        record = atomic_folders.read_json(folder.record) | {"name": repo_id.rpartition("/")[2], "model_id": repo_id}
        card = card_text(record, former)
    return _copy_with_card(export, run / STAGED, card)


def named_copy(folder: Path, repo_id: str) -> Path:
    """Write FOLDER-publish, whose card names the repository in its code; the folder itself if it needs no change."""
    from llava_llama31.model_card.card import card_for

    try:
        former = (folder / CARD).read_text(encoding="utf-8")
        atomic_folders.read_manifest(folder)
    except (OSError, ValueError):  # the gate names what is wrong with them
        return folder
    card = card_for(former, repo_id)
    folder = folder.resolve()
    return folder if card == former else _copy_with_card(folder, folder.with_name(f"{folder.name}-{STAGED}"), card)


def _copy_with_card(source: Path, target: Path, card: str) -> Path:
    """A copy with another card; its other files are links."""
    staged = atomic_folders.staging_folder(target)
    shutil.copytree(source, staged, copy_function=link, dirs_exist_ok=True)
    (staged / CARD).unlink()
    (staged / CARD).write_text(card, encoding="utf-8")
    manifest = atomic_folders.read_manifest(source)
    for entry in manifest["files"]:
        if entry["name"] == CARD:
            entry |= {"size": (staged / CARD).stat().st_size, "sha256": atomic_folders.sha256(staged / CARD)}
    (staged / atomic_folders.MANIFEST).unlink()
    atomic_folders.write_manifest(staged, manifest)
    atomic_folders.remove(target)
    os.replace(staged, target)
    return target


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links on this file system
        shutil.copyfile(source, target)
