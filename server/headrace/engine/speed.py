"""How fast the engine's steps are, from the statistics that it sends with them."""

from __future__ import annotations

from headrace.engine.client import EngineStats

MAX_STEP_SECONDS = 10.0
"""A longer gap between two steps held no step all the while: the engine was idle or away."""
WEIGHT = 0.1
"""Of a new observation in the moving averages."""


class Speed:
    """Moving averages; 0.0 until there is something to tell."""

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        """Tokens a second of steps that compute prompts: how fast a queue is worked off."""
        self.decode_step_s = 0.0
        """Seconds of a step in which every running request gets one token."""

    def observe(self, before: EngineStats, now: EngineStats) -> None:
        """Two statistics of one engine, one after the other."""
        steps, elapsed = now.steps - before.steps, now.last_step_time - before.last_step_time
        if steps <= 0 or now.step_tokens <= 0 or not 0 < elapsed < MAX_STEP_SECONDS:
            return
        seconds = elapsed / steps
        # Those that ended with the step are not running any more.
        if now.step_tokens > 2 * max(now.running, before.running, 1):
            rate = now.step_tokens / seconds
            self.prefill_tokens_per_s = _moved(self.prefill_tokens_per_s, rate)
        elif before.running:  # else the engine was idle for a part of the time
            self.decode_step_s = _moved(self.decode_step_s, seconds)


def _moved(average: float, value: float) -> float:
    return value if average == 0.0 else average + WEIGHT * (value - average)
