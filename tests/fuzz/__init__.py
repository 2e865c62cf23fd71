"""Inputs that nobody would write, by the hundred thousand: for every parser (`run.py`) and every route (`requests.py`).

`pytest` runs a slice of both and every kept input, `pytest -m slow` a larger slice against real processes. The
generators are our own: hypothesis makes about a thirtieth of the inputs in the same time, and is at its best where a
test states a property of small values; schemathesis brings 24 packages and a pytest plugin that loads itself, and sends
what an HTTP library lets it send, so no broken framing, header or credential.
"""
