"""What of a client's body may reach an engine: field by field refused, bounded, or let through.

Surface:
    check(body)                  a `/v1` body; raises INVALID_REQUEST that names the field
    without_refused(body)        the body less the refused fields that are null: some engines look only for the name
    check_media(where, value)    messages, native ones too: what an engine would have to fetch is refused

Engines take many fields beside OpenAI's. Those that change only the sender's own answer go through, and of numbers only
what makes sense: n_discard=-1 corrupted llama.cpp's memory (CVE-2026-21869), and its parser casts most others
unchecked. Those that reach slots, caches, adapters, addresses, code or an end of the stream that llorch rests on are
refused and not dropped, so that nobody believes they took effect. A name that stands nowhere here goes through: OpenAI
adds fields faster than engines learn them, and engines ignore what they don't know.

Sources: llama.cpp tools/server/README.md and server-task.cpp; vLLM entrypoints/openai/*/protocol.py; SGLang
entrypoints/openai/protocol.py. One look per field of a body that is already decoded, and nothing per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from llorch.errors import invalid

Check = Callable[[str, Any], None]

MAX_NAME_CHARS = 100  # of a field, in an error
MAX_TOKENS = 10_000_000  # as in a native body; -1 means no limit of the client's own
MAX_TOKEN_ID = 2**31 - 1  # engines keep ids in 32 bits
MAX_GRAMMAR_CHARS = 1_048_576  # as in a native body
MAX_BIASES = 4_096  # each is looked at for every token, on the loop that serves the other slots too
MAX_STOPS, MAX_STOP_CHARS = 256, 4_096
MAX_IDS = 65_536
MAX_PROBABILITIES = 100  # per token; OpenAI's own limit is 20. vLLM's -1 would be the whole vocabulary
MAX_TEMPLATE_ARGUMENTS, MAX_TEMPLATE_CHARS = 32, 256
MAX_SALT_CHARS = 1_024
MAX_SCHEME_CHARS = 64  # of a URL; base64 has no colon anywhere

# ---------------------------------------------------------------- refused

_SHARED = "it reaches the engine's slots, caches and ranks, which serve others too"
_MODEL = "it changes the model that others are served with too"
_RUNS = "the engine would run or load what is in it"
_FETCHES = "the engine would connect to where it says"
_INNER = "it is for the engine's own parts to tell each other"
_REPORTS = "llorch reads the engine's answer, and this changes its form"
_KEPT = "no conversation is kept here: send all of it each time"
_SLOTS = "each sequence takes a slot: send more requests"
_REGEX = "a regular expression can stall the engine for everybody: use json_schema or grammar"

_REFUSED_FOR: Mapping[str, tuple[str, ...]] = {
    _SHARED: (
        "id_slot", "slot_id", "n_keep", "n_discard", "n_cache_reuse", "session_params", "extra_key", "custom_labels",
    ),
    "the order of tasks is llorch's: send the header X-Llorch-Priority": ("priority",),
    "ids of tasks are llorch's: send the header X-Request-Id": ("request_id", "rid"),
    _MODEL: ("lora", "lora_id", "lora_path", "lora_request"),
    _RUNS: (
        "chat_template", "chat_parser", "custom_logit_processor", "custom_params", "logits_processors",
        "mm_processor_kwargs", "media_io_kwargs", "vllm_xargs", "prompt_embeds", "input_embeds",
    ),
    _FETCHES: ("mcp_servers",),
    _INNER: (
        "chat_format", "generation_prompt", "grammar_lazy", "grammar_triggers", "preserved_tokens",
        "thinking_forced_open", "parse_tool_calls", "reasoning_in_content", "reasoning_budget_start_tag",
        "reasoning_budget_end_tag", "reasoning_budget_message", "reasoning_budget_arm_immediately",
        "backend_sampling", "guided_decoding_backend", "return_hidden_states", "return_routed_experts",
        "routed_experts_start_len",
    ),
    _REPORTS: ("response_fields", "sse_ping_interval"),
    _KEPT: ("previous_response_id", "conversation"),
    _SLOTS: ("n_cmpl", "num_beams", "beam_width"),
    _REGEX: ("regex", "stop_regex", "guided_regex", "guided_whitespace_pattern"),
}  # fmt: skip
REFUSED: Mapping[str, str] = {name: why for why, names in _REFUSED_FOR.items() for name in names}
REFUSED_PREFIXES: Mapping[str, str] = {"speculative.": _SHARED, "bootstrap_": _FETCHES}
REFUSED_SUFFIXES: Mapping[str, str] = {"_dp_rank": _SHARED, "parallel_rank": _SHARED, "_transfer_params": _FETCHES}
_STARTS, _ENDS = tuple(REFUSED_PREFIXES), tuple(REFUSED_SUFFIXES)


def why_refused(name: str) -> str | None:
    """Why no client may set this field, or None."""
    why = REFUSED.get(name)
    if why is None and name.startswith(_STARTS):
        why = next(reason for start, reason in REFUSED_PREFIXES.items() if name.startswith(start))
    if why is None and name.endswith(_ENDS):
        why = next(reason for end, reason in REFUSED_SUFFIXES.items() if name.endswith(end))
    return why


def without_refused(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None or why_refused(name) is None}


# ---------------------------------------------------------------- bounded


def _refuse(name: str, problem: str, hint: str | None = None) -> NoReturn:
    raise invalid(f"`{name[:MAX_NAME_CHARS]}` {problem}", param=name[:MAX_NAME_CHARS], hint=hint)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> None:
        if isinstance(value, float) and value.is_integer():  # some clients write every number so
            value = int(value)
        if not _is_whole(value) or not low <= value <= high:
            _refuse(name, f"is not a whole number from {low} to {high}")

    return check


def _number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> None:
        if not (_is_whole(value) or isinstance(value, float)) or not low <= value <= high:
            _refuse(name, f"is not a number from {low:g} to {high:g}")

    return check


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        _refuse(name, "is true or false")


def _off(why: str) -> Check:
    """What may be said, but not be wanted."""

    def check(name: str, value: Any) -> None:
        if value is not False:
            _refuse(name, f"is not available: {why}")

    return check


def _text(most_chars: int) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or len(value) > most_chars:
            _refuse(name, f"is not a text of at most {most_chars} characters")

    return check


def _texts(most: int, most_chars: int) -> Check:
    """A text, or a list of them."""

    def check(name: str, value: Any) -> None:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or len(texts) > most:
            _refuse(name, f"is not a list of at most {most} texts")
        if not all(isinstance(text, str) and len(text) <= most_chars for text in texts):
            _refuse(name, f"has something that is not a text of at most {most_chars} characters")

    return check


def _token_ids(name: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) > MAX_IDS:
        _refuse(name, f"is not a list of at most {MAX_IDS} token ids")
    _check_ids(name, value)


def _check_ids(name: str, ids: list[Any]) -> None:
    """Of prompts with tens of thousands of them: no Python per id."""
    if ids and (set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) > MAX_TOKEN_ID):
        _refuse(name, "has something that is not a token id")


def _logprobs(name: str, value: Any) -> None:
    """Yes or no in a chat, how many in a completion."""
    if not isinstance(value, bool):
        _whole(0, MAX_PROBABILITIES)(name, value)


def _logit_bias(name: str, value: Any) -> None:
    """OpenAI's object, or llama.cpp's pairs."""
    if not isinstance(value, dict | list) or len(value) > MAX_BIASES:
        _refuse(name, f"is not an object of at most {MAX_BIASES} token ids and their biases")
    pairs = value.items() if isinstance(value, dict) else value
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            _refuse(name, "has something that is not a token id and its bias")
        token, bias = pair
        if _is_whole(token):
            _check_ids(name, [token])
        elif not isinstance(token, str) or len(token) > MAX_STOP_CHARS:
            _refuse(name, "has something that is not a token id")
        if bias is not False:
            _number(-1_000, 1_000)(name, bias)


# What vLLM and SGLang would take from here as arguments of their own, not of the template.
_TEMPLATE_CALL = frozenset(
    {
        "chat_template", "tokenize", "tokenizer", "conversation", "messages", "tools", "documents", "padding",
        "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs", "continue_final_message",
        "add_generation_prompt", "return_assistant_tokens_mask",
    }
)  # fmt: skip


def _template_arguments(name: str, value: Any) -> None:
    """`{"enable_thinking": false}` and the like: plain values under names that are the template's."""
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_ARGUMENTS:
        _refuse(name, f"is not an object of at most {MAX_TEMPLATE_ARGUMENTS} arguments")
    for argument, given in value.items():
        where = f"{name}.{argument}"
        if argument in _TEMPLATE_CALL or not argument.isidentifier() or argument.startswith("_"):
            _refuse(where, f"can't be set in a request: {_RUNS}")
        if given is not None and not isinstance(given, bool | int | float | str):
            _refuse(where, "is not true, false, a number or a text")
        if isinstance(given, str) and len(given) > MAX_TEMPLATE_CHARS:
            _refuse(where, f"is longer than {MAX_TEMPLATE_CHARS} characters")


_STRUCTURES = frozenset({"json", "json_object", "choice", "grammar"})


def _structured_outputs(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        _refuse(name, "is not an object")
    for kind, given in value.items():
        if kind not in _STRUCTURES and given not in (None, False):
            _refuse(f"{name}.{kind}", f"can't be set in a request: use one of {', '.join(sorted(_STRUCTURES))}")
    grammar = value.get("grammar")
    if grammar is not None:
        _text(MAX_GRAMMAR_CHARS)(f"{name}.grammar", grammar)


# ---------------------------------------------------------------- prompts

_URL_FIELDS = ("image_url", "video_url", "audio_url", "file_url")
_WORDS = frozenset({"role", "content", "type", "text", "name", "tool_call_id"})  # of a part: none names a medium
_MEDIA_FIELDS = ("image", "video", "audio")  # the medium itself in base64, for some engines a URL too
_DATA_HINT = "send it with the request, as data:image/png;base64,..."


def _prompt(name: str, value: Any) -> None:
    """A prompt or an input: text, parts, or token ids, which engines take as indices."""
    kinds = set(map(type, value)) if isinstance(value, list) else {type(value)}
    if isinstance(value, list) and kinds & {int, float, bool}:
        _check_ids(name, [part for part in value if not isinstance(part, str)] if str in kinds else value)
    if list in kinds:
        for part in value:
            if isinstance(part, list):
                _prompt(name, part)
    if dict in kinds:
        check_media(name, value)


def check_media(where: str, value: Any) -> None:
    """Raises if a message, or a part of one, names something that the engine would fetch: it would do so with the
    node's rights, from the node's network, whatever lies there. llama.cpp and vLLM fetch http(s) and file URLs.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return
    for number, item in enumerate(value):
        if isinstance(item, dict):
            if not item.keys() <= _WORDS:
                _check_part(item, f"{where}.{number}")
            for inner in ("content", "output"):  # of a message, and of what a tool answered
                if inner in item and not isinstance(item[inner], str):
                    check_media(f"{where}.{number}.{inner}", item[inner])


def _check_part(part: Mapping[str, Any], at: str) -> None:
    for field in _URL_FIELDS:
        if field in part:
            _check_url(part[field], f"{at}.{field}")
    for field in _MEDIA_FIELDS:
        given = part.get(field)
        if isinstance(given, str) and ":" in given[:MAX_SCHEME_CHARS]:
            _check_url(given, f"{at}.{field}")
    source = part.get("source")  # Anthropic's form
    if isinstance(source, dict) and "url" in source:
        _check_url(source["url"], f"{at}.source")
    for field, given in part.items():
        if field.endswith("_embeds") and given is not None:  # pickled tensors
            _refuse(f"{at}.{field}", f"can't be set in a request: {_RUNS}")


def _check_url(value: Any, at: str) -> None:
    url = value.get("url") if isinstance(value, dict) else value
    if url is not None and not (isinstance(url, str) and url[:5].lower() == "data:"):
        _refuse(at, "is not a data: URL, and engines fetch nothing for a client", _DATA_HINT)


def _tools(name: str, value: Any) -> None:
    """Tools are the client's to run, unless they are a server's that the engine would call."""
    for number, tool in enumerate(value if isinstance(value, list) else ()):
        if isinstance(tool, dict) and (tool.get("type") == "mcp" or "server_url" in tool):
            _refuse(f"{name}.{number}", f"can't be set in a request: {_FETCHES}")


# ---------------------------------------------------------------- the table

_UNIT = _number(0, 1)
_FACTOR = _number(0, 1_000)
_LIMIT = _whole(-1, MAX_TOKENS)
_HOW_MANY = _whole(0, MAX_PROBABILITIES)

BOUNDED: Mapping[str, Check] = {
    # how much
    "max_tokens": _LIMIT, "max_completion_tokens": _LIMIT, "max_output_tokens": _LIMIT, "n_predict": _LIMIT,
    "min_tokens": _whole(0, MAX_TOKENS), "truncate_prompt_tokens": _LIMIT, "thinking_token_budget": _LIMIT,
    "reasoning_budget_tokens": _LIMIT, "thinking_budget_tokens": _LIMIT, "n_indent": _whole(0, 1_024),
    "t_max_predict_ms": _whole(-1, 86_400_000), "t_max_prompt_ms": _whole(-1, 86_400_000),
    "dimensions": _whole(1, 1_048_576), "embd_normalize": _whole(-1, 1_024), "top_n": _whole(0, 1_000_000),
    # sampling
    "temperature": _number(0, 100), "dynatemp_range": _number(0, 100), "dynatemp_exponent": _number(0, 100),
    "top_p": _UNIT, "min_p": _UNIT, "typical_p": _UNIT, "xtc_probability": _UNIT, "xtc_threshold": _UNIT,
    "top_k": _whole(-1, 1_000_000), "top_n_sigma": _number(-1, 1_000), "min_keep": _whole(0, 1_000_000),
    "adaptive_target": _number(-1, 1), "adaptive_decay": _UNIT, "seed": _whole(-(2**63), 2**64 - 1),
    "mirostat": _whole(0, 2), "mirostat_tau": _FACTOR, "mirostat_eta": _FACTOR,
    "presence_penalty": _number(-100, 100), "frequency_penalty": _number(-100, 100),
    "repeat_penalty": _number(0, 100), "repetition_penalty": _number(0, 100), "length_penalty": _number(-100, 100),
    "repeat_last_n": _LIMIT, "dry_penalty_last_n": _LIMIT, "dry_multiplier": _FACTOR, "dry_base": _FACTOR,
    "dry_allowed_length": _whole(0, MAX_TOKENS), "dry_sequence_breakers": _texts(64, 256),
    "samplers": _texts(32, 64), "ignore_eos": _flag, "logit_bias": _logit_bias,
    # what is told of it
    "n_probs": _HOW_MANY, "top_logprobs": _HOW_MANY, "prompt_logprobs": _HOW_MANY, "logprobs": _logprobs,
    "post_sampling_probs": _flag, "return_tokens": _flag, "timings_per_token": _flag, "return_progress": _flag,
    "cache_prompt": _flag, "cache_salt": _text(MAX_SALT_CHARS),
    # what it may be
    "grammar": _text(MAX_GRAMMAR_CHARS), "guided_grammar": _text(MAX_GRAMMAR_CHARS), "ebnf": _text(MAX_GRAMMAR_CHARS),
    "structured_outputs": _structured_outputs, "chat_template_kwargs": _template_arguments,
    "stop": _texts(MAX_STOPS, MAX_STOP_CHARS), "stop_sequences": _texts(MAX_STOPS, MAX_STOP_CHARS),
    "bad_words": _texts(1_024, 256), "stop_token_ids": _token_ids, "allowed_token_ids": _token_ids,
    "use_beam_search": _off(_SLOTS), "background": _off(_KEPT),
    # what it is asked
    "messages": check_media, "system": check_media, "prompt": _prompt, "input": _prompt,
    "documents": check_media, "query": check_media, "tools": _tools,
}  # fmt: skip


def check(body: Mapping[str, Any]) -> None:
    """Raises LlorchError INVALID_REQUEST for the first field that no engine may be given. Null means: not set."""
    for name, value in body.items():
        if value is None:
            continue
        bound = BOUNDED.get(name)
        if bound is not None:
            bound(name, value)
        elif (why := why_refused(name)) is not None:
            _refuse(name, f"can't be set in a request: {why}")
