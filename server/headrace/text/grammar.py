"""Grammars that answers must keep to, in llguidance's dialect of Lark.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. Here is what all of them are put
together from, and how reasoning comes before what is constrained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from headrace.text.reasoning import ReasoningFormat

TEXT = "/(?s:.*)/"
BLANK = r"/\s{0,4}/"
_CONTENT = "content"


class GrammarRules:
    """The rules of one grammar. Each gets a name of its own, so that parts made apart fit together.

    `special_ids`: the tokens of those markers that are special tokens of the model. A rule's text
    may spell a marker, too: readers of the text cannot tell one from the other.
    """

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self._special_ids = special_ids
        self._names: dict[str, str] = {}  # by definition
        self._grammars: dict[str, str] = {}

    def rule(self, body: str, *, lazy: bool = False) -> str:
        """The name of a rule. `lazy`: it ends where it first may end."""
        definition = f"{'[lazy]' if lazy else ''}: {body}"
        return self._names.setdefault(definition, f"r{len(self._names)}")

    def grammar(self, source: str) -> str:
        """A reference to another whole grammar."""
        name = self._grammars.setdefault(source, f"g{len(self._grammars)}")
        return f"@{name}"

    def is_special(self, marker: str) -> bool:
        return marker in self._special_ids

    def marker(self, marker: str) -> str:
        """The marker, as the model writes it."""
        token_id = self._special_ids.get(marker)
        return quoted(marker) if token_id is None else f"<[{token_id}]>"

    def up_to(self, marker: str, text: str = TEXT) -> str:
        """`text`, a terminal, to the first marker and through it."""
        spelled = self.rule(f"{text} {quoted(marker)}", lazy=True)
        if marker not in self._special_ids:
            return spelled
        return self.rule(f"{spelled} | {text} {self.marker(marker)}")

    def source(self, start: str) -> str:
        """The whole grammar: its text, or that and others in JSON."""
        lines = [f"{name}{definition}" for definition, name in self._names.items()]
        text = "\n".join(("%llguidance {}", f"start: {start}", *lines)) + "\n"
        if not self._grammars:
            return text
        grammars = [{"name": "answer", "lark_grammar": text}]
        grammars += [
            {"name": name, "lark_grammar": source} for source, name in self._grammars.items()
        ]
        return json.dumps({"grammars": grammars})


def after_reasoning(
    rules: GrammarRules, answer: str, form: ReasoningFormat | None, *, begun: bool
) -> str:
    """`answer`, a rule, after free reasoning. `form`: None where the model does not think. `begun`:
    the prompt has the opening marker; otherwise the model need not think."""
    if form is None:
        return answer
    thought = rules.up_to(form.close)
    if begun:
        return rules.rule(f"{thought} {BLANK} {answer}")
    opening = rules.up_to(form.open, r"/\s*/")
    return rules.rule(f"{answer} | {opening} {thought} {BLANK} {answer}")


def quoted(text: str) -> str:
    """The text, to the letter."""
    return json.dumps(text)


def json_value(schema: Mapping[str, Any], *, lenient: bool) -> str:
    """JSON that `schema` allows, on one line. `lenient`: keywords that the library does not know
    are left out of account; otherwise they make the grammar one that is refused."""
    options = {
        "whitespace_flexible": False,
        "item_separator": ", ?",
        "key_separator": ": ?",
        "lenient": lenient,
    }
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"
