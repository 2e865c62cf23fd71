"""The network: a llama, as llama.cpp computes it, small enough to be trained on two cores.

Differs from the usual PyTorch port in one thing: rotary embeddings turn neighbouring pairs (0, 1), (2, 3), ..., which
is how llama.cpp reads the architecture `llama`; so the weights need no permutation on their way into a GGUF.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """What the network is made of. Every row is a multiple of 32, the block of Q8_0."""

    vocabulary: int = 2048
    context: int = 2048
    width: int = 128
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 384
    rope_base: float = 10_000.0
    epsilon: float = 1e-5

    @property
    def head(self) -> int:
        return self.width // self.heads


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head
        self.attn_norm = nn.RMSNorm(shape.width, eps=shape.epsilon)
        self.attn_q = nn.Linear(shape.width, shape.width, bias=False)
        self.attn_k = nn.Linear(shape.width, kv, bias=False)
        self.attn_v = nn.Linear(shape.width, kv, bias=False)
        self.attn_output = nn.Linear(shape.width, shape.width, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.width, eps=shape.epsilon)
        self.ffn_gate = nn.Linear(shape.width, shape.ffn, bias=False)
        self.ffn_up = nn.Linear(shape.width, shape.ffn, bias=False)
        self.ffn_down = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, stream: Tensor, turn: Tensor) -> Tensor:
        stream = stream + self._attention(self.attn_norm(stream), turn)
        normed = self.ffn_norm(stream)
        return stream + self.ffn_down(F.silu(self.ffn_gate(normed)) * self.ffn_up(normed))

    def _attention(self, normed: Tensor, turn: Tensor) -> Tensor:
        batch, length, width = normed.shape
        queries = self._heads(self.attn_q(normed))
        keys, values = self._heads(self.attn_k(normed)), self._heads(self.attn_v(normed))
        mixed = F.scaled_dot_product_attention(
            turned(queries, turn), turned(keys, turn), values, is_causal=True, enable_gqa=True
        )
        return self.attn_output(mixed.transpose(1, 2).reshape(batch, length, width))

    def _heads(self, flat: Tensor) -> Tensor:
        batch, length, width = flat.shape
        return flat.view(batch, length, width // self.shape.head, self.shape.head).transpose(1, 2)


class Llama(nn.Module):
    """Input and output embeddings are one matrix: of so few weights, a seventh would go into the second."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocabulary, shape.width)
        self.blk = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.width, eps=shape.epsilon)
        self.register_buffer("turns", rotations(shape), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_stream = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * shape.layers) ** 0.5 if into_stream else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.token_embd(tokens)
        turn = self.turns[: tokens.shape[1]]
        for layer in self.blk:
            stream = layer(stream, turn)
        return F.linear(self.output_norm(stream), self.token_embd.weight)


def rotations(shape: Shape) -> Tensor:
    """By position and pair: cosine and sine of the angle that the pair is turned by."""
    rates = shape.rope_base ** (-torch.arange(0, shape.head, 2, dtype=torch.float32) / shape.head)
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), rates)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def turned(heads: Tensor, turn: Tensor) -> Tensor:
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
