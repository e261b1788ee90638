"""What is compared: each policy with each of its references, and the options that mean the same on both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import BEGIN, PUNCTUATION, VOCABULARY, Layer, Shape, column_sums, window_scores
from references import (
    BUDGET, FILTER_LAYER, KERNEL, STEERED, TOKENS, TSP_LAYER, TSP_RATE, WINDOW, Begin, cluster, fastgen,
    fastkv_options, gemfilter, gemfilter_scores, grouped, h2o_with_attention, headkv, no_options, numbered, press,
    pyramid_press, pyramidinfer, pyramidinfer_scores, steered,
)
from repositories import (
    ADAKV, COLD_COMPRESS, FACTORY, FASTKV, GEMFILTER, GEMFILTER_H2O, HEADKV, KVPRESS_PYRAMIDKV, KVPRESS_SNAPKV,
    KVPRESS_STREAMING, PASTA, PYRAMIDINFER, REASONING, RETRIEVAL, SNAPKV, Repository,
)

MHA = Shape(layers=5, query_heads=4, kv_heads=4)
GQA = Shape(layers=4, query_heads=8, kv_heads=2)
HIGHLIGHTED = [range(20, 30), range(70, 81)]


@dataclass(frozen=True)
class Check:
    """One policy, asked on both sides."""

    policy: str
    repository: Repository
    shape: Shape
    options: list[str]
    """Of `fastkv inspect`."""
    begin: Begin
    """Given the module, the model, the prompt and the model's directory: who chooses, layer by layer."""
    rank: Callable[[Layer], Tensor]
    """Scores in f64 [kv heads, n], which tell ties from differences."""
    remark: str = ""


@dataclass(frozen=True)
class LogitCheck:
    """Logits of a steered model."""

    policy: str
    repository: Repository
    shape: Shape
    options: list[str]
    logits: Callable[[Any, Tensor, Path], Tensor]
    remark: str = ""


@dataclass(frozen=True)
class HeadCheck:
    """Scores of the shipped model's heads."""

    policy: str
    repository: Repository
    shape: Shape = Shape(layers=6, query_heads=8, kv_heads=2)
    options: tuple[str, ...] = ()
    remark: str = ""


def steering(spans: list[range]) -> list[str]:
    heads = ",".join(f"{layer}-{head}" for layer, heads in STEERED.items() for head in heads)
    return ["--steer-heads", heads] + [f"--steer-tokens={span.start}..{span.stop}" for span in spans]


def window(pooling: str) -> Callable[[Layer], Tensor]:
    return lambda layer: window_scores(layer, WINDOW, pooling, KERNEL)


def budget(pooling: str | None = None, window: int | None = WINDOW, tokens: int = BUDGET) -> list[str]:
    """Options of our side."""
    options = ["--retention", str(tokens)]
    if window is not None:
        options += ["--window", str(window)]
    if pooling is not None:
        options += ["--pooling", pooling, "--kernel", str(KERNEL)]
    return options


FASTKV_RATES = [
    *budget("max")[2:], "--retention", str(BUDGET / TOKENS), "--propagation", str(TSP_RATE), "--tsp-layer",
    str(TSP_LAYER),
]
FASTKV_COUNTS = [
    *budget("average"), "--propagation", str(int(TOKENS * TSP_RATE)), "--tsp-layer", str(TSP_LAYER),
]
SIZES: dict[str, Any] = dict(window_size=WINDOW, max_capacity_prompt=BUDGET)
POOLED: dict[str, Any] = dict(**SIZES, kernel_size=KERNEL)
FASTKV_SIZES = dict(**POOLED, tsp_rate=TSP_RATE, tsp_length=int(TOKENS * TSP_RATE))
ADAPTIVE: dict[str, Any] = dict(window_size=WINDOW, kernel_size=KERNEL, normalize=None)
BEFORE_POOLING = "it averages a group before pooling, which average pooling does not notice"

AnyCheck = Check | LogitCheck | HeadCheck
CHECKS: list[AnyCheck] = [
    Check("fastkv", FASTKV, GQA, FASTKV_RATES,
          cluster("FastKVCluster", fastkv_options, **FASTKV_SIZES, pooling="maxpool", eviction_mode="proportional"),
          window("max")),
    Check("fastkv-constant", FASTKV, GQA, FASTKV_COUNTS,
          cluster("FastKVCluster", fastkv_options, **FASTKV_SIZES, pooling="avgpool", eviction_mode="constant"),
          window("average")),
    Check("snapkv", SNAPKV, MHA, budget("max"),
          cluster("SnapKVCluster", no_options, **POOLED, pooling="maxpool"), window("max"),
          "it selects per query head: compared at G = 1"),
    Check("snapkv", SNAPKV, MHA, budget("average"),
          cluster("SnapKVCluster", no_options, **POOLED, pooling="avgpool"), window("average"),
          "it selects per query head: compared at G = 1"),
    Check("snapkv", FACTORY, GQA, budget("average"),
          cluster("SnapKVCluster", no_options, **POOLED, pooling="avgpool"), window("average"), BEFORE_POOLING),
    Check("snapkv", KVPRESS_SNAPKV, GQA, budget("average"),
          press(lambda module: module.SnapKVPress(1 - BUDGET / TOKENS, WINDOW, KERNEL)), window("average"),
          "average pooling is all it has"),
    Check("pyramidkv", FACTORY, MHA, [*budget("max"), "--steepness", "16"],
          cluster("PyramidKVCluster", numbered, **POOLED, pooling="maxpool", beta=16), window("max"),
          "it rounds the step from layer to layer down: compared where it is whole"),
    Check("pyramidkv", KVPRESS_PYRAMIDKV, GQA, budget("average", 2, BUDGET + 2),
          press(pyramid_press), lambda layer: window_scores(layer, 2, "average", KERNEL),
          "its budgets count the window in: as many are added"),
    Check("adakv", ADAKV, MHA, budget("max"),
          cluster("AdaptiveSnapKVCluster", grouped, **ADAPTIVE, base_capacity=BUDGET, floor_alpha=0.2, skip=0,
                  pooling="maxpool"), window("max")),
    Check("adakv", ADAKV, GQA, budget("average"),
          cluster("AdaptiveSnapKVCluster", grouped, **ADAPTIVE, base_capacity=BUDGET, floor_alpha=0.2, skip=0,
                  pooling="avgpool"), window("average"), BEFORE_POOLING),
    Check("adakv", FACTORY, MHA, budget("max"),
          cluster("AdaKVCluster", numbered, **ADAPTIVE, max_capacity_prompt=BUDGET, floor=0.2, pooling="maxpool"),
          window("max")),
    Check("headkv", HEADKV, MHA, budget("max"), headkv, window("max"), "it selects per query head: compared at G = 1"),
    Check("h2o", FACTORY, MHA, budget(), cluster("H2OKVCluster", no_options, **SIZES),
          lambda layer: column_sums(layer, WINDOW)),
    Check("h2o", FACTORY, GQA, budget(), cluster("H2OKVCluster", no_options, **SIZES),
          lambda layer: column_sums(layer, WINDOW)),
    Check("h2o", GEMFILTER_H2O, GQA, budget(), h2o_with_attention, lambda layer: column_sums(layer, WINDOW)),
    *(
        Check("fastgen", COLD_COMPRESS, MHA, ["--recovery", str(recovery)], fastgen(recovery),
              lambda layer: column_sums(layer, 0),
              "it adds frequent tokens to those kept already, by mean attention: told how many ours are, and by sums")
        for recovery in (0.2, 0.8, 0.95)
    ),
    Check("gemfilter", GEMFILTER, GQA, [*budget(window=None), "--filter-layer", str(FILTER_LAYER)], gemfilter,
          gemfilter_scores),
    Check("pyramidinfer", PYRAMIDINFER, GQA, [], pyramidinfer, pyramidinfer_scores),
    Check("streamingllm", FACTORY, GQA, budget(window=None),
          cluster("StreamingLLMKVCluster", no_options, window_size=BUDGET - 4, max_capacity_prompt=BUDGET),
          lambda layer: column_sums(layer, 0)),
    Check("streamingllm", KVPRESS_STREAMING, GQA, budget(window=None),
          press(lambda module: module.StreamingLLMPress(1 - BUDGET / TOKENS, 4)),
          lambda layer: column_sums(layer, 0)),
    LogitCheck("steering, one span", PASTA, MHA, steering(HIGHLIGHTED[:1]), steered(HIGHLIGHTED[:1])),
    LogitCheck("steering, two spans", PASTA, GQA, steering(HIGHLIGHTED), steered(HIGHLIGHTED),
               "it lowers what lies between by α twice and the spans by α, which softmax does not notice"),
    HeadCheck("profile heads, retrieval", RETRIEVAL),
    HeadCheck("profile heads, reasoning", REASONING),
]


def prompt(seed: int) -> Tensor:
    """Ids with a begin of text and, here and there, punctuation."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(PUNCTUATION.start, VOCABULARY, (TOKENS,), generator=generator)
    ids[0] = BEGIN
    return ids
