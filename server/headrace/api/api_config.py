"""The options of the HTTP side: values only, filled in by who reads flags and files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    api_keys: tuple[str, ...] = ()
    """Requests must carry one of them as a bearer token; empty: no key is asked for."""
    max_body_bytes: int = 32 * 2**20
    max_file_bytes: int = 512 * 2**20
    data_limit: int = 10 * 2**30
    """Bytes that all that is kept may take before uploads are refused."""
    max_stored_responses: int = 10_000
    """About so many of the newest ones are kept; 0: none."""
    batch_concurrency: int | None = None
    """Lines of batches that run at the same time, at most; None: half of the engine's rows."""
    max_unsent_bytes: int = 2**20
    """Output that may wait for one slow client before its request is aborted."""
    step_age_limit: float = 60.0
    """Seconds without a sign of life from the engine after which /livez answers 503."""
    strict_fields: bool = False
    """Refuse unknown request fields instead of naming them in the response."""
    trust_request_chat_template: bool = False
    """Requests may bring a chat template of their own."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may call the server; empty: none but its own."""
    version: str = "0.0.0"
