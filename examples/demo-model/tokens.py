"""The vocabulary: SentencePiece BPE with byte fallback, and the tokens that a conversation is made of."""

from __future__ import annotations

import hashlib
import io
import string

import sentencepiece
from corpus import GIVEN, PLAIN, SEED, Document, document

SIZE = 2048
DOCUMENTS = 6_000  # read for the vocabulary
UNK, BOS, EOS = 0, 1, 2
ROLES = {"system": 3, "user": 4, "assistant": 5}
# What a chat client sends becomes exactly what the model has read; the BOS is added by whoever tokenizes.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def trained() -> sentencepiece.SentencePieceProcessor:
    """The vocabulary: always the same one."""
    read = (text for number in range(DOCUMENTS) for _, text in document(f"{SEED}/words", number))
    texts = (text for text in read if text.isascii())  # the rest is what nobody can read, and has its bytes
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=SIZE,
        control_symbols=[f"<|{role}|>" for role in ROLES],
        byte_fallback=True,
        split_digits=True,
        # Nothing is changed on the way in, nothing is put before it: tokens stand for exactly what was given.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        required_chars="".join(sorted(set(string.printable) - set(string.whitespace))),
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def digest(vocabulary: sentencepiece.SentencePieceProcessor) -> str:
    pieces = [vocabulary.id_to_piece(number) for number in range(vocabulary.get_piece_size())]
    return hashlib.sha256(repr(pieces).encode()).hexdigest()[:16]


def encoded(document: Document, vocabulary: sentencepiece.SentencePieceProcessor) -> tuple[list[int], list[bool]]:
    """The document's tokens, and which of them the model is to learn to say: not what others say to it."""
    tokens, learnt = [BOS], [False]
    for role, text in document:
        if role in ROLES:
            tokens.append(ROLES[role])
            learnt.append(False)
        said = vocabulary.encode(text) + ([] if role == GIVEN else [EOS])
        tokens += said
        learnt += [role in (PLAIN, "assistant")] * len(said)
    return tokens, learnt
