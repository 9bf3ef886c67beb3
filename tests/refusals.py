"""What a refusal of settings names in their place."""

import re

import yaml


def advice(reason, chunk):
    """The alternatives that a refusal names, each a dict of settings: `…; set K to V and K to V, or K to V`; `chunk`
    is the memory's, which a level does not know."""
    found = []
    for alternative in reason.strip().rpartition("; set ")[2].split(", or "):
        pairs = [re.fullmatch(r"([\w.]+) to (.+)", part) for part in alternative.split(" and ")]
        if all(pairs):
            found.append({key: _value(text, chunk) for key, text in (pair.groups() for pair in pairs if pair)})
    return found


def _value(text, chunk):
    return chunk if text.startswith("the memory's chunk") else yaml.safe_load(text)
