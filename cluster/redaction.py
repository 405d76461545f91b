"""What may be shown: text without secrets, and without what would steer a terminal."""

from __future__ import annotations

import json
import os
import re
from html import escape

from reward_service.config import SECRET_NAME, HttpScorerConfig, ScorerConfig, SumScorerConfig

PLACES = ("_PATH", "_FILE", "_DIR")  # a variable named so says where a secret lies

_SECRET_TEXT = re.compile(r"(?i)(?<=bearer )\S+|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_hidden: set[str] = set()  # variables that hold a secret, whatever they are called


def hide(variable: str) -> None:
    """The config says that this environment variable holds a secret."""
    _hidden.add(variable)


def hide_tokens(scorer: ScorerConfig) -> None:
    """The variables that a scorer's config names: in every process that may show what they hold."""
    if isinstance(scorer, HttpScorerConfig) and scorer.token_env is not None:
        hide(scorer.token_env)
    elif isinstance(scorer, SumScorerConfig):
        for part in scorer.parts.values():
            hide_tokens(part.scorer)


def printable(text: str) -> str:
    """`text` without secrets (values of environment variables such as HF_TOKEN, bearer tokens,
    passwords in URLs) and without control characters: a completion must not steer the terminal."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    return _CONTROL.sub("", _SECRET_TEXT.sub("***", text))


def escaped(text: str) -> str:
    """What is printable of it, as HTML. In that order: in HTML a secret may look otherwise."""
    return escape(printable(text))


def _secrets() -> list[str]:
    """As they are, and as they stand in JSON or a repr; the longest first, for one may hold another."""
    found = set()
    for name, value in os.environ.items():
        secret = SECRET_NAME.search(name) and not name.upper().endswith(PLACES)
        if (secret or name in _hidden) and len(value) >= 8:
            found |= {value, json.dumps(value)[1:-1], repr(value)[1:-1]}
    return sorted(found, key=lambda value: (-len(value), value))
