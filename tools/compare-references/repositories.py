"""The public implementations that policies are compared with, and how their code is imported."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

# Before any stand-in: it asks which packages there are.
import transformers.models.llama.modeling_llama  # noqa: F401


class WrongFolder(Exception):
    """What was given is no checkout of a reference."""


@dataclass(frozen=True)
class Repository:
    """A public repository, and the file of it that selects."""

    name: str
    commit: str
    """The commit that the adapters below were written for."""
    file: str
    unused: tuple[str, ...] = ()
    """Packages that it imports and that its selection does not use."""

    @property
    def folder(self) -> str:
        return self.name.split("/")[1]

    def load(self, references: Path) -> ModuleType:
        """Imports the file from its folder below `references`."""
        root = references / self.folder
        path = root / self.file
        if not path.is_file():
            raise WrongFolder(f"{root} has no {self.file}: it is no checkout of {self.name}")
        absent = [package for package in self.unused if package not in sys.modules]
        sys.modules.update({package: MagicMock() for package in absent})
        try:
            return self._import(root, path)
        finally:
            for package in absent:
                del sys.modules[package]

    def _import(self, root: Path, path: Path) -> ModuleType:
        package = self.file.split("/")[0]
        if self.folder == "kvpress":
            # Its __init__ imports what only its pipelines need.
            sys.modules[package] = namespace = ModuleType(package)
            namespace.__path__ = [str(root / package)]
        sys.path.insert(0, str(root))
        if package in ("kvpress", "pastalib"):
            return importlib.import_module(self.file.removesuffix(".py").replace("/", "."))
        spec = importlib.util.spec_from_file_location("reference_" + path.stem, path)
        assert spec and spec.loader
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def found_commit(self, references: Path) -> str | None:
        """The commit that is checked out, if git can tell."""
        root = references / self.folder
        if not (root / ".git").exists():
            return None
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


FASTKV = Repository("dongwonjo/FastKV", "b9787691535717c9ef39156b0fee8542c822df65", "baselines/fastkv/utils.py")
SNAPKV = Repository(
    "FasterDecoding/SnapKV", "e216ddc84c5bd210378cbdbbba12ba02102aa640", "snapkv/monkeypatch/snapkv_utils.py"
)
FACTORY = Repository(
    "Zefan-Cai/KVCache-Factory", "c97f9d706d63d1b56e980f8b81b2a924c21162b3", "pyramidkv/pyramidkv_utils.py"
)
ADAKV = Repository(
    "FFY0/AdaKV", "efe4e2eea0099bf497f0c175ac5440a915d89f83", "adaptive_snapkv/monkeypatch/snapkv_utils.py",
    unused=("flash_attn",),
)
HEADKV = Repository("FYYFU/HeadKV", "0862a0955fe82e9ff611d59541918e02c5def625", "headkv/snapkv_utils.py")
HEAD_CODE = (
    *("source", "source.modeling_llama", "source.modeling_mistral", "source.modeling_mixtral"),
    *("ipdb", "metrics", "rouge_score"),
)
RETRIEVAL = Repository(HEADKV.name, HEADKV.commit, "Important_Head/retrieval_head_detection.py", HEAD_CODE)
REASONING = Repository(HEADKV.name, HEADKV.commit, "Important_Head/retrieval_head_detection_r2.py", HEAD_CODE)
GEMFILTER = Repository(
    "SalesforceAIResearch/GemFilter",
    "5f79b1a15b4b281ddfc5d423009915eeab257d97",
    "my_baseline/GemFilter/gem_filter_utils.py",
)
GEMFILTER_H2O = Repository(GEMFILTER.name, GEMFILTER.commit, "my_baseline/H2O/utils_h2o.py")
PYRAMIDINFER = Repository(
    "mutonix/pyramidinfer", "61ac641573389bdb7f7def82174c02e3459572ec", "models/modeling_llama_pyramidinfer.py"
)
COLD_COMPRESS = Repository("AnswerDotAI/cold-compress", "15bb3005c5661e0d97e295c71c6e5fced1a863cc", "cache.py")
PASTA = Repository(
    "QingruZhang/PASTA", "56a9138d2d071c9ab2860c72be596da9723ca793", "pastalib/pasta.py", unused=("datasets",)
)
KVPRESS = "NVIDIA/kvpress", "8bb29b9c3078452a86d692f29123fa6c793e2b05"
KVPRESS_SNAPKV = Repository(*KVPRESS, "kvpress/presses/snapkv_press.py")
KVPRESS_PYRAMIDKV = Repository(*KVPRESS, "kvpress/presses/pyramidkv_press.py")
KVPRESS_STREAMING = Repository(*KVPRESS, "kvpress/presses/streaming_llm_press.py")
