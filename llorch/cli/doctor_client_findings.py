"""What is found wrong from a client's machine, once the control answers: its token, and what it may ask for."""

from __future__ import annotations

from dataclasses import dataclass, field

from llorch.cli.doctor_findings import Finding, fail, ok, warn
from llorch.cli.doctor_reach_findings import Answer, shown
from llorch.tokens import is_whole

_NEW = "`llorch token new` on the control's machine makes one"
_GIVE = "give it with `llorch context add NAME --url URL --token -`, or in LLORCH_TOKEN"
_HIDDEN_MODELS = 5


@dataclass(frozen=True, slots=True)
class Aim:
    """Which control a command talks to. `source`: what the URL comes from; `withheld`: a token that goes elsewhere."""

    url: str
    source: str
    token: str | None = field(default=None, repr=False)
    withheld: str | None = None
    warnings: tuple[str, ...] = ()


def aim(facts: Aim) -> list[Finding]:
    mend = "`llorch config show` and `llorch context show` say where each value comes from"
    source = "by default: nothing names another" if facts.source == "default" else f"from {shown(facts.source)}"
    return [
        ok("settings", f"{facts.url}, {source}"),
        *(warn("settings", text, mend) for text in facts.warnings),
    ]


def unsent(facts: Aim, *, open_network: bool) -> Finding | None:
    """Why a token is not even tried; None if it is to be. `open_network`: it would cross one unencrypted."""
    token = facts.token
    if token is None:
        if facts.withheld is not None:
            return fail("token", f"none is sent: {shown(facts.withheld)}", f"{_GIVE}, or --context NAME")
        return fail("token", "there is none", f"{_NEW}; {_GIVE}")
    if token.startswith("llj1_"):
        return fail("token", "it is a join token, which is for a machine that becomes a node", f"{_NEW} for clients")
    if not is_whole(token):
        return fail("token", "it is cut off or mistyped: it was not sent", f"copy all of it; or {_NEW}, and {_GIVE}")
    if open_network:
        return warn(
            "token",
            "it would cross the network unencrypted: it was not sent to be tried",
            "give https:// in --url, and serve with TLS: `llorch control --bind 0.0.0.0:8080` does by itself",
        )
    return None


@dataclass(frozen=True, slots=True)
class Granted:
    """What a token was answered: to a question of each scope, and for a task that nobody has."""

    read: Answer
    submit: Answer
    stranger: Answer


def token(facts: Granted) -> list[Finding]:
    answers = (("read", facts.read), ("submit", facts.submit))
    silent = next((answer for _, answer in answers if answer.status is None), None)
    if silent is not None:
        return [fail("token", f"a request with it has no answer: {silent.why}", "run `llorch doctor` again")]
    refused = next((answer for _, answer in answers if answer.status == 401), None)
    if refused is not None:
        said = f" ({refused.message})" if refused.message else ""
        return [
            fail(
                "token",
                f"the control does not accept it{said}: it is wrong, expired or revoked",
                f"`llorch token ls --all` there says which are in force; {_NEW}; {_GIVE}",
            )
        ]
    scopes = [scope for scope, answer in answers if answer.status == 200]
    denied = [scope for scope, answer in answers if answer.status == 403]
    strange = [f"{scope}: status {answer.status} {answer.code}".rstrip() for scope, answer in answers
               if answer.status not in (200, 403)]  # fmt: skip
    found = []
    if strange:
        mend = "look for it in the control's log; `llorch doctor control` on its machine tells more"
        found.append(warn("token", f"unexpected answers: {', '.join(strange)}", mend))
    elif not scopes:
        found.append(fail("token", "it is good for neither submit nor read", f"{_NEW} with --scope submit,read"))
    elif denied:
        found.append(
            warn(
                "token",
                f"good for {scopes[0]}, not for {denied[0]}",
                f"`llorch token new --scope submit,read` on the control's machine, and {_GIVE}",
            )
        )
    else:
        found.append(ok("token", "good for submit and read"))
    return found + _recovering(facts.stranger)


def _recovering(stranger: Answer) -> list[Finding]:
    """A control that has just started says so of a task that it does not know."""
    if stranger.code != "RECOVERING":
        return []
    return [
        warn(
            "recovery",
            "the control has just started, and waits for nodes that it knew",
            "wait for --recovery-window (15 s); `llorch node ls` shows which are back",
        )
    ]


def models(answer: Answer) -> Finding | None:
    """None where the token may not ask."""
    if answer.status != 200:
        return None
    listed = answer.object.get("data")
    names = [shown(one.get("id")) for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    if not names:
        return warn(
            "models",
            "no node serves one",
            "`llorch status` shows nodes and pools; `llorch token join` on the control's machine prints what makes a "
            "machine a node",
        )
    more = f" and {len(names) - _HIDDEN_MODELS} more" if len(names) > _HIDDEN_MODELS else ""
    return ok("models", f"{', '.join(names[:_HIDDEN_MODELS])}{more}")
