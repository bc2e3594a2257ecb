"""Judges: language models at an OpenAI-compatible server that grade or compare answers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from align.config.rewards import Seconds
from align.config.section import RUNTIME, Positive, Section
from align.config.server_url import require_server_url

Price = Annotated[float, Field(ge=0)]


class Budget(Section):
    """Limits on what a judge may use, calls of earlier runs on the same answers included. Default: no limit."""

    calls: Annotated[Positive | None, RUNTIME] = None
    """Maximum number of calls."""
    tokens: Annotated[Positive | None, RUNTIME] = None
    """Maximum number of tokens, prompts and answers together."""
    money: Annotated[Price | None, RUNTIME] = None
    """Maximum cost, in the currency of the judge's prices."""


class Prices(Section):
    """Prices of a million tokens."""

    prompt: Price
    """Price of prompts."""
    completion: Price
    """Price of the judge's answers."""


class Judge(Section):
    """A judge."""

    url: Annotated[str, RUNTIME]
    """Base URL of the server, for example `http://127.0.0.1:8000/v1`."""
    model: str
    """Name of the model at the server."""
    key: Annotated[str | None, RUNTIME] = None
    """Name of the environment variable with the server's API key. Default: no key is sent."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Sampling temperature. Use one above 0 with several votes."""
    max_tokens: Positive = 1024
    """Maximum number of tokens of a verdict with its explanation."""
    votes: Annotated[int, Field(ge=1, le=64)] = 1
    """Verdicts for each answer, or for each order of two answers."""
    workers: Annotated[Positive, RUNTIME] = 8
    """Number of calls at a time."""
    timeout_s: Annotated[Seconds, RUNTIME] = 120.0
    """Timeout of a call in seconds, including the connection."""
    retries: Annotated[int, Field(ge=0, le=20), RUNTIME] = 5
    """Number of retries after a failed connection, a timeout, or status 429 or 500 to 599. The delays are 0.5, 1, 2,
    ... seconds."""
    prices: Annotated[Prices | None, RUNTIME] = None
    """Prices of a million tokens. Default: the cost is not computed."""
    budget: Annotated[Budget, RUNTIME] = Field(default_factory=Budget)
    """Limits on what the judge may use."""

    @model_validator(mode="after")
    def _usable(self) -> Judge:
        require_server_url(self.url, "http://127.0.0.1:8000/v1")
        if self.votes > 1 and self.temperature == 0:
            raise ValueError(f"{self.votes} votes at temperature 0 are all equal; set temperature above 0, or votes: 1")
        if self.budget.money is not None and self.prices is None:
            raise ValueError("budget.money needs prices; set `prices: {prompt: P, completion: C}` per million tokens")
        return self
