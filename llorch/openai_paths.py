"""The `/v1` paths that reach an engine, each with what is known of it. One table, for control and node.

Owns the allow-list: a path is served if it stands here, letter by letter, and what an engine is asked is the path that
stands here and never the one that came. Engines have other routes beside these, some of which no key guards: vLLM's
`/invocations` and `/pause`, llama.cpp's `/slots` and `/props`. Never decides what a body may hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from llorch.errors import Code, LlorchError

MAX_QUOTED_PATH_CHARS = 100


@dataclass(frozen=True, slots=True)
class Served:
    """`streams`: it may answer as a stream. `usage_on_request`: such a stream ends with usage only if that was asked
    for; the others report it unasked.
    """

    path: str
    streams: bool = False
    usage_on_request: bool = False


CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"
RERANK = "/v1/rerank"
RERANKING = "/v1/reranking"

SERVED = {
    served.path: served
    for served in (
        Served(CHAT, streams=True, usage_on_request=True),
        Served(COMPLETIONS, streams=True, usage_on_request=True),
        Served(RESPONSES, streams=True),
        Served(MESSAGES, streams=True),
        Served(COUNT_TOKENS),
        Served(EMBEDDINGS),
        Served(RERANK),
        Served(RERANKING),
    )
}


def served(path: str) -> Served:
    """What `path` is here. Raises NOT_FOUND."""
    found = SERVED.get(path)
    if found is None:
        shown = path[:MAX_QUOTED_PATH_CHARS]
        raise LlorchError(Code.NOT_FOUND, f"there is no {shown!r} here", hint="served: " + ", ".join(sorted(SERVED)))
    return found
