"""The chat templates of this version and of former ones, which render the same and refuse less."""

import hashlib

from llava_llama31.processing import CHAT_TEMPLATE


# SHA-256 of each, oldest first
_FORMER = (
    "76328ab85404e025d922ce997d30bf0f41c6fcb04675784230415aad922f690a",
    "a43f977833df54c6e93dc28b847dc345748ea5f5c14e76837d080ecb797eae25",
)


def is_own_template(text: object) -> bool:
    """Whether a chat template is this version's or a former one's."""
    return text == CHAT_TEMPLATE or (isinstance(text, str) and hashlib.sha256(text.encode()).hexdigest() in _FORMER)
