#!/usr/bin/env python3
"""Compares what each policy keeps with what its public implementation keeps, on tiny random models.

    python3 -m venv venv && venv/bin/pip install -r tools/compare-references/requirements.txt
    venv/bin/python tools/compare-references/compare.py --references DIR

DIR holds checkouts, each in a folder of the repository's name; nothing is fetched. One that is not there is left
out. For each layer and kv head of several models the program `fastkv` and the reference, in float32 on the CPU and
given the same queries and keys, choose positions; a set may differ where the scores of all that differs are equal
up to rounding. Exit code 1 says that a set differs otherwise, 2 that something was wrong with the call.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import heads
from checks import CHECKS, AnyCheck, Check, HeadCheck, LogitCheck, prompt
from model import Model
from references import BUDGET, WINDOW, head_scores
from repositories import Repository, WrongFolder

TOLERANCE = 1e-4
"""Scores that differ by less, as a share of the larger one, are tied: both sides got there through layers of f32."""
LOGIT_TOLERANCE = 1e-4
"""Of the largest logit."""
SCORE_TOLERANCE = 1e-4
"""Of a head's score, which is at most about 1."""


@dataclass
class Result:
    """How one check came out, over all layers, heads and models."""

    policy: str
    reference: str
    commit: str
    group: int
    options: str
    remark: str
    equal: int = 0
    tied: int = 0
    different: int = 0

    def compare(self, ours: Sequence[int], theirs: Sequence[int], scores: Tensor, tie_of_heads: bool = False) -> None:
        """Two sets of rows, and the scores of all rows; whether heads tie for how many rows each has."""
        if sorted(ours) == sorted(theirs):
            self.equal += 1
            return
        tied = tie_of_heads
        if len(ours) == len(theirs):
            marks = scores[sorted(set(ours) ^ set(theirs))]
            tied |= bool(marks.max() - marks.min() <= TOLERANCE * marks.abs().max())
        self.tied += tied
        self.different += not tied


class Program:
    """The program under test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def inspect(self, model: Path, ids: Tensor, policy: str, options: list[str]) -> dict:
        tokens = model / "prompt.json"
        tokens.write_text(json.dumps(ids.tolist()))
        files = ["--device", "cpu", "--model", str(model), "--tokens", str(tokens)]
        return json.loads(self.run("inspect", *files, "--policy", policy, *options))

    def run(self, *arguments: str) -> str:
        result = subprocess.run([self.path, *arguments], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            sys.exit(f"{self.path} {' '.join(arguments)}\n{result.stderr}")
        return result.stdout


@dataclass(frozen=True)
class Sample:
    model: Model
    directory: Path
    ids: Tensor


def compare_sets(check: Check, module: ModuleType, program: Program, sample: Sample, result: Result) -> None:
    model, directory, ids = sample.model, sample.directory, sample.ids
    options = list(check.options)
    if check.policy == "headkv":
        scores_file = directory / "heads.json"
        scores_file.write_text(json.dumps(head_scores(check.shape)))
        options += ["--heads", str(scores_file)]
    ours = program.inspect(directory, ids, check.policy, options)
    select = check.begin(module, model, ids, directory)
    hidden, positions = model.embed(ids), torch.arange(len(ids))
    for index in range(check.shape.layers):
        layer = model.layer(index, hidden, ids[positions], positions)
        row_of = {position: row for row, position in enumerate(positions.tolist())}
        theirs = select(layer)
        if theirs is not None:
            scores = check.rank(layer)
            tie_of_heads = check.policy == "adakv" and heads_tie(scores)
            for head, kept in enumerate(theirs.kept):
                rows = [row_of[position] for position in ours["kept"][index][head]]
                result.compare(rows, kept, scores[head], tie_of_heads)
        hidden = model.finish(layer, hidden)
        propagated = ours["propagated"][index]
        if theirs is not None and (propagated is not None or theirs.go_on is not None):
            rows = [row_of[position] for position in propagated or positions.tolist()]
            result.compare(rows, theirs.go_on or list(range(len(positions))), scores.sum(0))
        if propagated is not None:
            passed = torch.tensor([row_of[position] for position in propagated])
            hidden, positions = hidden[passed], positions[passed]
    if check.policy != "gemfilter":
        result.different += not close(model.logits(hidden[-1:])[0], ours["logits"])


def compare_logits(check: LogitCheck, module: ModuleType, program: Program, sample: Sample, result: Result) -> None:
    ours = program.inspect(sample.directory, sample.ids, "full", check.options)
    equal = close(check.logits(module, sample.ids, sample.directory), ours["logits"])
    result.equal += equal
    result.different += not equal


def compare_heads(module: ModuleType, program: Program, result: Result) -> None:
    ours, theirs = heads.scored(module, program.run)
    for head in ours.keys() | theirs.keys():
        one, other = torch.tensor(ours.get(head, [])), torch.tensor(theirs.get(head, []))
        equal = one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=SCORE_TOLERANCE)
        result.equal += equal
        result.different += not equal


def heads_tie(scores: Tensor) -> bool:
    """Whether the last of the scores that heads share a budget for could be another head's."""
    older = scores[:, :-WINDOW]
    last = older.flatten().topk(len(older) * (BUDGET - WINDOW)).values[-1]
    return int(((older - last).abs() <= TOLERANCE * last).any(1).sum()) > 1


def close(theirs: Tensor, ours: list[float]) -> bool:
    return bool((theirs - torch.tensor(ours)).abs().max() <= LOGIT_TOLERANCE * theirs.abs().max())


def run(check: AnyCheck, references: Path, program: Program, seeds: int) -> Result:
    repository = check.repository
    commit = repository.found_commit(references)
    options = " ".join(check.options)
    result = Result(check.policy, repository.name, commit or "unknown", check.shape.group, options, check.remark)
    module = repository.load(references)
    if isinstance(check, HeadCheck):
        compare_heads(module, program, result)
        return result
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as temporary:
            model = Model(check.shape, seed)
            directory = Path(temporary) / "model"
            model.save(directory)
            sample = Sample(model, directory, prompt(seed))
            if isinstance(check, Check):
                compare_sets(check, module, program, sample, result)
            else:
                compare_logits(check, module, program, sample, result)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=repositories(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--references", type=Path, required=True, metavar="DIR", help="folder with the checkouts")
    parser.add_argument("--program", type=Path, default=default_program(), help="fastkv [default: %(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="models and prompts of each check [default: %(default)s]")
    parser.add_argument("--json", action="store_true", help="print a JSON array instead of lines")
    arguments = parser.parse_args()
    if not arguments.program.is_file():
        parser.error(f"--program {arguments.program} is no file: cargo build makes target/debug/fastkv")
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: give at least 1")
    checks = [check for check in CHECKS if (arguments.references / check.repository.folder).is_dir()]
    if not checks:
        parser.error(f"--references {arguments.references} has no folder of a reference, such as SnapKV")
    torch.set_grad_enabled(False)
    results, failures = [], []
    for check in checks:
        try:
            results.append(run(check, arguments.references, Program(arguments.program), arguments.seeds))
        except WrongFolder as error:
            parser.error(str(error))
        except ImportError as error:
            failures.append(f"{check.policy}: {check.repository.name} cannot be imported: {error}")
            continue
        if not arguments.json:
            print(line(results[-1], check.repository), flush=True)
    absent = sorted({check.repository.name for check in CHECKS if check not in checks})
    failures += [f"{name} is not there" for name in absent]
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    for failure in failures:
        print(f"not compared: {failure}", file=sys.stderr)
    return int(any(result.different for result in results) or not results)


def line(result: Result, repository: Repository) -> str:
    found = "" if result.commit == repository.commit else f" at {result.commit[:12]}, not {repository.commit[:12]}"
    counts = f"{result.equal} equal, {result.tied} equal but for ties, {result.different} different"
    remark = f" ({result.remark})" if result.remark else ""
    policy = f"{result.policy} {result.options}".rstrip()
    return f"{policy}\n    {result.reference}{found}, G = {result.group}: {counts}{remark}"


def repositories() -> str:
    known = {check.repository.name: check.repository.commit for check in CHECKS}
    lines = "\n".join(f"  {name:<36}{commit}" for name, commit in known.items())
    return (
        f"the public repositories, and the commits the adapters are written for:\n{lines}\n\n"
        "Left out: FastKV's own H2O, which is not causal; machilusZ/FastGen, which has no code and names\n"
        "AnswerDotAI/cold-compress; kvpress's AdaKV and observed attention, which are other rules."
    )


def default_program() -> Path:
    target = Path(__file__).resolve().parents[2] / "target"
    built = [path for path in (target / "release" / "fastkv", target / "debug" / "fastkv") if path.is_file()]
    return max(built, key=lambda path: path.stat().st_mtime, default=target / "debug" / "fastkv")


if __name__ == "__main__":
    sys.exit(main())
