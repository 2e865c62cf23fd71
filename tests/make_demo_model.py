"""Makes `llorch/demo/demo.gguf`: a llama with a real vocabulary, a chat template and random weights.

    python tests/make_demo_model.py [FILE]

Owns every number in that file; the same versions of this script and of `gguf` give the same bytes. It exists so that the
whole path through llama.cpp works at once and offline. Nothing was trained: what it says is words, not sense.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np

OUTPUT = Path(__file__).parent.parent / "llorch" / "demo" / "demo.gguf"

SEED = 20260
WIDTH = 64
HEADS = 4
LAYERS = 2
FFN_WIDTH = 128
CTX_TRAIN = 2048
ROPE_BASE = 10_000.0
NORM_EPS = 1e-5

# Dimension 0 of every embedding is this, and no layer adds to it: what the norm leaves of it is a bias for the output.
STEADY = 4.0
NEVER = -40.0  # logit, about: bytes, control tokens and pieces that are not words; above them a word is always found
RARE = -6.0  # single letters and punctuation

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")

# The most common first: the order is the probability.
WORDS = """
the of and to in a is that it was for on are as with his they at be this have from or had by hot but some what there we
can out other were all your when up use word how said an each she which do their time if will way about many then them
would write like so these her long make thing see him two has look more day could go come did my sound no most number
who over know water than call first people may down side been now find any new work part take get place made live where
after back little only round man year came show every good me give our under name very through just form much great
think say help low line before turn cause same mean differ move right boy old too does tell sentence set three want air
well also play small end put home read hand port large spell add even land here must big high such follow act why ask
men change went light kind off need house picture try us again animal point mother world near build self earth father
head stand own page should country found answer school grow study still learn plant cover food sun four thought let
keep eye never last door between city tree cross since hard start might story saw far sea draw left late run while
press close night real life few stop open seem together next white children begin got walk example ease paper often
always music those both mark book letter until mile river car feet care second group carry took rain eat room friend
began idea fish mountain north once base hear horse cut sure watch color face wood main enough plain girl usual young
ready above ever red list though feel talk bird soon body dog family direct pose leave song measure state product black
short class wind question happen complete ship area half rock order fire south problem piece told knew pass farm top
whole king size heard best hour better true during hundred remember step early hold west ground interest reach fast
user assistant system hello please model token answer machine computer
""".split()


def pieces() -> list[tuple[str, float, float]]:
    """(text, score, logit) of the normal tokens.

    A sentence piece tokenizer joins neighbours whose union is a piece, the highest score first; so every prefix of a
    word is one, and words grow from their left.
    """
    words = {f"▁{word}": rank for rank, word in enumerate(dict.fromkeys(WORDS))}
    prefixes = {word[:length] for word in words for length in range(2, len(word) + 1)}
    found = [
        (text, float(len(text)), -0.6 * float(np.log2(words[text] + 8)) if text in words else NEVER)
        for text in sorted(prefixes)
    ]
    printable = [chr(code) for code in range(0x21, 0x7F)]
    return [*found, ("▁", 0.0, NEVER), *((char, 0.0, RARE if char in ".,;?!" else NEVER) for char in printable)]


def vocabulary() -> tuple[list[str], list[float], list[int], list[float]]:
    """Texts, scores, token types and output logits, by token id."""
    texts = ["<unk>", *CONTROL]
    types = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * len(CONTROL)
    texts += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [gguf.TokenType.BYTE] * 256
    scores, logits = [0.0] * len(texts), [NEVER] * len(texts)
    for text, score, logit in pieces():
        texts.append(text)
        scores.append(score)
        types.append(gguf.TokenType.NORMAL)
        logits.append(logit)
    return texts, scores, [int(kind) for kind in types], logits


class Weights:
    """Random matrices from a stream that numpy has frozen for good, unlike that of its newer generators."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed)

    def __call__(self, rows: int, columns: int, scale: float) -> np.ndarray:
        return (self._state.random_sample((rows, columns)) * 2.0 - 1.0) * scale


def write(path: Path) -> None:
    texts, scores, types, logits = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("llorch demo")
    writer.add_description("Random weights: its words mean nothing.")
    writer.add_license("Apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(CTX_TRAIN)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN_WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_vocab_size(len(texts))

    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(texts.index("<s>"))
    writer.add_eos_token_id(texts.index("</s>"))
    writer.add_eot_token_id(texts.index("<|im_end|>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(CHAT_TEMPLATE)

    random = Weights(SEED)
    ones = np.ones(WIDTH, dtype=np.float32)

    def add(name: str, matrix: np.ndarray) -> None:
        writer.add_tensor(name, matrix.astype(np.float16))

    embedding = random(len(texts), WIDTH, 1.7)
    embedding[:, 0] = STEADY
    add("token_embd.weight", embedding)
    for layer in range(LAYERS):
        name = f"blk.{layer}."
        writer.add_tensor(name + "attn_norm.weight", ones)
        for part in ("attn_q", "attn_k", "attn_v"):
            add(f"{name}{part}.weight", random(WIDTH, WIDTH, 0.3))
        writer.add_tensor(name + "ffn_norm.weight", ones)
        for part in ("ffn_gate", "ffn_up"):
            add(f"{name}{part}.weight", random(FFN_WIDTH, WIDTH, 0.3))
        for part, inputs in (("attn_output", WIDTH), ("ffn_down", FFN_WIDTH)):
            matrix = random(WIDTH, inputs, 0.3)
            matrix[0] = 0.0
            add(f"{name}{part}.weight", matrix)
    writer.add_tensor("output_norm.weight", ones)
    output = random(len(texts), WIDTH, 0.35)
    output[:, 0] = np.array(logits) / 2.0
    add("output.weight", output)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
