"""Which control a client command talks to, and with which token.

Owns the precedence flag > --context > environment > current context > files > default, and the rule that a token which
came with one URL is sent to no other, nor is its authority believed elsewhere. Never opens a connection.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llorch.auth import parse_tokens
from llorch.cli import contexts
from llorch.cli.sources import read_secret, resolve_here
from llorch.config import ClientSettings
from llorch.config_kinds import URL, BadValue, plain_http_abroad
from llorch.errors import ConfigError
from llorch.tokens import is_whole

_OWN_ENV = ("env LLORCH_URL", "env LLORCH_TOKEN", "env LLORCH_TLS_CA")  # LLORCH_API_TOKEN is a control's first of all


@dataclass(frozen=True, slots=True)
class Target:
    """`withheld`: there was a token that belongs to another URL, and it says which. `took_stdin`: the token came from
    standard input, so nothing else can. `url_from` is where the URL was given.
    """

    url: str
    token: str | None = field(repr=False)
    tls_ca: str | None
    pinned: bool
    timeout_s: float | None
    warnings: tuple[str, ...] = ()
    withheld: str | None = None
    took_stdin: bool = False
    url_from: str = ""


def find_target(flags: Mapping[str, Any], *, config: str | None, context: str | None) -> Target:
    """Raises ConfigError for settings or contexts that can't be used."""
    read: list[str] = []

    def reading(path: str) -> str:
        read.append(path)
        return read_secret(path)

    resolved = resolve_here(ClientSettings, flags, config=config, local=False, read_file=reading)
    settings, origin = resolved.settings, resolved.origin
    warnings = list(resolved.warnings)
    known = contexts.load(contexts.contexts_path(os.environ))
    name = context if context is not None else known.current
    chosen = known.get(name) if name is not None else None
    stronger = ("flag --",) if context is not None else ("flag --", *_OWN_ENV)
    url, token, tls_ca, withheld = settings.url, settings.token, settings.tls_ca, None
    pinned = False
    own_url = origin["url"].startswith(stronger)
    own_token = token is not None and origin["token"].startswith(stronger)
    if chosen is not None:
        if not own_url:
            url = _url_of(chosen, name)
        its_own = not own_url or url == chosen.url.rstrip("/")
        if its_own and not origin["tls-ca"].startswith(stronger):
            tls_ca, pinned = chosen.tls_ca or tls_ca, chosen.ca_pin is not None
        if not own_token:
            # What a file gave was meant for that file's URL. LLORCH_API_TOKEN is better than none.
            borrowed = token if context is None and origin["token"].startswith("env ") else None
            if its_own:
                token = _token_of(chosen, name) or borrowed
            elif chosen.token or chosen.token_file:
                withheld = f"the token of context {name} goes to {chosen.url} only"
        if token is not None and plain_http_abroad(url) and not own_url:
            warnings.append(f"context {name}: http:// sends the token unencrypted over the network; use https://")
    withheld = withheld if token is None else None
    if token is not None and not is_whole(token):
        warnings.append("the token is cut off or mistyped: copy all of it, to the 8 characters after its last _")
    url_from = origin["url"] if chosen is None or own_url else f"context {name}"
    return Target(
        url, token, tls_ca, pinned, settings.timeout, tuple(warnings), withheld, "-" in read, url_from
    )  # fmt: skip


def _url_of(context: contexts.Context, name: str | None) -> str:
    """Checked here as a setting is: the file of contexts may have been written by hand."""
    try:
        return URL.parse(context.url)
    except BadValue as bad:
        raise ConfigError(f"context {name}: {bad.message}", hint=bad.hint) from None


def _token_of(context: contexts.Context, name: str | None) -> str | None:
    if context.token_file is None:
        return context.token
    try:
        tokens = parse_tokens(read_secret(context.token_file), min_chars=1)
    except (OSError, ValueError):
        raise ConfigError(f"context {name}: its token file {context.token_file} can't be used") from None
    if not tokens:
        raise ConfigError(f"context {name}: its token file {context.token_file} holds no token")
    return tokens[0][1]
