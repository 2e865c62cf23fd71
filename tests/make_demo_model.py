"""Makes llorch/demo/demo.gguf: a tiny llama with random weights and a real tokenizer. The same bytes every time.

    python -m tests.make_demo_model [FILE]

Every number comes from SHAKE-256, not from a generator whose stream may change between versions. One dimension of the
residual stream is constant, which turns the matching column of the output matrix into a bias per token: it keeps EOS,
bytes and parts of words from being sampled: an answer is whole words, up to its limit.
"""

from __future__ import annotations

import hashlib
import string
import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from llorch import demo

ARCHITECTURE = "llama"
CTX_TRAIN = 2048
WIDTH, LAYERS, HEADS, FFN = 64, 2, 4, 128
SEED = b"llorch demo model 1"

UNK, BOS, EOS = 0, 1, 2
CONSTANT = 6.0  # the residual stream's dimension 0, against about 1 in the others
# Added to a token's logit, the random part of which stays within some 10. Parts of words are for reading, not for
# saying; a byte that is no UTF-8 by itself would be held back from a stream.
NEVER, MARK, WORD = -60.0, -5.0, 0.0

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# Common words of English.
WORDS = """
the of and to a in is it you that he was for on are with as his they be at one have this from or had by hot but some
what there we can out other were all your when up use word how said an each she which do their time if will way about
many then them would write like so these her long make thing see him two has look more day could go come did my sound
no most number who over know water than call first people may down side been now find any new work part take get place
made live where after back little only round man year came show every good me give our under name very through just
form much great think say help low line before turn cause same mean differ move right boy old too does tell sentence
set three want air well also play small end put home read hand port large spell add even land here must big high such
follow act why ask men change went light kind off need house picture try us again animal point mother world near build
self earth father head stand own page should country found answer school grow study still learn plant cover food sun
four thought let keep eye never last door between city tree cross since hard start might story saw far sea draw left
late run while press close night real life few stop open seem together next white children begin got walk example ease
paper often always music those both mark book letter until mile river car feet care second group carry took rain eat
room friend began idea fish mountain north once base hear horse cut sure watch color face wood main enough plain girl
usual young ready above ever red list though feel talk bird soon body dog family direct leave song measure state
product black short class wind question happen complete ship area half rock order fire south problem piece told knew
pass farm top whole king size heard best hour better true during hundred remember step early hold west ground interest
reach fast five sing listen six table travel less morning ten simple several toward war lay against pattern slow
center love person money serve appear road map science rule govern pull cold notice voice fall power town fine certain
fly unit lead cry dark machine note wait plan figure star box noun field rest correct able pound done beauty drive
stood contain front teach week final gave green quick develop sleep warm free minute strong special mind behind clear
tail produce fact street inch lot nothing course stay wheel full force blue object decide surface deep moon island
foot yet busy test record boat common gold possible plane age dry wonder laugh thousand ago ran check game shape yes
cool miss brought heat snow bed bring sit perhaps fill east weight language among
"""
MARKS = ".,;?!"


def pieces() -> list[tuple[str, float, gguf.TokenType]]:
    """Every token: its text, the bias with which it is sampled, its type.

    SentencePiece's merges need every prefix of a word as a token of its own, or the word is never reached from text.
    """
    tokens = [("<unk>", NEVER, gguf.TokenType.UNKNOWN)]
    tokens += [(text, NEVER, gguf.TokenType.CONTROL) for text in ("<s>", "</s>")]
    tokens += [(f"<0x{byte:02X}>", NEVER, gguf.TokenType.BYTE) for byte in range(256)]
    words = [f"▁{word}" for word in WORDS.split()]
    parts = {word[:length]: NEVER for word in words for length in range(1, len(word) + 1)}
    parts |= dict.fromkeys(string.ascii_letters + string.digits + string.punctuation, NEVER)
    parts |= dict.fromkeys(MARKS, MARK)
    parts |= dict.fromkeys(words, WORD)
    return [*tokens, *((text, bias, gguf.TokenType.NORMAL) for text, bias in parts.items())]


def noise(name: str, *shape: int, scale: float) -> npt.NDArray[np.float32]:
    """Numbers between -scale and scale that depend on the name alone."""
    count = int(np.prod(shape))
    raw = np.frombuffer(hashlib.shake_256(SEED + name.encode()).digest(2 * count), dtype="<u2")
    return ((raw.astype(np.float32) / np.float32(32768) - np.float32(1)) * np.float32(scale)).reshape(shape)


def weights(biases: list[float]) -> dict[str, npt.NDArray[np.generic]]:
    """Every tensor by its name; rows are outputs. Matrices are F16, norms F32, as llama.cpp wants them."""
    embedding = noise("token_embd", len(biases), WIDTH, scale=1.7)
    embedding[:, 0] = CONSTANT
    output = noise("output", len(biases), WIDTH, scale=0.42)
    # What dimension 0 is after the last norm: about CONSTANT / rms(stream), and the stream's rms is about 1.3.
    output[:, 0] = np.array(biases, dtype=np.float32) / np.float32(4)
    found: dict[str, npt.NDArray[np.generic]] = {
        "token_embd.weight": embedding.astype(np.float16),
        "output.weight": output.astype(np.float16),
        "output_norm.weight": np.ones(WIDTH, dtype=np.float32),
    }
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            found[f"{at}{norm}.weight"] = np.ones(WIDTH, dtype=np.float32)
        shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        shapes |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
        for name, shape in shapes.items():
            matrix = noise(at + name, *shape, scale=0.3)
            if name in ("attn_output", "ffn_down"):
                matrix[0, :] = 0  # nothing may change the constant dimension
            found[f"{at}{name}.weight"] = matrix.astype(np.float16)
    return found


def write(path: Path) -> None:
    """Write the model. Raises OSError."""
    tokens = pieces()
    writer = gguf.GGUFWriter(str(path), ARCHITECTURE)
    writer.add_name("llorch demo (random weights)")
    writer.add_license("apache-2.0")
    writer.add_description("Random weights: its output is noise. For trying llorch without a download.")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(CTX_TRAIN)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    # A prefix that a text does not have puts llama.cpp out of step with the grammar of a json_schema.
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in weights([bias for _, bias, _ in tokens]).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(demo.model_path())
    write(target)
    print(target, target.stat().st_size, hashlib.sha256(target.read_bytes()).hexdigest())
