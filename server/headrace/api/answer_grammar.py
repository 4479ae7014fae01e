"""The grammar of an answer in a chat: what its format, its tools and its reasoning ask for, as one.

Calls that are forced, and all calls beside a strict function, are held to the schemas of their
parameters; of a function that is not strict to as much of it as can be kept to.
"""

from __future__ import annotations

from headrace.api.chat_message import MessageReader
from headrace.api.structured_output import MAX_CHARACTERS, OutputGrammar, check_sampling
from headrace.api.tools import ToolUse
from headrace.errors import InvalidRequestError
from headrace.sampling_params import SamplingParams
from headrace.text.grammar import GrammarRules, after_reasoning
from headrace.text.tokenizer import Tokenizer
from headrace.text.tool_calls_grammar import CallRules, Function


def answer_grammar(
    content: OutputGrammar | None,
    reader: MessageReader | None,
    sampling: SamplingParams,
    tokenizer: Tokenizer,
) -> OutputGrammar | None:
    """None: the answer may be anything. `content`: what the answer must be where it is no call.

    What is thought before stays free. Raises InvalidRequestError for what cannot be kept to.
    """
    if reader is None:
        return content
    use = reader.tools
    if content is None and not (use and use.constrained):
        return None
    special_ids = {
        marker: token_id
        for marker in reader.markers
        for token_id in tokenizer.special_ids_of((marker,))
    }
    rules = GrammarRules(special_ids)
    param = "tools" if content is None else content.param
    try:
        answer = _answer(rules, content, use)
        start = after_reasoning(rules, answer, reader.reasoning, begun=reader.begun)
        text = rules.source(start)
    except RecursionError:
        raise InvalidRequestError(
            "The tools' parameters are nested too deeply; simplify them.", param="tools"
        ) from None
    if use is not None:
        param = "tools" if use.forced else param
        check_sampling(sampling, param)
        if len(text) > 4 * MAX_CHARACTERS:
            raise InvalidRequestError(
                f"The grammar of the tools' calls has {len(text)} characters, more than "
                f"{4 * MAX_CHARACTERS}; give fewer tools, or simpler parameters.",
                param="tools",
            )
    return OutputGrammar(text, param)


def _answer(rules: GrammarRules, content: OutputGrammar | None, use: ToolUse | None) -> str:
    """The rule of an answer, without its reasoning."""
    if use is None:
        assert content is not None
        return rules.grammar(content.text)
    functions = [
        Function(name, tool.function.parameters, bool(tool.function.strict))
        for name, tool in use.callable.items()
    ]
    calls = CallRules(rules, use.form, functions, several=use.max_calls is None)
    if use.forced:
        return calls.alone()
    if content is None:
        return calls.in_text()
    return rules.rule(f"{calls.marked()} | {rules.grammar(content.text)}")
