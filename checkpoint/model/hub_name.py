"""Names of models on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError, ConfigError

__all__ = ["HubName", "with_revision"]

_HUB_NAME = re.compile(
    r"(?:hf\.co/|https://huggingface\.co/)?"
    r"(?P<repo>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)"
    r"(?:@(?P<revision>[A-Za-z0-9][\w.-]*(?:/[\w.-]+)*?))?"
    r"(?::(?P<tag>[\w.-]+)|/(?P<file>\w[^:@]*\.[A-Za-z]\w*))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class HubName:
    """Name of a model on the Hugging Face Hub, as llama.cpp's ``-hf``, Ollama and the Hub's own addresses write it.

    Attributes:
        repo: ``ORG/NAME``, or a name alone.
        revision: Branch, tag or commit after ``@``; None for the main branch.
        tag: What a file's name ends in, after ``:``, as ``Q4_K_M``; in any case, as there.
        file: File in the repository, after ``/``.
    """

    repo: str
    revision: str | None = None
    tag: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubName | None:
        """Read ``[hf.co/]ORG/NAME[@REVISION][:TAG or /FILE]``; None for anything else."""
        match = _HUB_NAME.fullmatch(name)
        if match is None or ".." in Path(name).parts:
            return None
        return cls(match["repo"], match["revision"], match["tag"], match["file"])

    def find(self, names: Sequence[str], suffixes: Sequence[str]) -> list[str]:
        """Return the model's files among those of its repository: one, or the parts of one.

        Args:
            names: Names of all files.
            suffixes: Endings of models in one file.

        Raises:
            CheckpointError: There is none, or several.
        """
        models = sorted(name for name in names if name.lower().endswith(tuple(suffixes)) and "mmproj" not in name)
        found = [name for name in models if self._means(name)]
        if len({_whole(name) for name in found}) == 1:
            return found
        got = "several" if found else "none of this name"
        listed = ", ".join(found or models) or "no such files at all"
        raise CheckpointError(
            f"{self.repo}: one file is needed. Got {got}: {listed:.600}. Name it as {self.repo}:TAG, for example "
            f":Q4_K_M, or {self.repo}/FILE."
        )

    def _means(self, name: str) -> bool:
        if self.file is not None:
            return _whole(name) == _whole(self.file)
        tag = re.escape(str(self.tag))
        return self.tag is None or re.search(rf"(^|[-._/]){tag}$", _whole(name), re.IGNORECASE) is not None


def _whole(name: str) -> str:
    # Without its suffix, and without the number of a part.
    return re.sub(r"(-\d{5}-of-\d{5})?\.\w+$", "", name, flags=re.ASCII)


def with_revision(model: str, revision: str | None) -> str:
    """Return a Hub id that names a revision.

    Args:
        model: As in ``resolve_model``.
        revision: Branch, tag or commit; None changes nothing.

    Raises:
        ConfigError: The model is a local directory, or names a revision itself.
    """
    if revision is None:
        return model
    if Path(model).exists() or "@" in model:
        got = "a revision in the name" if "@" in model else "a local directory"
        raise ConfigError(f"--revision: has no effect. Got {got}. Expected the Hub id of a model. Leave it out.")
    return f"{model}@{revision}"
