"""One model's text side: its tokenizer and its chat template.

Built from plain arguments; where the files come from is the loader's matter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from headrace.errors import CheckpointError, ConfigError, InvalidRequestError
from headrace.text.chat_template import ChatTemplate
from headrace.text.gguf_tokenizer import gguf_tokenizer_settings, tokenizer_from_gguf
from headrace.text.reasoning import ReasoningFormat, reasoning_format
from headrace.text.tokenizer import Tokenizer
from headrace.text.tool_calls import GENERIC, ToolCallFormat, tool_call_format
from headrace.text.tool_calls_prompt import is_about_tools, with_ids, with_tools_as_text


class TokenizerAssets(Protocol):
    """What a checkpoint has for the text side; absent parts are None."""

    @property
    def tokenizer_json(self) -> Path | None: ...

    @property
    def tokenizer_config(self) -> Mapping[str, Any] | None: ...

    @property
    def special_tokens_map(self) -> Mapping[str, Any] | None: ...

    @property
    def chat_template(self) -> str | Mapping[str, str] | None: ...

    @property
    def gguf_metadata(self) -> Mapping[str, Any] | None: ...


class TextProcessor:
    def __init__(
        self, tokenizer: Tokenizer, chat_template: str | Mapping[str, str] | None = None
    ) -> None:
        """Raises CheckpointError if the template does not compile."""
        self.tokenizer = tokenizer
        self.chat_template = (
            ChatTemplate(chat_template, special_tokens=tokenizer.special_tokens)
            if chat_template
            else None
        )
        self.reasoning: ReasoningFormat | None = None
        self.tool_calls: ToolCallFormat | None = None
        self.choose_parsers()

    def choose_parsers(self, tool_calls: str = "auto", reasoning: str = "auto") -> None:
        """Set how the model writes tool calls and reasoning, by name, "auto" or "none".

        Raises ConfigError for an unknown name."""
        template = self.chat_template
        source = "" if template is None else template.tool_source
        takes_tools = template is not None and template.takes_tools
        self.tool_calls = tool_call_format(tool_calls, source, takes_tools=takes_tools)
        self.reasoning = reasoning_format(reasoning, source)

    def with_template(self, template: ChatTemplate) -> TextProcessor:
        """The same with another template. Calls and reasoning are read as before."""
        other = copy.copy(self)
        other.chat_template = template
        return other

    @classmethod
    def from_assets(
        cls, assets: TokenizerAssets, *, template_file: str | None = None
    ) -> TextProcessor:
        """The text side of a checkpoint; `template_file`, a path, replaces its chat template.

        Raises CheckpointError if there is no tokenizer that we can read, ConfigError for a
        template file that cannot be read.
        """
        template = None if template_file is None else _read_template(template_file)
        if assets.gguf_metadata is not None:
            return cls.from_gguf(assets.gguf_metadata, chat_template=template)
        if assets.tokenizer_json is None:
            raise CheckpointError(
                "The model has no tokenizer.json, the one tokenizer file that is read. Download "
                "it from the model's repository, or convert the tokenizer it has."
            )
        return cls.from_tokenizer_json(
            assets.tokenizer_json,
            config={**(assets.special_tokens_map or {}), **(assets.tokenizer_config or {})},
            chat_template=template or assets.chat_template,
        )

    @classmethod
    def from_tokenizer_json(
        cls,
        path: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
    ) -> TextProcessor:
        """`path`: tokenizer.json. `config`: the content of tokenizer_config.json. `chat_template`:
        that of a file beside it (chat_template.jinja), which precedes the one in `config`.

        Raises CheckpointError if a file does not fit.
        """
        config = config or {}
        template = chat_template or _template_in(config)
        return cls(Tokenizer.from_file(path, config), template)

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        chat_template: str | Mapping[str, str] | None = None,
    ) -> TextProcessor:
        """From a GGUF file's metadata (`tokenizer.ggml.*`, `tokenizer.chat_template`, which
        `chat_template` replaces).

        Raises CheckpointError if they do not describe a tokenizer."""
        settings = gguf_tokenizer_settings(metadata)
        pieces = metadata["tokenizer.ggml.tokens"]
        ids = {
            "bos_token": settings.bos_token_id,
            "eos_token": settings.eos_token_id,
            "unk_token": settings.unk_token_id,
            "pad_token": settings.pad_token_id,
        }
        config = {name: pieces[index] for name, index in ids.items() if index is not None}
        template = chat_template or settings.chat_template
        return cls(Tokenizer(tokenizer_from_gguf(metadata), config), template)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation, in which the model may call `tools` (in OpenAI's shape).
        Raises InvalidRequestError if the template, or its lack, does not allow it."""
        if self.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template, so it takes no messages; send the whole prompt "
                "to /v1/completions.",
                param="messages",
                code="chat_template_missing",
            )
        as_text = self.tool_calls is GENERIC or not self.chat_template.takes_tools
        if as_text and (tools or is_about_tools(messages)):
            messages, tools = with_tools_as_text(messages, tools), ()
        elif self.tool_calls is not None and self.tool_calls.short_ids:
            messages = with_ids(messages, self.tool_calls.template_id)
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            kwargs=kwargs,
        )


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path}: {error}.") from None


def _template_in(config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """tokenizer_config.json holds one template, or a list of {"name", "template"}."""
    value = config.get("chat_template")
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return value if isinstance(value, str) else None
