"""A language model behind an OpenAI-compatible `/v1/chat/completions`: asked patiently, and told apart from a wrong
address. Torch-free.

The key is read from the environment, sent with each request, and goes nowhere else: not to a file, not into a message,
and not over plain http to another machine.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..distill.errors import RunFailed, UserError

if TYPE_CHECKING:
    import httpx2

TRIES = 6
TIMEOUT = 180.0
"""Seconds for one reply."""
LONGEST_WAIT = 60.0
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Unanswered(RunFailed):
    """The endpoint gave no usable reply, however often it was asked."""


class Endpoint:
    """One model of one server.

    Args:
        url: of the server, with or without `/v1` and `/v1/chat/completions`.
        model: its name there.
        key_env: environment variable that holds the key; unset or empty: none is sent.
        tries: of one request.
        sleep: waits so many seconds.

    Attributes:
        notes: what the user should know, in words.

    Raises:
        UserError: the url is none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_env: str = "OPENAI_API_KEY",
        tries: int = TRIES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import httpx2

        self.url, self.model, self.tries, self.sleep = chat_url(url), model, tries, sleep
        self.notes: list[str] = []
        key = os.environ.get(key_env)
        parts = urlsplit(self.url)
        if key and parts.scheme == "http" and parts.hostname not in _LOCAL:
            self.notes.append(f"{key_env} was not sent: the endpoint is plain http to another machine")
            key = None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._key, self._key_env, self._rng = key or None, key_env, random.Random(0)
        self._changes: dict[str, Any] = {}
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(TIMEOUT, connect=15.0))

    def ask(self, messages: list[dict[str, str]], max_tokens: int = 2048) -> str:
        """The reply to a conversation, at temperature 0.

        Refusals for a while (408, 409, 425, 429, 5xx), broken connections and replies that are no chat completion are
        tried again, after a wait that doubles or is what the server asks for.

        Raises:
            UserError: the server refuses the request as such: wrong address, key or model.
            Unanswered: no usable reply after all tries.
        """
        import httpx2

        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        wrong, attempt = "", 0
        while attempt < self.tries:
            attempt += 1
            wait = min(LONGEST_WAIT, 2.0 ** (attempt - 1) * (1 + self._rng.random()))
            try:
                reply = self._client.post(
                    self.url, json={k: v for k, v in (body | self._changes).items() if v is not None}
                )
            except httpx2.TransportError as error:
                wrong = f"{type(error).__name__}: {error}"
            else:
                if reply.status_code == 200:
                    if (content := _content(reply)) is not None:
                        return self._without_key(content)
                    wrong = f"a reply that is no chat completion: {self._without_key(reply.text)[:80]!r}"
                elif reply.status_code in _AGAIN:
                    wrong, wait = f"status {reply.status_code}", _asked_wait(reply) or wait
                elif reply.status_code == 400 and self._adapt(reply.text, max_tokens):
                    attempt -= 1
                    continue
                else:
                    raise UserError(self._refused(reply))
            if attempt < self.tries:
                self.sleep(wait)
        raise Unanswered(f"{self.url}: no usable reply in {self.tries} tries (the last: {wrong})")

    def _adapt(self, said: str, max_tokens: int) -> bool:
        """Leave out what some servers' models do not take; whether anything was changed."""
        before = dict(self._changes)
        if "max_completion_tokens" in said:
            self._changes |= {"max_tokens": None, "max_completion_tokens": max_tokens}
        elif "temperature" in said:
            self._changes |= {"temperature": None}
        return self._changes != before

    def _without_key(self, text: str) -> str:
        """What a server says is shown and kept; it may say the key."""
        return text.replace(self._key, "…") if self._key else text

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _refused(self, reply: httpx2.Response) -> str:
        hints = {
            401: f"set the key: export {self._key_env}=…",
            403: f"the key in {self._key_env} may not use this model",
            404: "give the server's base url, e.g. http://localhost:8000/v1, and a model that it serves",
        }
        hint = hints.get(reply.status_code, f"it was asked for the model {self.model!r}")
        return f"--endpoint {self.url}: status {reply.status_code} ({self._without_key(reply.text)[:120]!r}); {hint}"


def chat_url(url: str) -> str:
    """The address of chat completions on a server.

    Raises:
        UserError: no http or https url.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--endpoint {url}: expected an http or https url, e.g. http://localhost:8000/v1")
    base = url.rstrip("/")
    if base.endswith("/chat/completions"):
        return base
    return base + ("/chat/completions" if base.endswith("/v1") else "/v1/chat/completions")


def _asked_wait(reply: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait, at most `LONGEST_WAIT`."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(reply.headers.get("retry-after", ""))))
    except ValueError:
        return None


def _content(reply: httpx2.Response) -> str | None:
    """The text of a chat completion, None where a reply is none."""
    try:
        found: Any = reply.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return found if isinstance(found, str) and found.strip() else None
