"""Conversations: what a model is sent, and what a file is given."""

from __future__ import annotations

import json

import pytest

from llorch.cli.chat_conversation import Conversation, Form, Turn, form_of, transcript

TALK = (
    Conversation("Be brief.").with_turn(Turn("Hi\nthere", " Hello.\n", "m")).with_turn(Turn("Go on", "Onc", "n", True))
)


def test_every_turn_is_sent_whole_and_in_order_after_the_system_message() -> None:
    assert TALK.messages("And?") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": " Hello.\n"},
        {"role": "user", "content": "Go on"},
        {"role": "assistant", "content": "Onc"},
        {"role": "user", "content": "And?"},
    ]
    assert Conversation().messages("Hi") == [{"role": "user", "content": "Hi"}]
    assert Conversation().messages() == []


def test_a_changed_conversation_leaves_the_one_it_came_from_alone() -> None:
    before = TALK.messages()
    assert TALK.without_last().messages() == before[:3]
    assert TALK.cleared().messages() == before[:1]
    assert TALK.with_system(None).messages() == before[1:]
    assert TALK.messages() == before


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.md", Form.MARKDOWN),
        ("A.MD", Form.MARKDOWN),
        ("a.markdown", Form.MARKDOWN),
        ("a.b.json", Form.JSON),
        ("a.txt", Form.TEXT),
        ("md", Form.MARKDOWN),
        ("notes", Form.TEXT),
        ("x.md/notes", Form.TEXT),
    ],
)
def test_a_files_name_says_its_form(name: str, form: Form) -> None:
    assert form_of(name) is form


def test_json_is_the_messages_and_can_be_sent_again() -> None:
    text = transcript(TALK.with_turn(Turn("ü", "🙂", "m")), Form.JSON)
    assert json.loads(text) == [
        *TALK.messages(),
        {"role": "user", "content": "ü"},
        {"role": "assistant", "content": "🙂"},
    ]
    assert "🙂" in text


def test_markdown_and_text_say_who_spoke_and_what_was_stopped() -> None:
    assert transcript(TALK, Form.MARKDOWN) == (
        "## System\n\nBe brief.\n\n## You\n\nHi\nthere\n\n## m\n\n Hello.\n\n## You\n\nGo on\n\n## n (stopped)\n\nOnc\n"
    )
    assert transcript(TALK, Form.TEXT) == (
        "System:\nBe brief.\n\nYou:\nHi\nthere\n\nm:\n Hello.\n\nYou:\nGo on\n\nn (stopped):\nOnc\n"
    )
