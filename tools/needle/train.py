"""Train the needle model: a small Llama that answers retrieval questions.

    pip install -r tools/needle/requirements.txt
    python tools/needle/train.py --out models/needle

Everything the model ever reads is generated on the fly from models/needle/dialect.json and a
seed; nothing is downloaded. The result is a Hugging Face directory (LlamaForCausalLM, bf16).

The run is deterministic for given --seed, --steps, --decay-steps and --processes on one machine
and one PyTorch version. See models/needle/README.md for what the model is for.
"""

import argparse
import json
import math
import os
import random
import re
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[2]

# Architecture.
HIDDEN = 256
LAYERS = 6
QUERY_HEADS = 8
KV_HEADS = 2
GROUP = QUERY_HEADS // KV_HEADS
HEAD_DIM = 64
INTERMEDIATE = 384
VOCABULARY = 384  # a few rows more than the dialect has words
ROPE_THETA = 1e6
NORM_EPSILON = 1e-5
MAX_POSITIONS = 8192

# The layer whose attention starts with hand-set heads (see `set_structured_start`).
STRUCTURED_LAYER = 2
EMBEDDING_STD = 0.05
CONSTANT_COORDINATE = 0  # of the embedding: it starts with the same value for every word
CONSTANT_VALUE = 0.25


# ---------------------------------------------------------------------------------------------
# The language
# ---------------------------------------------------------------------------------------------


class Dialect:
    """dialect.json: words, sentences and the token ids that follow from them."""

    def __init__(self, path):
        spec = json.loads(Path(path).read_text())
        self.words = spec["words"]
        self.needle = spec["needle"]
        self.filler = spec["filler"]
        self.hard = spec["tasks"]["hard"]
        self.special = spec["special_tokens"]
        self.answer_end = spec["answer_end"]
        self.vocabulary = self._vocabulary()

    def _vocabulary(self):
        """Token ids in order of appearance: special tokens, template words, word lists."""
        templates = [self.answer_end, self.needle["sentence"], self.needle["question"]]
        templates += [t for kind in self.filler for t in kind["templates"]]
        words = list(self.special.values())
        words += [w for t in templates for w in t.split() if not w.startswith("{")]
        words += [w for word_list in self.words.values() for w in word_list]
        vocabulary = {}
        for word in words:
            vocabulary.setdefault(word, len(vocabulary))
        assert len(vocabulary) <= VOCABULARY
        return vocabulary

    def ids(self, text):
        return [self.vocabulary[word] for word in text.split()]

    def filler_sentence(self, rng):
        kind = rng.choices(self.filler, [k["probability"] for k in self.filler])[0]
        template = rng.choice(kind["templates"])
        return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(self.words[slot[1]]), template)

    def keys(self, rng, count, hard):
        """`count` distinct (adjective, animal) pairs. Hard keys come from few adjectives and
        animals, so that most of them share a word with others."""
        adjectives, animals = self.words["adjective"], self.words["animal"]
        if hard:
            # Enough of both that `count` pairs exist even in the densest sequences.
            few = max(self.hard["adjectives_drawn"], math.ceil(math.sqrt(1.5 * count)))
            adjectives, animals = rng.sample(adjectives, few), rng.sample(animals, few)
        pairs = rng.sample(range(len(adjectives) * len(animals)), count)
        return [(adjectives[p // len(animals)], animals[p % len(animals)]) for p in pairs]

    def value(self, rng):
        return rng.sample(self.words["number"], self.needle["numbers_per_value"])


# Loss classes of a token, as a target.
PREDICTABLE, RANDOM, ANSWER = 0, 1, 2

# How dense training sequences are.
TOKENS_PER_NEEDLE = 32  # at the least
MOST_NEEDLES = 24
ONE_NEEDLE_SHARE = 0.1  # of sequences
QUESTION_SHARE = 0.45  # of the tokens, at the most
MOST_QUESTIONS = 20


def training_sequence(dialect, rng, stage, length):
    """One dense training example: `length` tokens, their positions and their loss classes.

    Filler and needles in random order, then as many questions as fit, each with its answer.
    """
    end = dialect.ids(dialect.answer_end)
    hard = rng.random() < stage.hard_share
    most = max(1, min(MOST_NEEDLES, length // TOKENS_PER_NEEDLE))
    # One needle now and then: otherwise the model never sees that case.
    needles = 1 if rng.random() < ONE_NEEDLE_SHARE else rng.randint((most + 1) // 2, most)
    facts = [(key, dialect.value(rng)) for key in dialect.keys(rng, needles, hard)]

    def needle_tokens(template, key, value):
        ids, classes = [], []
        for word in template.split():
            if word == "{value}":
                words, kind = value, RANDOM
            elif word == "{adjective}":
                words, kind = [key[0]], RANDOM
            elif word == "{animal}":
                words, kind = [key[1]], RANDOM
            else:
                words, kind = [word], PREDICTABLE
            ids += [dialect.vocabulary[w] for w in words]
            classes += [kind] * len(words)
        return ids, classes

    needle_sentences = [needle_tokens(dialect.needle["sentence"], k, v) for k, v in facts]

    questions = []
    for key, value in facts:
        ids, classes = needle_tokens(dialect.needle["question"], key, value)
        answer = dialect.ids(" ".join(value)) + end
        questions.append((ids + answer, classes + [ANSWER] * len(answer)))
    rng.shuffle(questions)
    room = int(QUESTION_SHARE * length)
    questions = questions[: max(1, min(MOST_QUESTIONS, room // len(questions[0][0])))]

    # Fill up with filler. The last filler sentence is cut so that the length is exact.
    room = length - 1 - sum(len(s[0]) for s in needle_sentences + questions)
    assert room >= 0, "a sequence too short for its needles"
    filler = []
    while room > 0:
        ids = dialect.ids(dialect.filler_sentence(rng))[-room:]
        filler.append((ids, [PREDICTABLE] * len(ids)))
        room -= len(ids)
    context = filler + needle_sentences
    rng.shuffle(context)

    sentences = [(dialect.ids(dialect.special["begin"]), [PREDICTABLE])] + context + questions
    ids = [i for s in sentences for i in s[0]]
    classes = [c for s in sentences for c in s[1]]

    # Positions: the text is short, but at a few sentence starts the position jumps ahead, so that
    # the sequence spans as many positions as a long one (PoSE, arXiv 2309.10400).
    positions = torch.arange(length)
    spare = (rng.randint(stage.span_from, stage.span_to) if stage.span_to else 0) - length
    if spare > 0:
        starts = [0]
        for s in sentences[:-1]:
            starts.append(starts[-1] + len(s[0]))
        jumps = rng.sample(starts[1:], min(rng.randint(1, 6), len(starts) - 1))
        cuts = sorted(rng.randint(0, spare) for _ in jumps[1:])
        sizes = [b - a for a, b in zip([0] + cuts, cuts + [spare])]
        for start, size in zip(jumps, sizes):
            positions[start:] += size
    return ids, positions, classes


@dataclass
class Stage:
    """A stretch of the curriculum."""

    until: float  # step
    shapes: list  # (length, sequences per process), used in turn
    span_from: int  # positions a sequence spans, drawn from here ...
    span_to: int  # ... to here; 0: no jumps
    hard_share: float  # of sequences with hard keys


MIXED = [(256, 8), (128, 16), (256, 8), (512, 4), (256, 8), (1024, 2)]


def curriculum(steps, decay_steps):
    return [
        Stage(200, [(64, 24)], 0, 0, 0.0),
        Stage(300, [(128, 16)], 1024, 1024, 0.3),
        Stage(420, [(128, 16)], 4096, 4096, 0.3),
        Stage(steps - decay_steps, MIXED, 512, 6000, 0.6),
        Stage(math.inf, MIXED + [(2048, 1)], 512, 6000, 0.6),
    ]


def training_batch(dialect, stages, step, seed, rank):
    # Seeded by a string: independent streams, and a resumed run sees the same data.
    rng = random.Random(f"{seed}/{step}/{rank}")
    stage = next(s for s in stages if step < s.until)
    length, count = stage.shapes[step % len(stage.shapes)]
    rows = [training_sequence(dialect, rng, stage, length) for _ in range(count)]
    ids = torch.tensor([r[0] for r in rows])
    positions = torch.stack([r[1] for r in rows])
    classes = torch.tensor([r[2] for r in rows])
    return ids, positions, classes


# ---------------------------------------------------------------------------------------------
# The model: Llama, with f32 weights and residual stream, and bf16 matrix products
# ---------------------------------------------------------------------------------------------


class CausalAttention(torch.autograd.Function):
    """Causal grouped-query attention in blocks of query rows.

    Several times faster on a CPU than PyTorch's own attention in training: each block is one
    plain batched matrix product, the G query heads of a kv head are rows of the same product,
    and keys after the block are never touched.

    q: [B, Hk, G, n, d]; k, v: [B, Hk, n, d]; all bf16. Returns [B, Hk, G, n, d].
    """

    BLOCK = 128

    @staticmethod
    def forward(ctx, q, k, v):
        b, hk, g, n, d = q.shape
        k, v = k.reshape(b * hk, n, d), v.reshape(b * hk, n, d)
        q = q.reshape(b * hk, g, n, d) * d**-0.5
        out = torch.empty_like(q)
        probabilities = []
        for start in range(0, n, CausalAttention.BLOCK):
            end = min(start + CausalAttention.BLOCK, n)
            rows = end - start
            scores = torch.bmm(
                q[:, :, start:end].reshape(b * hk, g * rows, d), k[:, :end].transpose(1, 2)
            )
            future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
            scores.view(b * hk, g, rows, end)[..., start:].masked_fill_(future, -math.inf)
            p = torch.softmax(scores, -1, dtype=torch.float32).bfloat16()
            out[:, :, start:end] = torch.bmm(p, v[:, :end]).view(b * hk, g, rows, d)
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, out, *probabilities)
        return out.view(b, hk, g, n, d)

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, *probabilities = ctx.saved_tensors
        b, hk, g, n, d = grad_out.shape
        grad_out = grad_out.reshape(b * hk, g, n, d)
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros(k.shape, dtype=torch.float32)
        grad_v = torch.zeros(v.shape, dtype=torch.float32)
        # Row sums of p * dp, which the softmax derivative subtracts.
        row_sums = (grad_out.float() * out.float()).sum(-1).bfloat16()
        for block, p in enumerate(probabilities):
            start = block * CausalAttention.BLOCK
            rows, end = p.shape[1] // g, p.shape[2]
            go = grad_out[:, :, start:end].reshape(b * hk, g * rows, d)
            qb = q[:, :, start:end].reshape(b * hk, g * rows, d)
            grad_v[:, :end] += torch.bmm(p.transpose(1, 2), go)
            grad_scores = torch.bmm(go, v[:, :end].transpose(1, 2))
            grad_scores -= row_sums[:, :, start:end].reshape(b * hk, g * rows, 1)
            grad_scores *= p
            grad_q[:, :, start:end] = torch.bmm(grad_scores, k[:, :end]).view(b * hk, g, rows, d)
            grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), qb)
        grad_q = (grad_q * d**-0.5).view(b, hk, g, n, d)
        shape = (b, hk, n, d)
        return grad_q, grad_k.bfloat16().view(shape), grad_v.bfloat16().view(shape)


def product(x, weight):
    return F.linear(x, weight.bfloat16())


def rope_frequencies():
    return ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)


def rotate(x, cos, sin):
    """RoPE, half-split: pair i is (x[i], x[i + d/2]). x: [B, H, n, d] bf16."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).bfloat16()


def norm(x, gain):
    return F.rms_norm(x, (HIDDEN,), gain, NORM_EPSILON)


MATRICES = {
    "self_attn.q_proj": (QUERY_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, QUERY_HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def forward(weights, ids, positions):
    """Logits [B, n, vocabulary] in f32. `weights` carries Hugging Face's parameter names."""
    b, n = ids.shape
    angles = positions[:, None, :, None].float() * rope_frequencies()
    cos, sin = angles.cos(), angles.sin()
    x = F.embedding(ids, weights["model.embed_tokens.weight"])
    for layer in range(LAYERS):
        w = lambda name: weights[f"model.layers.{layer}.{name}.weight"]  # noqa: E731
        h = norm(x, w("input_layernorm")).bfloat16()
        q = product(h, w("self_attn.q_proj")).view(b, n, QUERY_HEADS, HEAD_DIM).transpose(1, 2)
        k = product(h, w("self_attn.k_proj")).view(b, n, KV_HEADS, HEAD_DIM).transpose(1, 2)
        v = product(h, w("self_attn.v_proj")).view(b, n, KV_HEADS, HEAD_DIM).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = CausalAttention.apply(q.view(b, KV_HEADS, GROUP, n, HEAD_DIM), k, v)
        a = a.reshape(b, QUERY_HEADS, n, HEAD_DIM).transpose(1, 2).reshape(b, n, -1)
        x = x + product(a, w("self_attn.o_proj")).float()
        h = norm(x, w("post_attention_layernorm")).bfloat16()
        h = F.silu(product(h, w("mlp.gate_proj"))) * product(h, w("mlp.up_proj"))
        x = x + product(h, w("mlp.down_proj")).float()
    h = norm(x, weights["model.norm.weight"]).bfloat16()
    return product(h, weights["model.embed_tokens.weight"]).float()


def initial_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda shape, std: torch.randn(shape, generator=generator) * std  # noqa: E731
    weights = {"model.embed_tokens.weight": normal((VOCABULARY, HIDDEN), EMBEDDING_STD)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in MATRICES.items():
            weights[f"{prefix}{name}.weight"] = normal(shape, 0.5 * shape[1] ** -0.5)
        weights[prefix + "input_layernorm.weight"] = torch.ones(HIDDEN)
        weights[prefix + "post_attention_layernorm.weight"] = torch.ones(HIDDEN)
    # Tied embeddings: a small gain keeps "repeat the current word" from being a strong first guess.
    weights["model.norm.weight"] = torch.full((HIDDEN,), 0.4)
    set_structured_start(weights, generator)
    return {name: w.requires_grad_() for name, w in weights.items()}


def set_structured_start(weights, generator):
    """Set two head groups of one layer by hand, so that retrieval is learned in minutes.

    From a plain random start the model does not leave "copy some number of the context" for
    millions of tokens. Only the start is structured: everything stays trainable, and inference is
    plain Llama.
    """
    # The layers before stay silent at first, so that the structured layer reads the embeddings.
    for layer in range(STRUCTURED_LAYER):
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"].zero_()
        weights[f"model.layers.{layer}.mlp.down_proj.weight"].zero_()

    embedding = weights["model.embed_tokens.weight"]
    embedding[:, CONSTANT_COORDINATE] = CONSTANT_VALUE
    # That coordinate's value after the layer's RMS norm.
    mean_square = EMBEDDING_STD**2 + CONSTANT_VALUE**2 / HIDDEN
    constant = CONSTANT_VALUE * mean_square**-0.5

    q_proj = weights[f"model.layers.{STRUCTURED_LAYER}.self_attn.q_proj.weight"]
    k_proj = weights[f"model.layers.{STRUCTURED_LAYER}.self_attn.k_proj.weight"]
    q_proj.zero_()
    k_proj.zero_()
    half = HEAD_DIM // 2

    # Group 0, "look back": query head j (j = 0..3) attends to the token j + 1 places before.
    # Queries and keys read only the constant coordinate. In RoPE pair i the score of a key at
    # distance t is cos(f_i (t - lag)): all 8 fast pairs agree at t = lag alone.
    pairs = torch.arange(8)
    nats_per_pair = 5.5
    size = math.sqrt(nats_per_pair * math.sqrt(HEAD_DIM)) / constant
    k_proj[pairs, CONSTANT_COORDINATE] = size
    for head in range(GROUP):
        phase = -(head + 1) * rope_frequencies()[pairs]
        q_proj[head * HEAD_DIM + pairs, CONSTANT_COORDINATE] = size * phase.cos()
        q_proj[head * HEAD_DIM + half + pairs, CONSTANT_COORDINATE] = size * phase.sin()

    # Group 1, "same token": queries and keys are one random projection of the embedding, placed
    # in the 12 slowest RoPE pairs, which hardly turn over thousands of positions.
    slow = torch.arange(half - 12, half)
    rows = torch.cat((slow, slow + half))
    projection = torch.randn((HIDDEN, len(rows)), generator=generator)
    projection[CONSTANT_COORDINATE] = 0
    projection = 2 * torch.linalg.qr(projection).Q.T
    k_proj[HEAD_DIM + rows] = projection
    for head in range(GROUP, 2 * GROUP):
        q_proj[head * HEAD_DIM + rows] = projection


# ---------------------------------------------------------------------------------------------
# Optimiser
# ---------------------------------------------------------------------------------------------


def newton_schulz(matrix):
    """The nearest (semi-)orthogonal matrix, roughly: Muon's quintic iteration in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    wide = x.shape[0] <= x.shape[1]
    if not wide:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).float()


class Optimiser:
    """Muon for the matrices that start at random, AdamW for the rest.

    The layers up to the structured one move slowly, so that they do not undo the start before
    the later layers have learned to use it.
    """

    MUON = dict(rate=0.02, momentum=0.95, decay=0.01)
    ADAM_FAST, ADAM_SLOW = 2e-3, 1e-4
    BETAS = (0.9, 0.98)

    def __init__(self, weights, rank, processes):
        self.weights, self.rank, self.processes = weights, rank, processes
        self.muon, fast, slow = [], [], []
        for name, weight in weights.items():
            match = re.search(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)", name)
            if not match:
                fast.append(weight)
                continue
            layer, matrix = int(match[1]), match[2]
            structured = layer == STRUCTURED_LAYER and matrix in ("q_proj", "k_proj")
            if layer < STRUCTURED_LAYER or structured:
                slow.append(weight)
            else:
                self.muon.append(weight)
        self.momentum = [torch.zeros_like(w) for w in self.muon]
        self.adam = torch.optim.AdamW(
            [dict(params=fast, rate=self.ADAM_FAST), dict(params=slow, rate=self.ADAM_SLOW)],
            betas=self.BETAS,
            weight_decay=0.0,
        )

    @torch.no_grad()
    def step(self, rate_factor):
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * rate_factor
        self.adam.step()

        # Each process orthogonalises its share of the matrices; then all add up.
        updates = []
        for i, (weight, momentum) in enumerate(zip(self.muon, self.momentum)):
            momentum.lerp_(weight.grad, 1 - self.MUON["momentum"])
            if i % self.processes == self.rank:
                nesterov = weight.grad.lerp(momentum, self.MUON["momentum"])
                updates.append(newton_schulz(nesterov).reshape(-1))
            else:
                updates.append(torch.zeros(weight.numel()))
        updates = torch.cat(updates)
        if self.processes > 1:
            dist.all_reduce(updates)
        offset = 0
        for weight in self.muon:
            update = updates[offset : offset + weight.numel()].view_as(weight)
            offset += weight.numel()
            rate = self.MUON["rate"] * rate_factor
            weight.mul_(1 - rate * self.MUON["decay"])
            weight.sub_(rate * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * update)

    def state(self):
        return dict(momentum=self.momentum, adam=self.adam.state_dict())

    def load(self, state):
        self.momentum = state["momentum"]
        self.adam.load_state_dict(state["adam"])


def rate_factor(step, steps, decay_steps):
    """Warm-up over 20 steps, constant, then linear to 2 % over the last `decay_steps`."""
    done = max(0.0, (step - (steps - decay_steps)) / decay_steps)
    return min(1.0, (step + 1) / 20) * (1 - 0.98 * done)


@torch.no_grad()
def clip_gradients(weights, largest_norm=1.0):
    total = torch.stack([w.grad.norm() for w in weights.values()]).norm()
    if total > largest_norm:
        for w in weights.values():
            w.grad.mul_(largest_norm / total)
    return total.item()


@torch.no_grad()
def average_gradients(weights, processes):
    if processes == 1:
        return
    flat = torch.cat([w.grad.reshape(-1) for w in weights.values()])
    dist.all_reduce(flat)
    flat /= processes
    offset = 0
    for w in weights.values():
        w.grad.copy_(flat[offset : offset + w.numel()].view_as(w))
        offset += w.numel()


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

TEXT_WEIGHT = 0.1


def loss_and_accuracy(weights, ids, positions, classes):
    """Mean cross-entropy of answers + 0.1 x that of predictable text; answer-token accuracy."""
    logits = forward(weights, ids, positions)[:, :-1].flatten(0, 1)
    targets, classes = ids[:, 1:].flatten(), classes[:, 1:].flatten()
    losses = F.cross_entropy(logits, targets, reduction="none")
    answers = classes == ANSWER
    loss = losses[answers].mean() + TEXT_WEIGHT * losses[classes == PREDICTABLE].mean()
    accuracy = (logits[answers].argmax(-1) == targets[answers]).float().mean().item()
    return loss, accuracy


def train(rank, options):
    torch.set_num_threads(max(1, options.threads // options.processes))
    if options.processes > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(options.port))
        dist.init_process_group("gloo", rank=rank, world_size=options.processes)

    dialect = Dialect(options.dialect)
    stages = curriculum(options.steps, options.decay_steps)
    weights = initial_weights(options.seed)
    optimiser = Optimiser(weights, rank, options.processes)
    first = 0
    if options.resume:
        saved = torch.load(options.resume, weights_only=True)
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(saved["weights"][name])
        optimiser.load(saved["optimiser"])
        first = saved["step"]
        if first > options.steps - options.decay_steps:
            raise SystemExit("the checkpoint lies in the decay: resume from an earlier one")

    began, tokens, smooth = time.time(), 0, None
    for step in range(first, options.steps):
        ids, positions, classes = training_batch(dialect, stages, step, options.seed, rank)
        for w in weights.values():
            w.grad = None
        loss, accuracy = loss_and_accuracy(weights, ids, positions, classes)
        loss.backward()
        average_gradients(weights, options.processes)
        gradient_norm = clip_gradients(weights)
        optimiser.step(rate_factor(step, options.steps, options.decay_steps))

        tokens += ids.numel() * options.processes
        smooth = accuracy if smooth is None else 0.95 * smooth + 0.05 * accuracy
        if rank == 0 and (step % 10 == 0 or step + 1 == options.steps):
            seconds = time.time() - began
            print(
                f"step {step:5d}  loss {loss.item():.3f}  answer accuracy {accuracy:.3f} "
                f"(smoothed {smooth:.3f})  gradient {gradient_norm:.2f}  "
                f"{tokens / 1e6:.2f} M tokens  {seconds:.0f} s",
                flush=True,
            )
        if rank == 0 and options.checkpoints:
            done = step + 1
            if done % 200 == 0 or done == options.steps - options.decay_steps:
                folder = Path(options.checkpoints)
                folder.mkdir(parents=True, exist_ok=True)
                state = dict(step=done, weights=weights, optimiser=optimiser.state())
                torch.save(state, folder / f"step-{done}.pt")
    if rank == 0:
        export(weights, dialect, Path(options.out))
        print(f"saved {options.out}", flush=True)
    if options.processes > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# The Hugging Face directory
# ---------------------------------------------------------------------------------------------


def export(weights, dialect, folder):
    folder.mkdir(parents=True, exist_ok=True)
    write_description(dialect, folder)
    write_safetensors(weights, folder / "model.safetensors")


def write_description(dialect, folder):
    """Every file but the weights."""
    ids, special = dialect.vocabulary, dialect.special
    begin, padding, stop = ids[special["begin"]], ids[special["padding"]], ids[dialect.answer_end]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "max_position_embeddings": MAX_POSITIONS,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": EMBEDDING_STD,
        "tie_word_embeddings": True,
        "bos_token_id": begin,
        "eos_token_id": stop,
        "pad_token_id": padding,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    generation = {
        "bos_token_id": begin,
        "eos_token_id": stop,  # an answer ends with its sentence
        "pad_token_id": padding,
        "do_sample": False,
        "max_new_tokens": 8,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special["begin"],
        "eos_token": dialect.answer_end,
        "unk_token": special["unknown"],
        "pad_token": special["padding"],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    added = [
        dict(id=ids[token], content=token, single_word=False, lstrip=False, rstrip=False)
        | dict(normalized=False, special=True)
        for token in special.values()
    ]
    begin_item = {"SpecialToken": {"id": special["begin"], "type_id": 0}}
    sequence = lambda name: {"Sequence": {"id": name, "type_id": 0}}  # noqa: E731
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin_item, sequence("A")],
            "pair": [begin_item, sequence("A"), sequence("B")],
            "special_tokens": {
                special["begin"]: {
                    "id": special["begin"],
                    "ids": [begin],
                    "tokens": [special["begin"]],
                }
            },
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": special["unknown"]},
    }
    for name, content in [
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
        ("tokenizer.json", tokenizer),
    ]:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def write_safetensors(weights, path):
    """The safetensors format: header length, JSON header, raw little-endian bf16 data.

    The tied lm_head is left out, as Hugging Face does.
    """
    header, parts, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name in sorted(weights):
        tensor = weights[name].detach().bfloat16().contiguous()
        data = tensor.view(torch.int16).numpy().astype("<i2").tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="needle-model", help="folder of the trained model")
    parser.add_argument("--seed", type=int, default=1, help="of the start and of all data")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps")
    parser.add_argument("--decay-steps", type=int, default=330, help="of these, at falling rate")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel, one batch each")
    parser.add_argument("--threads", type=int, default=2, help="of all processes together")
    parser.add_argument("--port", type=int, default=29517, help="local port the processes meet at")
    parser.add_argument("--checkpoints", help="folder for a checkpoint every 200 steps")
    parser.add_argument("--resume", help="checkpoint to go on from (before its decay began)")
    parser.add_argument(
        "--dialect", default=REPOSITORY / "models/needle/dialect.json", help="the language"
    )
    parser.add_argument(
        "--description-only", action="store_true", help="write all files but the weights, then stop"
    )
    options = parser.parse_args()
    if options.description_only:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_description(Dialect(options.dialect), folder)
    elif options.processes > 1:
        torch.multiprocessing.spawn(train, args=(options,), nprocs=options.processes)
    else:
        train(0, options)


if __name__ == "__main__":
    main()
