"""The Hub's refusals and the network's, as this project's errors: what happened, and what to type."""

from __future__ import annotations

from typing import Any

from ..errors import MachineError, UserError

_AGAIN = "What was uploaded stays there: type the same command again to go on"


def explain(error: BaseException, repo: str) -> UserError | MachineError | None:
    """An error for the user, None where it is none of the Hub's or the network's.

    Args:
        error: as huggingface_hub raised it, possibly around the one that tells.
        repo: that is written to.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if type(link).__name__ == "OfflineModeIsEnabled":
            return offline(repo)
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return _of_status(status, link, repo)
        if type(link).__name__ in ("LocalTokenNotFoundError",):
            return _of_status(401, link, repo)
        if type(link).__name__ in ("HFValidationError",):
            return UserError(f"{repo}: not a name for a repository. Give OWNER/NAME: --repo me/my-model")
    for link in chain:
        if _of_network(link):
            return MachineError(f"{repo}: the Hub cannot be reached ({_first_line(link)}). {_AGAIN}")
    return None


def offline(repo: str) -> MachineError:
    """What to say where the offline mode is set."""
    return MachineError(
        f"{repo}: HF_HUB_OFFLINE is set, so nothing goes to the Hub. Where there is a network, type the same command "
        "with HF_HUB_OFFLINE=0 before it"
    )


def _of_status(status: int, error: Any, repo: str) -> UserError | MachineError:
    said = _first_line(error)
    owner = repo.partition("/")[0]
    if status == 401:
        return UserError(f"{repo}: the Hub does not know you ({said}). Log in: hf auth login, or set HF_TOKEN")
    if status == 403:
        return UserError(
            f"{repo}: your token may not write to {owner} ({said}). Take one with write access there "
            "(hf auth login), or another owner: --repo OWNER/NAME"
        )
    if status == 404:
        return UserError(
            f"{repo}: not found on the Hub, or hidden from you ({said}). Check --repo, --revision and your token"
        )
    if status in (409, 412):
        return UserError(f"{repo}: it changed meanwhile or exists already ({said}). Look at it, then push again")
    if status == 429 or status >= 500:
        return MachineError(f"{repo}: the Hub is busy or broken (status {status}: {said}). {_AGAIN}")
    return UserError(f"{repo}: the Hub refuses (status {status}: {said}). Mend what it names, then push again")


def _of_network(error: BaseException) -> bool:
    """Connections that fail, of either HTTP client, or the socket's own."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"TransportError", "NetworkError", "ConnectionError", "RequestException"})


def _first_line(error: BaseException) -> str:
    server = getattr(error, "server_message", None)
    lines = [line for line in str(server or error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].strip()[:200]
