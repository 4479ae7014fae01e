"""One response, from the request to its end: the object in each status, and its events.

https://platform.openai.com/docs/api-reference/responses/object
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

from headrace.api import logprobs
from headrace.api.chat import ChatTurn
from headrace.api.chat_message import ChoiceMessage
from headrace.api.generation import Choice, TextDelta, Usage
from headrace.api.reply import usage_object
from headrace.api.responses_items import ItemIds
from headrace.api.responses_output import Emit, ResponseOutput, no_events
from headrace.api.responses_protocol import TOOL_FIELDS, ResponsesRequest, own_terms
from headrace.api.resume import Head
from headrace.errors import EngineError, HeadraceError, OverloadedError, RequestError
from headrace.text.message_text import MessagePiece, Reasoning
from headrace.text.tool_calls import CallStart, Content

ENDED = ("completed", "incomplete", "failed", "cancelled")


class ResponseAnswer:
    """`run` it to its end. `emit`: takes its events; without, nothing is told before the end.
    `origins`: the fields that errors name, as those of Question."""

    def __init__(
        self,
        body: ResponsesRequest,
        turn: ChatTurn,
        ids: ItemIds,
        *,
        store: bool,
        ignored_fields: list[str],
        origins: list[str],
        emit: Emit | None = None,
    ) -> None:
        self.generation = turn.generation
        self.journal = turn.context.journal
        self.on_token: Callable[[Choice, TextDelta], None] | None = None
        """Told of each token before its events."""
        head = self.journal.head if self.journal else None
        self.id = head.id if head else turn.context.response_id
        if self.journal:
            self.generation.cached_tokens = self.journal.cached_tokens
        self._calls = 0
        self._turn = turn
        self._emit = emit or no_events
        self._output = ResponseOutput(ids, self._emit, live=emit is not None)
        self._message = None if turn.reader is None else ChoiceMessage(turn.reader.message_text())
        self._top_logprobs = (body.top_logprobs or 0) if body.wants_logprobs else None
        self._logprobs: list[Any] = []
        """Of tokens whose text has not come yet."""
        self._finish_reason: str | None = None
        self._queued = bool(body.background)
        self._begun = False
        self._origins = origins
        self._object = {
            **request_told_again(body, turn.generation.sampling_in_effect()),
            "id": self.id,
            "object": "response",
            "created_at": head.created if head else int(time.time()),
            "model": body.model or turn.model.name,
            "status": "queued" if self._queued else "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "store": store,
            "usage": None,
        }
        if ignored_fields:
            self._object["headrace"] = {"ignored_fields": ignored_fields}

    @property
    def object(self) -> dict[str, Any]:
        """As it is told before the end: without output."""
        return self._object

    async def run(self) -> dict[str, Any]:
        """The object at the regular end. Tells the end of the last item, but not its own: that is
        `ending_event`, once the object is kept.

        Raises what Generation.run raises, in terms of this endpoint. A grammar that the engine
        refuses is told before any event.
        """
        if not self._turn.constrained:
            self.begin()
        try:
            with own_terms(self._origins):
                self._resume()
                await self.generation.run(self._add)
        except HeadraceError as error:
            if not isinstance(error, RequestError):
                self.begin()
            raise
        self.begin()
        return self._end()

    def begin(self) -> None:
        """Tell that the engine has it, unless that is told."""
        if self._begun:
            return
        self._begun = True
        self._emit("response.created", response=self._object)
        if self._queued:
            self._emit("response.queued", response=self._object)
        else:
            self._emit("response.in_progress", response=self._object)

    def _add(self, choice: Choice, deltas: list[TextDelta]) -> None:
        self.begin()
        if self._queued:
            self._queued = False
            self._object = {**self._object, "status": "in_progress"}
            self._emit("response.in_progress", response=self._object)
        for delta in deltas:
            if self.on_token is not None:
                self.on_token(choice, delta)
            self._take(delta)

    def _take(self, delta: TextDelta) -> None:
        if self._message is not None:
            delta = self._message.read(delta)
        if self._top_logprobs is not None:
            self._add_logprobs(delta)
        for piece in _pieces(delta):
            if isinstance(piece, CallStart) and self.journal is not None:
                piece = piece._replace(id=self._call_id(piece))
            self._output.add(piece, self._logprobs_of(piece))
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason

    def head(self) -> Head:
        """What a stream that goes on elsewhere must not change."""
        return Head(
            id=self.id,
            created=self._object["created_at"],
            seed=self.generation.seed,
            fingerprint=self._turn.model.fingerprint,
        )

    def _resume(self) -> None:
        """Take up what another server has sent."""
        choice = self.generation.choices[0]
        sent = self.journal.sent.get(choice.index) if self.journal else None
        if sent is not None:
            self.begin()
            for delta in choice.resume(sent):
                self._take(delta)

    def _call_id(self, start: CallStart) -> str:
        """The same wherever the stream goes on: the last event tells all calls again."""
        self._calls += 1
        digest = hashlib.blake2b(f"{self.id}/{self._calls}".encode(), digest_size=12).hexdigest()
        return f"call_{digest}" if start.id.startswith("call_") else digest[: len(start.id)]

    def _end(self) -> dict[str, Any]:
        incomplete = self._finish_reason == "length"
        self._output.end(incomplete=incomplete)
        ended: dict[str, Any] = {
            "status": "incomplete" if incomplete else "completed",
            "output": self._output.items,
            "usage": self._usage(),
        }
        if incomplete:
            ended["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            ended["completed_at"] = int(time.time())
        return {**self._object, **ended}

    def failed(self, error: BaseException) -> dict[str, Any]:
        """The object when the engine did not come to an end. What there is of the output stays."""
        return failed_object({**self._object, "output": self._output.items}, error)

    def _usage(self) -> dict[str, Any]:
        usage = self.generation.usage
        if self._message is not None:
            usage = usage._replace(reasoning_tokens=self._message.thought)
        return responses_usage(usage)

    def _logprobs_of(self, piece: MessagePiece) -> list[Any]:
        """Of the tokens that a piece of content consists of. Tokens before it were markers, those
        after it are held back."""
        waiting = self._logprobs
        if not waiting:
            return []
        if not isinstance(piece, Content):
            self._logprobs = []
            return []
        raw = piece.text.encode()
        begin = b"".join(bytes(entry["bytes"]) for entry in waiting).rfind(raw)
        if begin < 0:
            self._logprobs = []
            return waiting
        found, self._logprobs, position = [], [], 0
        for entry in waiting:
            if position >= begin + len(raw):
                self._logprobs.append(entry)
            elif position + len(entry["bytes"]) > begin:
                found.append(entry)
            position += len(entry["bytes"])
        return found

    def _add_logprobs(self, delta: TextDelta) -> None:
        if delta.token_id is None or delta.logprobs is None:
            return
        top = self._top_logprobs or 0
        as_ids = bool(self._turn.body.return_tokens_as_token_ids)
        tokenizer = self._turn.text.tokenizer
        self._logprobs.append(
            logprobs.chat_entry(tokenizer, delta.token_id, delta.logprobs, top, as_ids=as_ids)
        )


def ending_event(response: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Type and fields of the last event. There is none for a cancelled response: it is told as
    incomplete, and its status says more."""
    status = response["status"]
    kind = status if status in ("completed", "failed") else "incomplete"
    return f"response.{kind}", {"response": response}


def failed_object(response: dict[str, Any], error: BaseException) -> dict[str, Any]:
    message = (
        error.message
        if isinstance(error, HeadraceError)
        else EngineError("The server failed while it worked on this response.").message
    )
    code = "rate_limit_exceeded" if isinstance(error, OverloadedError) else "server_error"
    if isinstance(error, RequestError):
        code = "invalid_prompt"
    output = [_cut_off(item) for item in response["output"]]
    failure = {"status": "failed", "error": {"code": code, "message": message}}
    return {**response, **failure, "output": output}


def responses_usage(usage: Usage) -> dict[str, Any]:
    """The Responses API's `usage`. What is not known is 0, for clients want a number."""
    shaped: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens or 0,
            "cache_write_tokens": 0,  # those that are charged for
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if "headrace" in (ours := usage_object(usage)):
        shaped["headrace"] = ours["headrace"]
    return shaped


def request_told_again(body: ResponsesRequest, sampling: dict[str, Any]) -> dict[str, Any]:
    """The fields that say what was asked for. `sampling`: the parameters in effect."""
    text, reasoning = body.text, body.reasoning
    form = (text.format if text else None) or {"type": "text"}
    given = {
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
    }
    return {
        "background": bool(body.background),
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary if reasoning else None,
        },
        "service_tier": "default",
        "temperature": sampling["temperature"],
        "text": {"format": form, "verbosity": "medium"},
        "tool_choice": _tool_choice(body.tool_choice),
        "tools": [_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling["top_p"],
        "truncation": body.truncation or "disabled",
        **{name: value for name, value in given.items() if value is not None},
    }


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """With the fields that clients want in every one, and those alone: others are unchecked."""
    return {"type": "function", **{name: tool.get(name) for name in TOOL_FIELDS}}


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice or "auto"
    return {"mode": "auto", **choice} if choice["type"] == "allowed_tools" else choice


def _pieces(delta: TextDelta) -> list[MessagePiece]:
    if delta.kind is None:
        return list(delta.pieces)
    if not delta.text:
        return []
    return [Content(delta.text) if delta.kind == "content" else Reasoning(delta.text)]


def _cut_off(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "status": "incomplete"} if item["status"] == "in_progress" else item
