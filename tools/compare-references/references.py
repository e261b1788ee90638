"""How each public implementation is asked what it keeps.

Selections are read off the values: every value that goes in is the number of its row.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from model import BEGIN, PUNCTUATION, Layer, Model, Shape, column_sums

# The settings of both sides.
TOKENS = 160
WINDOW = 8
BUDGET = 40
"""Of a kv head, the window included."""
KERNEL = 7
TSP_RATE = 0.5
TSP_LAYER = 1
FILTER_LAYER = 2
SHARE = 0.3
"""FastGen's shares of frequent and of local tokens."""
STEERED = {1: [0, 3], 2: [2]}
"""Heads by layer."""


@dataclass(frozen=True)
class Choice:
    """Rows of a layer that a reference chose."""

    kept: list[list[int]]
    """By kv head."""
    go_on: list[int] | None = None
    """For the next layer; None: all."""


Select = Callable[[Layer], Choice | None]
Begin = Callable[[Any, Model, Tensor, Path], Select]


def marked(layer: Layer, heads: int) -> Tensor:
    rows = torch.arange(len(layer.positions), dtype=torch.float32)
    return rows[None, None, :, None].expand(1, heads, -1, layer.shape.head_dim).contiguous()


def rows_of(values: Tensor) -> list[list[int]]:
    return values[0, :, :, 0].long().tolist()


def cluster(name: str, adapt: Callable[[Layer], dict[str, Any]], **options: Any) -> Begin:
    """A class with an update_kv, made anew for each layer."""

    def begin(module: Any, _model: Model, _ids: Tensor, _directory: Path) -> Select:
        def select(layer: Layer) -> Choice:
            made = getattr(module, name)(**options, **adapt(layer))
            tensors = [layer.keys[None], layer.queries[None], marked(layer, layer.shape.kv_heads)]
            others = [None, layer.shape.group, layer.index]
            takes = len(inspect.signature(made.update_kv).parameters)
            _, values, *go_on = made.update_kv(*(tensors + others)[:takes])
            if values.dim() == 4:
                kept = rows_of(values)
            else:
                kept = [rows[:, 0].long().tolist() for rows in values.split(made.head_lens.tolist())]
            return Choice(kept, go_on[0][0].tolist() if go_on and go_on[0] is not None else None)

        return select

    return begin


def fastkv_options(layer: Layer) -> dict[str, Any]:
    rate = BUDGET / TOKENS
    late = layer.index > TSP_LAYER
    return dict(retain_rate=rate / TSP_RATE if late else rate, tsp_layer=layer.index == TSP_LAYER)


def no_options(_layer: Layer) -> dict[str, Any]:
    return {}


def numbered(layer: Layer) -> dict[str, Any]:
    return dict(layer_idx=layer.index, num_hidden_layers=layer.shape.layers)


def grouped(layer: Layer) -> dict[str, Any]:
    group = layer.shape.group
    grouping = dict(gqa_support=True, gqa_func="mean", num_key_value_groups=group) if group > 1 else {}
    return numbered(layer) | grouping


def head_scores(shape: Shape) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(shape.layers, shape.query_heads, 2, generator=generator, dtype=torch.float64)
    return {
        f"{layer}-{head}": scores[layer, head].tolist()
        for layer in range(shape.layers) for head in range(shape.query_heads)
    }


def headkv(module: Any, model: Model, ids: Tensor, directory: Path) -> Select:
    """Its scores lie beside its code, under the names of two models: a copy of that layout holds ours."""
    name = "Meta-Llama-3-8B-Instruct_retrieval_reasoning_heads.json"
    with tempfile.TemporaryDirectory() as temporary:
        scores = Path(temporary) / "Important_Head" / "head_score"
        scores.mkdir(parents=True)
        (scores / name).write_text(json.dumps(head_scores(model.shape)))
        module.__file__ = str(Path(temporary) / "headkv" / "snapkv_utils.py")
        options = dict(
            window_size=WINDOW, base_capacity=BUDGET, kernel_size=KERNEL, pooling="maxpool", head_choice="reason",
            beta=1.2, temp=1, model="llama", num_hidden_layers=model.shape.layers,
            num_attention_heads=model.shape.query_heads,
        )
        made = [module.ReasonSnapKVCluster(layer_idx=layer, **options) for layer in range(model.shape.layers)]
    chosen = SimpleNamespace(Chosen=lambda layer_idx: made[layer_idx])
    return cluster("Chosen", lambda layer: dict(layer_idx=layer.index))(chosen, model, ids, directory)


def h2o_with_attention(module: Any, _model: Model, _ids: Tensor, _directory: Path) -> Select:
    def select(layer: Layer) -> Choice:
        heads = layer.shape.kv_heads
        cache = SimpleNamespace(key_cache=[layer.keys[None]], value_cache=[marked(layer, heads)])
        made = module.H2OKVCache_LayerWise(hh_size=BUDGET - WINDOW, recent_size=WINDOW)
        attention = layer.probabilities(torch.float32)[None]
        made(layer.wide_keys[None], layer.queries[None], 0, layer.shape.group, cache, attention)
        return Choice(rows_of(cache.value_cache[0]))

    return select


def gemfilter(module: Any, _model: Model, _ids: Tensor, _directory: Path) -> Select:
    def select(layer: Layer) -> Choice | None:
        if layer.index != FILTER_LAYER:
            return None
        attention = SimpleNamespace(
            indecies=None, layer_idx=layer.index, select_layer_idx=layer.index, topk=BUDGET,
            num_key_value_groups=layer.shape.group,
        )
        module.find_context(attention, layer.queries[None], layer.keys[None])
        return Choice([attention.indecies[0, 0].tolist()] * layer.shape.kv_heads)

    return select


def gemfilter_scores(layer: Layer) -> Tensor:
    products = (layer.queries[:, -1:].double() @ layer.wide_keys.double().transpose(1, 2)).sum(0)
    pooled = torch.nn.functional.avg_pool1d(products, 5, stride=1, padding=2)
    return pooled.expand(layer.shape.kv_heads, -1)


def pyramidinfer(module: Any, model: Model, ids: Tensor, directory: Path) -> Select:
    """Runs the whole reference; what reaches a layer is seen where it is called."""
    theirs = module.LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager")
    settings = dict(
        recent_ratio=0.2, prefill_decay_ratio=0.7, prefill_decay_strategy="cosine", min_context_length=64,
        layerwise_downsample_interval=1, streamingllm_sink_len=4, distance_weight=1.2,
    )
    for name, value in settings.items():
        setattr(theirs.config, name, value)
    reached: list[list[int]] = []

    def note(_layer: object, _arguments: object, named: dict[str, Any]) -> None:
        reached.append(named["selected_position_ids"][0].tolist())

    for layer in theirs.model.layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    # Without an attention mask its causal one is off by a token.
    all_seen = torch.ones(1, len(ids), dtype=torch.long)
    theirs.model(ids[None], attention_mask=all_seen, use_cache=True, past_key_values=module.DynamicCache())

    def select(layer: Layer) -> Choice:
        row_of = {position: row for row, position in enumerate(layer.positions.tolist())}
        # A position that did not reach this layer here counts as the last row, which is always there.
        kept = [row_of.get(position, -1) for position in reached[layer.index]]
        handed_on = reached[layer.index + 1 :][:1]
        go_on = [row_of.get(position, -1) for position in handed_on[0]] if handed_on else None
        return Choice([kept] * model.shape.kv_heads, go_on)

    return select


def pyramidinfer_scores(layer: Layer) -> Tensor:
    recent = 1 + int(0.2 * TOKENS)
    weights = torch.linspace(1.0, 1.2, recent, dtype=torch.float64)
    scores = layer.by_kv_head((layer.probabilities()[:, -recent:] * weights[:, None]).sum(1))
    scores[:, -recent:] = torch.inf
    return scores


def fastgen(recovery: float) -> Begin:
    def begin(module: Any, _model: Model, ids: Tensor, _directory: Path) -> Select:
        hybrid = module.KVCacheHybrid

        def of_head(layer: Layer, head: int) -> list[int]:
            count = len(layer.positions)
            sums = column_sums(layer, 0)[head]
            frequent = set(sums.topk(int(SHARE * count)).indices.tolist())
            special = set(range(4)) | {row for row in range(count) if ids[row] == BEGIN}
            special |= {row for row in range(count) if ids[row].item() in PUNCTUATION}
            local = range(count - int(SHARE * count), count)
            # It counts frequent tokens beside those that are kept already: it is told how many ours are.
            beside = [(len(frequent - special - set(kept)) - 0.5) / count for kept in (range(0), local)]
            asked = SimpleNamespace(
                global_tokens=4, requires_special=True, requires_punc=True, special_ids=[torch.tensor([BEGIN])],
                punc_ids=torch.tensor(PUNCTUATION), min_recovery_frac=recovery, max_cache_length=count,
                hybrid_strategies=[
                    dict(strategy="special"),
                    dict(strategy="special_punc"),
                    dict(strategy="special_punc_heavy_hitter", heavy_hitter_frac=beside[0]),
                    dict(
                        strategy="special_punc_heavy_hitter_window", heavy_hitter_frac=beside[1], recent_window=SHARE
                    ),
                    dict(strategy="full"),
                ],
            )
            for method in ("build_masks", "build_special_ids_mask", "build_punc_ids_mask"):
                setattr(asked, method, MethodType(getattr(hybrid, method), asked))
            attention = layer.probabilities(torch.float32)[None, head : head + 1]
            # It divides sums by how many queries see a token, which positions of 0 make the same for all.
            profile = hybrid.profile_attn_heads(asked, torch.zeros(count), attention, input_ids=ids[None])
            return profile[3][0].nonzero()[:, 0].tolist()

        return lambda layer: Choice([of_head(layer, head) for head in range(layer.shape.kv_heads)])

    return begin


def press(make: Callable[[Any], Any]) -> Begin:
    """A press of kvpress that scores by attention probabilities."""

    def begin(module: Any, _model: Model, _ids: Tensor, _directory: Path) -> Select:
        made = make(module)

        def select(layer: Layer) -> Choice:
            shape = layer.shape
            config = SimpleNamespace(
                num_attention_heads=shape.query_heads, num_key_value_heads=shape.kv_heads,
                num_hidden_layers=shape.layers,
            )
            attention = SimpleNamespace(config=config, head_dim=shape.head_dim, layer_idx=layer.index)
            hidden = torch.empty(1, len(layer.positions), shape.hidden)
            probabilities = layer.probabilities(torch.float32)[None]
            values = marked(layer, shape.kv_heads)
            _, kept = made.compress(attention, hidden, layer.keys[None], values, probabilities, {})
            return Choice(rows_of(kept))

        return select

    return begin


def pyramid_press(module: Any) -> Any:
    class WindowBeside(module.PyramidKVPress):  # type: ignore[name-defined]
        """Its budgets count the window in; ours lies beside them."""

        def get_layer_budget(self, attention: Any, count: int) -> int:
            return super().get_layer_budget(attention, count) + self.window_size

    return WindowBeside(compression_ratio=1 - BUDGET / TOKENS, window_size=2, kernel_size=KERNEL)


def steered(spans: list[range]) -> Callable[[Any, Tensor, Path], Tensor]:
    def logits(module: Any, ids: Tensor, directory: Path) -> Tensor:
        model = transformers.LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager")
        head_config = {str(layer): heads for layer, heads in STEERED.items()}
        steerer = module.PASTA(model, tokenizer=None, head_config=head_config, alpha=0.01)
        # A text of one character a token. Blanks between them, since a span takes in the token that it touches.
        text = " ".join(chr(0x4E00 + row) for row in range(len(ids)))
        parts = [[text[2 * span.start : 2 * span.stop - 1]] for span in spans]
        offsets = [[(2 * row, 2 * row + 1) for row in range(len(ids))]]
        with steerer.apply_steering(model, [text], parts, {"input_ids": ids[None]}, offsets):
            return model(ids[None]).logits[0, -1]

    return logits
