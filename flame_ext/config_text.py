"""Options as text: ``KEY=VALUE`` of a command line, and a table of all of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from flame_ext.config import Config


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Options of ``KEY=VALUE`` texts: JSON values, ``a,b`` for lists, else plain text.

    Raises:
        ValueError: If a text has no ``=``.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"--set {pair!r} is not of the form KEY=VALUE, as in --set gamma=0.98")
        key, value = key.strip(), _parse_value(text.strip())
        if isinstance(getattr(Config, key, None), tuple) and not isinstance(value, list):
            value = [value]  # One hidden layer: hidden_sizes=256.
        overrides[key] = value
    return overrides


def _parse_value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for candidate in (text, f"[{text}]"):
        try:
            return json.loads(candidate)
        except json.JSONDecodeError:
            continue
    return text


def describe_config(config: Config) -> str:
    """One line per option: name, value, and the meaning from the documentation of `Config`."""
    meanings = _meanings(type(config).__doc__ or "")
    lines = []
    for name, value in config.to_dict().items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
        lines.append(f"{name:<27} {shown:<12} {meanings.get(name, '')}".rstrip())
    return "\n".join(lines)


def _meanings(docstring: str) -> dict[str, str]:
    """Attribute descriptions of a Google-style docstring, each joined to one line."""
    meanings: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(docstring).partition("Attributes:")[2].splitlines():
        indent = len(line) - len(line.lstrip())
        head, separator, text = line.strip().partition(": ")
        if indent == 4 and separator and head.isidentifier():
            name = head
            meanings[name] = text
        elif name and line.strip():
            meanings[name] += " " + line.strip()
    return meanings
