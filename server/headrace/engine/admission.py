"""What waits for its first token, and its limits; with several API processes, of all of them."""

from __future__ import annotations

from headrace.engine.client import QueueLimits, Workload
from headrace.engine.queue_board import QueueBoard
from headrace.engine.speed import Speed
from headrace.errors import OverloadedError
from headrace.sampling_params import GenerateRequest


class AdmissionQueue:
    """The requests of one process that have no token yet."""

    def __init__(self, limits: QueueLimits, board: QueueBoard | None) -> None:
        """`board`: shared with others whose requests wait for the same engine."""
        self.speed = Speed()
        self._limits = limits
        self._board = board
        self._num_live = 0
        self._prompt_tokens: dict[str, int] = {}
        """By request id."""
        self._total = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._prompt_tokens

    def enter(self, request: GenerateRequest) -> None:
        """Raises OverloadedError, and lets nothing in, when the queue is full."""
        # Told before it is checked: of two processes that take the last place at once, at least one
        # sees the other.
        self._prompt_tokens[request.request_id] = len(request.prompt_token_ids)
        self._total += len(request.prompt_token_ids)
        self._publish()
        try:
            self._check(len(request.prompt_token_ids))
        except OverloadedError:
            self.leave(request.request_id)
            raise

    def leave(self, request_id: str) -> None:
        num_tokens = self._prompt_tokens.pop(request_id, None)
        if num_tokens is not None:
            self._total -= num_tokens
            self._publish()

    def count_live(self, num_live: int) -> None:
        """Of this process: those that wait and those that have tokens."""
        self._num_live = num_live
        self._publish()

    @property
    def workload(self) -> Workload:
        live, queued_tokens, speed = self._num_live, self._total, self.speed
        if self._board is not None:
            live, queued_tokens = self._board.num_live, queued_tokens + self._board.others()[1]
        return Workload(live, queued_tokens, speed.prefill_tokens_per_s, speed.decode_step_s)

    def _publish(self) -> None:
        if self._board is not None:
            self._board.publish(len(self._prompt_tokens), self._total, self._num_live)

    def _check(self, num_prompt_tokens: int) -> None:
        """Whether there was room for the request that has just entered."""
        limits = self._limits
        num_queued, queued_tokens = len(self._prompt_tokens) - 1, self._total - num_prompt_tokens
        if self._board is not None:
            elsewhere, tokens_elsewhere = self._board.others()
            num_queued, queued_tokens = num_queued + elsewhere, queued_tokens + tokens_elsewhere
        if num_queued >= limits.max_queued_requests:
            what = f"{num_queued} requests are waiting (limit {limits.max_queued_requests})"
        elif num_queued and queued_tokens + num_prompt_tokens > limits.max_queued_tokens:
            what = f"{queued_tokens} prompt tokens are waiting (limit {limits.max_queued_tokens})"
        else:
            return
        rate = self.speed.prefill_tokens_per_s
        wait = queued_tokens / rate if rate > 0 else 1.0
        raise OverloadedError(
            f"The server is overloaded: {what}. Retry later.",
            retry_after=min(max(wait, 1.0), 60.0),
        )
