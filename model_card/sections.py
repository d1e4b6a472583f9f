"""Puts a card's sections between markers, so that rewriting the card keeps what a user wrote.

A marker contains a hash of the text written below it: a section that no longer matches its hash was edited and is
kept, as is text outside all sections. The closing marker repeats the hash; no text can contain its own hash, so data
cannot forge a marker.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass


NOTE = (
    "<!-- Each section is between two markers. Sections that you edit, and text that you add between sections, are "
    "kept when the card is rewritten; delete a section with its markers to have it regenerated. -->"
)
FORMER_NOTE = (  # of cards written by earlier versions
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
    """A section as found in a card, and the unmarked text that follows it."""

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
    """Names of the sections that were edited."""
    return [part.name for part in _parts(body)[1] if part.edited]


def replace_in_sections(body: str, pattern: re.Pattern[str], replacement: str) -> str:
    """A card with `replacement` for matches of `pattern` in the sections that nobody edited; their markers follow."""

    def replaced(section: re.Match[str]) -> str:
        text = section["text"].strip()
        if _digest(text) != section["digest"]:
            return section[0]
        text = pattern.sub(lambda _: replacement, text)
        return _marked(section["name"], _digest(text), text)

    return _SECTION.sub(replaced, body)


def join_sections(sections: Mapping[str, str], previous: str = "") -> str:
    """Join sections into the body of a card.

    Args:
        sections: name -> current text.
        previous: body of the former card; its edited sections and the text between sections are kept.
    """
    before, parts = _parts(previous)
    former = {part.name: part for part in parts}
    # an edited section is kept even if the new card has no section of its name
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
    return body[: found[0].start()].replace(NOTE, "").replace(FORMER_NOTE, "").strip(), parts


def _marked(name: str, digest: str, text: str) -> str:
    return f"<!-- begin {name} {digest} -->\n\n{text}\n\n<!-- end {name} {digest} -->"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_NUM_DIGITS]
