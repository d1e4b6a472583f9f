"""Sections of a card between markers, so that a card can be written again around what a person wrote.

A marker holds a hash of the text that was written below it: a section that no longer fits its hash was edited and
stays, and so does text outside of all sections. The closing marker repeats the hash, which no text can hold of itself,
so data cannot forge one.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass


NOTE = (
    "<!-- Each section stands between two markers. One that you edit, and text that you add between sections, stays "
    "when the card is written again; delete a section with its markers to have it written anew. -->"
)
_NUM_DIGITS = 16
_SECTION = re.compile(
    rf"^<!-- begin (?P<name>[a-z_]+) (?P<digest>[0-9a-f]{{{_NUM_DIGITS}}}) -->\n"
    r"(?P<text>.*?)^<!-- end (?P=name) (?P=digest) -->$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class _Part:
    """A section as a card has it, and the text of no section that follows it."""

    name: str
    digest: str
    text: str
    after: str

    @property
    def edited(self) -> bool:
        return _digest(self.text) != self.digest


def has_sections(body: str) -> bool:
    """Whether a card was written in sections."""
    return _SECTION.search(body) is not None


def edited_sections(body: str) -> list[str]:
    """Names of the sections that are not as they were written."""
    return [part.name for part in _parts(body)[1] if part.edited]


def join_sections(sections: Mapping[str, str], previous: str = "") -> str:
    """Body of a card.

    Args:
        sections: name -> text as it is now.
        previous: body of the former card, whose edited sections and text between sections are taken over.
    """
    before, parts = _parts(previous)
    former = {part.name: part for part in parts}
    # an edited section stays even where the new card has none of its name
    names = [*sections, *(part.name for part in parts if part.name not in sections)]
    written = [NOTE, before]
    for name in names:
        part = former.get(name)
        if part is not None and part.edited:
            written.append(_marked(name, part.digest, part.text))
        elif name in sections:
            written.append(_marked(name, _digest(sections[name]), sections[name]))
        if part is not None:
            written.append(part.after)
    return "\n\n".join(text for text in written if text)


def _parts(body: str) -> tuple[str, list[_Part]]:
    """Text before the first section, and the sections."""
    found = list(_SECTION.finditer(body))
    if not found:
        return "", []
    ends = [match.start() for match in found[1:]] + [len(body)]
    parts = [
        _Part(match["name"], match["digest"], match["text"].strip(), body[match.end() : end].strip())
        for match, end in zip(found, ends, strict=True)
    ]
    return body[: found[0].start()].replace(NOTE, "").strip(), parts


def _marked(name: str, digest: str, text: str) -> str:
    return f"<!-- begin {name} {digest} -->\n\n{text}\n\n<!-- end {name} {digest} -->"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_NUM_DIGITS]
