"""Tiny random Llama models: their files, their forward pass in f32, and scores of tokens in f64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 96
BEGIN = 1
"""Id of the one special token that prompts have."""
PUNCTUATION = range(4, 10)
"""Ids of tokens that are only punctuation."""
INTERMEDIATE = 56
EPSILON = 1e-5
THETA = 10_000.0


@dataclass(frozen=True)
class Shape:
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int = 16
    hidden: int = 64

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True)
class Layer:
    """What a layer makes of the tokens that reach it."""

    shape: Shape
    index: int
    ids: Tensor
    """Ids of the tokens [n]."""
    positions: Tensor
    """Their positions in the prompt [n]."""
    queries: Tensor
    """After RoPE [query heads, n, head dim]."""
    keys: Tensor
    """After RoPE [kv heads, n, head dim]."""

    @property
    def wide_keys(self) -> Tensor:
        """The keys of each query head."""
        return self.keys.repeat_interleave(self.shape.group, dim=0)

    def probabilities(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Causal attention [query heads, n, n]."""
        count = len(self.positions)
        logits = self.queries.to(dtype) @ self.wide_keys.to(dtype).transpose(1, 2) / self.shape.head_dim**0.5
        hidden = torch.ones(count, count, dtype=torch.bool).triu(1)
        return logits.masked_fill(hidden, -torch.inf).softmax(-1)

    def by_kv_head(self, scores: Tensor) -> Tensor:
        """Sums scores of query heads over each kv head's group."""
        return scores.view(self.shape.kv_heads, self.shape.group, -1).sum(1)


class Model:
    """A random model with attention that is far from uniform."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)

        def random(scale: float, *size: int) -> Tensor:
            return scale * torch.randn(*size, generator=generator)

        hidden, queries, keys = shape.hidden, shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.weights = {"model.embed_tokens.weight": random(1.0, VOCABULARY, hidden)}
        for layer in range(shape.layers):
            name = f"model.layers.{layer}."
            self.weights |= {
                name + "input_layernorm.weight": 1 + random(0.2, hidden),
                name + "self_attn.q_proj.weight": random(0.25, queries, hidden),
                name + "self_attn.k_proj.weight": random(0.25, keys, hidden),
                name + "self_attn.v_proj.weight": random(0.15, keys, hidden),
                name + "self_attn.o_proj.weight": random(0.15, hidden, queries),
                name + "post_attention_layernorm.weight": 1 + random(0.2, hidden),
                name + "mlp.gate_proj.weight": random(0.15, INTERMEDIATE, hidden),
                name + "mlp.up_proj.weight": random(0.15, INTERMEDIATE, hidden),
                name + "mlp.down_proj.weight": random(0.15, hidden, INTERMEDIATE),
            }
        self.weights["model.norm.weight"] = 1 + random(0.2, hidden)
        self.weights["lm_head.weight"] = random(0.15, VOCABULARY, hidden)

    def save(self, directory: Path) -> None:
        directory.mkdir()
        shape = self.shape
        config = dict(
            architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCABULARY, hidden_size=shape.hidden,
            intermediate_size=INTERMEDIATE, num_hidden_layers=shape.layers, num_attention_heads=shape.query_heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, rms_norm_eps=EPSILON, rope_theta=THETA,
            max_position_embeddings=4096, bos_token_id=BEGIN, eos_token_id=2, torch_dtype="float32", hidden_act="silu",
        )
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer()))
        save_file(self.weights, directory / "model.safetensors", {"format": "pt"})

    def embed(self, ids: Tensor) -> Tensor:
        return self.weights["model.embed_tokens.weight"][ids]

    def layer(self, index: int, hidden: Tensor, ids: Tensor, positions: Tensor) -> Layer:
        normed = self.norm(hidden, f"model.layers.{index}.input_layernorm")
        queries = self.heads(index, "q_proj", normed, self.shape.query_heads)
        keys = self.heads(index, "k_proj", normed, self.shape.kv_heads)
        return Layer(self.shape, index, ids, positions, rotate(queries, positions), rotate(keys, positions))

    def finish(self, layer: Layer, hidden: Tensor) -> Tensor:
        """The residual stream behind a layer."""
        name = f"model.layers.{layer.index}."
        normed = self.norm(hidden, name + "input_layernorm")
        values = self.heads(layer.index, "v_proj", normed, self.shape.kv_heads)
        values = values.repeat_interleave(self.shape.group, dim=0)
        attended = (layer.probabilities(torch.float32) @ values).transpose(0, 1).flatten(1)
        hidden = hidden + attended @ self.weights[name + "self_attn.o_proj.weight"].T
        normed = self.norm(hidden, name + "post_attention_layernorm")
        gate = F.silu(normed @ self.weights[name + "mlp.gate_proj.weight"].T)
        up = normed @ self.weights[name + "mlp.up_proj.weight"].T
        return hidden + (gate * up) @ self.weights[name + "mlp.down_proj.weight"].T

    def logits(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden, "model.norm") @ self.weights["lm_head.weight"].T

    def heads(self, index: int, projection: str, normed: Tensor, heads: int) -> Tensor:
        projected = normed @ self.weights[f"model.layers.{index}.self_attn.{projection}.weight"].T
        return projected.view(len(normed), heads, self.shape.head_dim).transpose(0, 1)

    def norm(self, rows: Tensor, name: str) -> Tensor:
        return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPSILON) * self.weights[name + ".weight"]


def rotate(heads: Tensor, positions: Tensor) -> Tensor:
    """RoPE, the halves of a head as pairs."""
    half = heads.shape[-1] // 2
    angles = positions[:, None].double() * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    cosines, sines = angles.cos().float(), angles.sin().float()
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)


def tokenizer() -> dict[str, object]:
    """A word a token."""
    words = ["<unk>", "<s>", "</s>", "w3", *".,;:!?"]
    words += [f"w{number}" for number in range(len(words), VOCABULARY)]
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    special = [dict(id=number, content=words[number], special=True, **plain) for number in range(3)]
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=special, normalizer=None,
        pre_tokenizer=dict(type="WhitespaceSplit"), post_processor=None, decoder=None,
        model=dict(type="WordLevel", vocab={word: number for number, word in enumerate(words)}, unk_token="<unk>"),
    )


def window_scores(layer: Layer, window: int, pooling: str, kernel: int) -> Tensor:
    """What the last queries say of the tokens before them, pooled for each query head and summed over the
    group [kv heads, n]; infinite in the window."""
    sums = layer.probabilities()[:, -window:, :-window].sum(1)
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    pooled = layer.by_kv_head(pool(sums, kernel, stride=1, padding=kernel // 2))
    return F.pad(pooled, (0, window), value=torch.inf)


def column_sums(layer: Layer, window: int) -> Tensor:
    """All attention that a token gets [kv heads, n]; infinite in the window."""
    sums = layer.by_kv_head(layer.probabilities().sum(1))
    sums[:, len(layer.positions) - window :] = torch.inf
    return sums
