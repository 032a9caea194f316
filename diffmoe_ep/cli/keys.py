"""The verb that is the manual of configs: keys."""

import json
import re
import textwrap
from dataclasses import dataclass

from diffmoe_ep.cli.options import Verb, positional
from diffmoe_ep.config import ConfigError, Key, keys
from diffmoe_ep.config.names import hint, meant_by

ROLES = {
    "identity": "what is computed, or which data in which order; a resume with another value is refused",
    "recipe": "may change at a resume, for the steps that follow; printed, and kept with the run",
    "execution": "how the same numbers are computed; a change passes in silence",
    "reporting": "what is written, and how samples are drawn; a change passes in silence",
}
INDENT, WIDTH = " " * 11, 110


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print config keys with role, type, default and meaning: all, or those that have to do with some words."""

    words: tuple[str, ...] = positional(
        "part of a name (lr, data., sample.), a role, a word of the manual, or what another trainer calls it",
        (),
        "WORD",
    )


def _keys(options: Options) -> None:
    every = list(keys())
    found = [key for key in every if all(_fits(key, word.lower()) for word in options.words)]
    if not found:
        name = "_".join(options.words)
        raise ConfigError(
            f"no key has to do with {' '.join(options.words)}; {hint(name, (), [key.name for key in every])}"
        )
    for role in dict.fromkeys(str(key.role) for key in found):
        print(f"{role:<11}{ROLES[role]}")
    print()
    for key in found:
        print(f"{key.role:<11}{key.name}: {key.kind} = {json.dumps(key.default)}")
        print(textwrap.fill(key.doc, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT))


def _fits(key: Key, word: str) -> bool:
    in_doc = re.search(rf"\b{re.escape(word)}\b", key.doc.lower())
    return word in key.name or word == key.role or in_doc is not None or meant_by(word) == key.name


VERBS = (Verb(("keys",), Options, _keys),)
