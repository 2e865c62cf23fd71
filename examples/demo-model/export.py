"""From the trained network to a GGUF that llama.cpp loads: matrices as Q8_0, norms as F32."""

from __future__ import annotations

from pathlib import Path

import gguf
import sentencepiece
import tokens
from network import Llama

NAME = "llorch demo"
DESCRIPTION = "A very small story teller for trying llorch without a download."
MIN_P = 0.15
KINDS = (
    ("is_unknown", gguf.TokenType.UNKNOWN),
    ("is_control", gguf.TokenType.CONTROL),
    ("is_byte", gguf.TokenType.BYTE),
    ("is_unused", gguf.TokenType.UNUSED),
)


def write(path: Path, model: Llama, vocabulary: sentencepiece.SentencePieceProcessor) -> int:
    """Write the model, whole or not at all; its size in bytes. Raises OSError."""
    shape = model.shape
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "llama")
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)
    # What llama.cpp samples with where a request does not say: so small a model's unlikely words are mistakes.
    writer.add_float32(gguf.Keys.General.SAMPLING_MIN_P, MIN_P)
    _add_vocabulary(writer, vocabulary)
    for name, weight in model.named_parameters():
        values = weight.detach().float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)
    return path.stat().st_size


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: sentencepiece.SentencePieceProcessor) -> None:
    numbers = range(vocabulary.get_piece_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([vocabulary.id_to_piece(number) for number in numbers])
    writer.add_token_scores([vocabulary.get_score(number) for number in numbers])
    writer.add_token_types([_kind(vocabulary, number) for number in numbers])
    writer.add_unk_token_id(tokens.UNK)
    writer.add_bos_token_id(tokens.BOS)
    writer.add_eos_token_id(tokens.EOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(tokens.CHAT_TEMPLATE)


def _kind(vocabulary: sentencepiece.SentencePieceProcessor, number: int) -> gguf.TokenType:
    return next((kind for test, kind in KINDS if getattr(vocabulary, test)(number)), gguf.TokenType.NORMAL)
