"""Uploads of quantized models to the Hugging Face Hub: which files, under which name, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.files.paths import companion
from ...checkpoint.files.side_files import CARD_NAME, TEMPLATE_DIRECTORY, is_side_file
from ...checkpoint.source.hub import confined_file, list_directory
from ...convert.format import Format
from ...convert.names import HUB_ID, RATE, RECIPE_FILE, REPO, NameParts
from ...convert.registry import format_of, formats, require_format
from ...errors import CheckpointError, PublishError
from ...tables import bytes_text
from .cards import card_path
from .front import CHART_NAME, FrontPage, Size, branch_link, front_page
from .mark import read_mark
from .published import published_sizes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Upload", "find_outputs", "plan_uploads", "push_model", "upload_model"]

_PUBLISHED = (CARD_NAME, RECIPE_FILE, "report.*")
"""What is published beside a model's own files and its side files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """One commit to the Hub.

    Attributes:
        output: The model's directory or file.
        repo: Hub id of the repository.
        branch: Branch of it; None for the main one.
        files: Path in the repository, and the file here.
        left_out: Names in the directory that are not published.
        page: A front page, which no file holds; None for none.
    """

    output: Path
    repo: str
    branch: str | None
    files: tuple[tuple[str, Path], ...]
    left_out: tuple[str, ...]
    page: FrontPage | None = None

    @property
    def total_bytes(self) -> int:
        """Size of all files, the front page included."""
        return sum(path.stat().st_size for _, path in self.files) + sum(map(len, self.pages().values()))

    def contents(self) -> Iterator[tuple[str, str | bytes]]:
        """Yield the path in the repository and the path here, or the content of what is made for the repository."""
        yield from self.pages().items()
        for name, path in self.files:
            card = path.read_bytes() if name.endswith(CARD_NAME) else b""
            told = card.replace(REPO.encode(), self.repo.encode())  # commands in it name the repository
            yield name, str(path) if told == card else told

    def pages(self) -> dict[str, bytes]:
        """Return the files of the front page: their content by name."""
        if self.page is None:
            return {}
        pages = {CARD_NAME: self.page.text.replace(REPO, self.repo).encode(), CHART_NAME: self.page.chart}
        return {name: content for name, content in pages.items() if content}

    def summary_lines(self) -> list[str]:
        """Return what would be uploaded, as lines for a terminal."""
        where = f"{self.repo}{f', branch {self.branch}' if self.branch else ''}"
        lines = [f"{self.output} -> https://huggingface.co/{where}: {bytes_text(self.total_bytes)}"]
        if not any(".report." in f".{name}" for name, _ in self.files) and len(self.files) > 1:
            lines.append("  warning: it was not compared with the original")
        lines += [f"  {name}  {bytes_text(path.stat().st_size)}" for name, path in self.files]
        lines += [f"  {name}  {bytes_text(len(content))}, the front page" for name, content in self.pages().items()]
        return [*lines, *(f"  not published: {name}" for name in self.left_out)]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in types that JSON has."""
        return {
            "model": str(self.output),
            "repo": self.repo,
            "branch": self.branch,
            "total_bytes": self.total_bytes,
            "files": [
                *({"name": name, "path": str(path), "bytes": path.stat().st_size} for name, path in self.files),
                *({"name": name, "path": None, "bytes": len(content)} for name, content in self.pages().items()),
            ],
            "not_published": list(self.left_out),
        }


def find_outputs(path: Path) -> list[Path]:
    """Return the models of a path: itself, or those that a series made in it.

    Raises:
        PublishError: There is none.
        FormatError: A safetensors file is damaged.
        CheckpointError: A safetensors file is a link that leads outside.
    """
    if format_of(path) is not None:
        return [path]
    found = [each for each in sorted(path.iterdir()) if format_of(each) is not None] if path.is_dir() else []
    if not found:
        titles = ", ".join(each.title for each in formats().values())
        raise PublishError(
            f"{path}: no quantized model. Expected one of the formats {titles}, or a folder of them."
            " Choose another name."
        )
    companions = {each for output in found for each in require_format(output).companions(output)}
    return [output for output in found if output not in companions]


def plan_uploads(outputs: Sequence[Path], target: str, *, by_branch: bool = False) -> list[Upload]:
    """Say what goes where; everything is verified first.

    Names by convention: a directory ``ORG/Llama-3.2-1B-8.0bpw-8hb-exl2``, or with branches ``ORG/Llama-3.2-1B-exl2``
    and its branch ``8.0bpw``; files all in ``ORG/Llama-3.2-1B-GGUF``, or with branches in one each. Where a main
    branch would have no card, its front page shows all models that go there.

    Args:
        outputs: Quantized models of any format.
        target: ``ORG/NAME``, or ``ORG/`` to name by convention.
        by_branch: One repository with a branch for each bitrate, instead of a repository for each.

    Raises:
        PublishError: A model is marked as broken or cannot be verified, has no card, or two would have the same place.
        BpwiseError: As ``verify_model``.
    """
    owner, _, name = target.partition("/")
    if not HUB_ID.fullmatch(target if name else f"{target}NAME"):
        raise PublishError(
            f"{target}: not the name of a repository. Expected ORG/NAME, or ORG/ for a conventional name. Change it."
        )
    for output in outputs:
        _check(output)
    uploads = [_upload(output, owner, name, by_branch) for output in outputs]
    uploads = _front_pages(uploads) + uploads
    places: dict[tuple[str, str | None, str], Path] = {}
    for upload in uploads:
        for file, path in upload.files:
            taken = places.setdefault((upload.repo, upload.branch, file), path)
            if taken != path:
                raise PublishError(
                    f"{upload.output}: would replace {taken} as {file} in {upload.repo}. Use --branch, or ORG/ to "
                    "give each a repository of its own."
                )
    return uploads


def push_model(
    output: str | Path, target: str, *, by_branch: bool = False, public: bool = False, api: HfApi | None = None
) -> list[str]:
    """Upload quantized models to the Hugging Face Hub; everything is verified first.

    Args:
        output: A quantized model of any format, or a folder of several.
        target: ``ORG/NAME``, or ``ORG/`` to name repositories by convention.
        by_branch: One repository with a branch for each bitrate, instead of a repository for each.
        public: Whether new repositories are public. Existing public ones are not written to unless this is set.
        api: The Hub's client; None uses the stored login.

    Returns:
        The addresses of the commits.

    Raises:
        PublishError: As ``find_outputs``, ``plan_uploads`` and ``upload_model``.
        BpwiseError: As ``verify_model``.

    Example:
        ``push_model("llama-6bpw", "me/")`` uploads a model, privately. What would be uploaded:

        >>> from pathlib import Path
        >>> from bpwise.eval.publishing.push import plan_uploads
        >>> (upload,) = plan_uploads([Path("llama-6bpw")], "me/")
        >>> upload.repo
        'me/llama-6.0bpw-exl2'
    """
    uploads = plan_uploads(find_outputs(Path(output)), target, by_branch=by_branch)
    return [upload_model(each, public=public, api=api) for each in uploads]


def upload_model(upload: Upload, *, public: bool = False, api: HfApi | None = None) -> str:
    """Upload one model in one commit; repository and branch are made if they are missing.

    A front page lists the models that the repository has already, too.

    Args:
        upload: What, and where.
        public: Whether a new repository is public. An existing public one is not written to unless this is set.
        api: The Hub's client; None uses the stored login.

    Returns:
        The address of the commit.

    Raises:
        PublishError: The Hub refuses, or cannot be reached; or the repository is public and ``public`` is not set.
    """
    # Imported here: planning needs no network stack.
    from huggingface_hub import CommitOperationAdd, HfApi  # noqa: PLC0415

    api = api or HfApi()
    try:
        api.create_repo(upload.repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(upload.repo).private:
            raise PublishError(
                f"{upload.repo}: is public already. Expected a private one. Add --public to publish there."
            )
        if upload.branch is not None:
            api.create_branch(upload.repo, branch=upload.branch, exist_ok=True)
        upload = _with_published(upload, api)
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in upload.contents()]
        commit = api.create_commit(
            upload.repo, operations, commit_message=f"Upload {upload.output.name}", revision=upload.branch
        )
    except PublishError:
        raise
    except Exception as cause:  # an answer may be anything, and the Hub's client raises what it will of it
        raise PublishError(
            f"{upload.repo}: not uploaded ({type(cause).__name__}: {cause}). Run `hf auth login`, check the name and "
            "your rights to it, and run the same command again."
        ) from cause
    return str(commit.commit_url)


def _with_published(upload: Upload, api: HfApi) -> Upload:
    if upload.page is None:
        return upload
    by_branch = upload.page.sizes[0].link != upload.output.name
    published = published_sizes(api, upload.repo, require_format(upload.output), by_branch=by_branch)
    return replace(upload, page=upload.page.with_published(published))


def _check(output: Path) -> None:
    reason = read_mark(output)
    if reason is not None:
        raise PublishError(f"{output}: not published, it is marked as broken. {reason}")
    if not card_path(output).is_file():
        raise PublishError(
            f"{output}: not published, it has no model card {card_path(output).name}. Run `bpwise card {output.name} "
            "--original MODEL`, or finish the run."
        )
    format_ = require_format(output)
    if not format_.verify(output).compared and format_.keeps_digests:
        raise PublishError(
            f"{output}: not published, it does not say what it must decode to, so it cannot be verified. Quantize it "
            "with bpwise."
        )


def _upload(output: Path, owner: str, name: str, by_branch: bool) -> Upload:
    format_ = require_format(output)
    parts = _named(output, format_)
    alone = not format_.suffix  # directories do not share a repository
    tag = format_.name if alone else format_.title
    if name:
        repo = f"{owner}/{name}"
    elif alone and not by_branch:
        repo = f"{owner}/{'-'.join((parts.base, parts.size, *(each for each in parts.more if each != tag), tag))}"
    else:
        repo = f"{owner}/{parts.base}-{tag}"
    if not HUB_ID.fullmatch(repo):
        raise PublishError(f"{repo}: not a name that the Hub takes. Give one, as ORG/NAME.")
    if alone:
        files, left_out = _directory_files(output, format_)
    else:
        beside = sorted(output.parent.glob(f"{output.stem}.report.*"))
        beside += filter(Path.is_file, [companion(output, RECIPE_FILE)])
        files, left_out = [(path.name, path) for path in (output, *format_.companions(output), *beside)], []
        card = card_path(output)
        files.append((CARD_NAME if by_branch else card.name, card))
    return Upload(
        output=output,
        repo=repo,
        branch=parts.size if by_branch else None,
        files=tuple(files),
        left_out=tuple(left_out),
    )


def _front_pages(uploads: Sequence[Upload]) -> list[Upload]:
    """Return a front page for every repository whose main branch gets no card."""
    with_page = {each.repo for each in uploads if each.branch is None and CARD_NAME in dict(each.files)}
    missing: dict[str, list[Upload]] = {}
    for each in uploads:
        if each.repo not in with_page:
            missing.setdefault(each.repo, []).append(each)
    return [
        replace(group[0], branch=None, files=(), left_out=(), page=_front_page(group)) for group in missing.values()
    ]


def _front_page(group: Sequence[Upload]) -> FrontPage:
    first = group[0].output
    base = _named(first, require_format(first)).base
    return front_page(base, first, list(map(_size, group)))


def _size(upload: Upload) -> Size:
    label = _named(upload.output, require_format(upload.output)).label
    if upload.branch is None:
        return Size.of(upload.output, upload.output.name, label)
    return Size.of(upload.output, branch_link(upload.repo, upload.branch), None)


def _named(output: Path, format_: Format) -> NameParts:
    name = output.stem if format_.suffix else output.name
    parts = format_.name_parts(name)
    if parts is None and not format_.suffix:
        # The card's title has the original's name, and the model its rate.
        text = card_path(output).read_text(encoding="utf-8", errors="replace")
        title = re.search(r"^# (\S+)$", text, re.MULTILINE)
        base = name if title is None else RATE.sub("", title[1])
        parts = format_.name_parts(format_.card(format_.open(output), base).name)
    if parts is None:
        raise PublishError(f"{output}: its name tells no size. Expected one as NAME-4.5bpw or NAME-Q4_K_M. Rename it.")
    return parts


def _directory_files(output: Path, format_: Format) -> tuple[list[tuple[str, Path]], list[str]]:
    entries = list_directory(output)
    templates = output / TEMPLATE_DIRECTORY
    if templates.is_dir():
        entries = [path for path in entries if path != templates] + list_directory(templates)
    files, left_out = [], []
    for path in entries:
        name = path.relative_to(output).as_posix()
        published = is_side_file(name) or any(
            fnmatchcase(name, pattern) for pattern in (*format_.own_files, *_PUBLISHED)
        )
        if published and not path.is_dir():
            if path.is_symlink():
                raise CheckpointError(f"{path}: is a link. Expected a file. Replace it by what it points to.")
            files.append((name, confined_file(output, name)))
        else:
            left_out.append(name)
    return files, left_out
