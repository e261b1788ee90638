"""Scores of heads: `fastkv profile heads` beside the code that HeadKV measures them with, on the shipped model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

NEEDLE = Path(__file__).resolve().parents[2] / "models" / "needle"
SAMPLES = 4
PROMPT_TOKENS = 160
ROOM = 8
"""Tokens that the program leaves for an answer."""


def scored(module: ModuleType, run: Callable[..., str]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """What the program says of each head, prompt by prompt, and what the reference says. `run` calls the program."""
    scoring = "reasoning" if module.__name__.endswith("r2") else "retrieval"
    options = ["--model", str(NEEDLE), "--tokens", str(PROMPT_TOKENS)]
    ours = json.loads(run("profile", "heads", *options, "--samples", str(SAMPLES), "--scoring", scoring))
    model = transformers.LlamaForCausalLM.from_pretrained(NEEDLE, dtype=torch.float32, attn_implementation="eager")
    tokenizer = Tokenizer.from_file(str(NEEDLE / "tokenizer.json"))
    theirs: dict[str, list[float]] = {}
    options[-1] = str(PROMPT_TOKENS - ROOM)
    for sample in range(SAMPLES):
        prompt = json.loads(run("prompt", *options, "--facts", "8", "--seed", str((1 << 32) + sample), "--json"))
        ids = tokenizer.encode(f"{prompt['context']} {prompt['question']}").ids
        answer = tokenizer.encode(prompt["answer"], add_special_tokens=False).ids
        asked = next(fact for fact in prompt["facts"] if fact["value"] == prompt["answer"])
        start = next(row for row in range(asked["word"], len(ids)) if ids[row : row + len(answer)] == answer)
        tester = SimpleNamespace(
            layer_num=model.config.num_hidden_layers, head_num=model.config.num_attention_heads,
            prompt_ids=torch.tensor(ids), needle_start=start, needle_end=start + len(answer),
        )
        gains: list[list[list[Any]]] = [[[0.0, ""] for _ in range(tester.head_num)] for _ in range(tester.layer_num)]
        produced = []
        for token, attentions in answered(model, ids, len(answer)):
            module.LLMNeedleHaystackTester.retrieval_calculate(tester, attentions, gains, token, "")
            produced.append(token.item())
        if produced == answer:
            for layer, heads in enumerate(gains):
                for head, (gain, _) in enumerate(heads):
                    theirs.setdefault(f"{layer}-{head}", []).append(float(gain))
    return ours, theirs


def answered(
    model: transformers.LlamaForCausalLM, ids: list[int], count: int
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Greedy tokens, and the attention that each was produced with."""
    cache = model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
    token = torch.tensor(ids[-1])
    for _ in range(count):
        step = model(token.view(1, 1), past_key_values=cache, output_attentions=True)
        token = step.logits[0, -1].argmax()
        yield token, step.attentions
