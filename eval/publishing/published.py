"""Models that a repository on the Hub has already, for its front page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint.files.side_files import CARD_NAME
from ...checkpoint.model.hub_name import HubName
from ...convert.format import Format
from ...convert.names import REPORT_FILE
from ...errors import CheckpointError, FormatError
from .cards import ReportedComparison, read_report
from .front import Size, branch_link

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["published_sizes"]

_NAME = re.compile(r"[\w.-]+", re.ASCII)
"""Names that are shown: whoever may write to a repository may call files anything."""


def published_sizes(api: HfApi, repo: str, format_: Format, *, by_branch: bool) -> list[Size]:
    """Return the models of a repository, as its listing and their reports tell.

    Args:
        api: The Hub's client; raises what it will.
        repo: Hub id of the repository.
        format_: Format of the models.
        by_branch: Whether each has a branch of its own, instead of a file.
    """
    return list((_branches if by_branch else _files)(api, repo, format_))


def _files(api: HfApi, repo: str, format_: Format) -> Iterator[Size]:
    tree = _tree(api, repo, None)
    for card in tree:
        stem = card.removesuffix(f".{CARD_NAME}")
        name, parts = f"{stem}{format_.suffix}", format_.name_parts(stem)
        if name not in tree or parts is None or not _NAME.fullmatch(name):
            continue
        whole = format_.whole_path(Path(name))
        yield Size(
            name=name,
            link=name,
            label=parts.label,
            file_bytes=sum(size for each, size in tree.items() if format_.whole_path(Path(each)) == whole),
            measured=_report(api, repo, None, tree, f"{stem}.{REPORT_FILE}"),
            predicted_nats=None,
        )


def _branches(api: HfApi, repo: str, format_: Format) -> Iterator[Size]:
    for branch in (each.name for each in api.list_repo_refs(repo).branches):
        tree = _tree(api, repo, branch)
        weights = _weights(repo, tree, format_)
        report = next((name for name in tree if f".{name}".endswith(f".{REPORT_FILE}")), REPORT_FILE)
        if weights and CARD_NAME in tree and _NAME.fullmatch(branch) and branch != "main":
            yield Size(
                name=branch,
                link=branch_link(repo, branch),
                label=None,
                file_bytes=sum(tree[name] for name in weights),
                measured=_report(api, repo, branch, tree, report),
                predicted_nats=None,
            )


def _weights(repo: str, tree: Mapping[str, int], format_: Format) -> list[str]:
    # The one model of a branch; none where there are others.
    if not format_.suffix:
        return [name for name in tree if name.endswith(".safetensors")]
    with suppress(CheckpointError):
        return HubName(repo).find(list(tree), [format_.suffix])
    return []


def _tree(api: HfApi, repo: str, revision: str | None) -> dict[str, int]:
    # Sizes of the files at the top of a repository, by name; folders have none.
    found = ((each.path, getattr(each, "size", None)) for each in api.list_repo_tree(repo, revision=revision))
    return {path: size for path, size in found if isinstance(size, int)}


def _report(
    api: HfApi, repo: str, revision: str | None, tree: Mapping[str, int], name: str
) -> ReportedComparison | None:
    if name not in tree:
        return None
    with suppress(FormatError):  # of another version, or anything
        return read_report(Path(api.hf_hub_download(repo, name, revision=revision)))
    return None
