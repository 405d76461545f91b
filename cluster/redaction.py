"""What may be shown: text without secrets, and without what would steer a terminal."""

from __future__ import annotations

import os
import re

from reward_service.config import SECRET_NAME

_SECRET_TEXT = re.compile(r"(?i)(?<=bearer )\S+|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_hidden: set[str] = set()  # variables that hold a secret, whatever they are called


def hide(variable: str) -> None:
    """The config says that this environment variable holds a secret."""
    _hidden.add(variable)


def printable(text: str) -> str:
    """`text` without secrets (values of environment variables such as HF_TOKEN, bearer tokens,
    passwords in URLs) and without control characters: a completion must not steer the terminal."""
    for name, value in os.environ.items():
        secret = name in _hidden or SECRET_NAME.search(name)
        if secret and len(value) >= 8 and not value.startswith("/"):
            text = text.replace(value, "***")
    return _CONTROL.sub("", _SECRET_TEXT.sub("***", text))
