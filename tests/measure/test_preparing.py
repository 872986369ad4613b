"""Formats whose tools are missing are left out of a measurement, as long as another is left."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bpwise.checkpoint.files.resume import ResumeStore, RunArtifacts
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.errors import BpwiseError, BpwiseWarning, WorkDirectoryError
from bpwise.measure.preparing import prepared_curves
from bpwise.progress import silent

from ..measured import Given


@dataclass
class Refused:
    """A format that cannot be prepared."""

    error: BpwiseError

    def prepare(self, work: Path, progress: Any, measurement: Path | None = None) -> tuple[()]:
        raise self.error

    def curves(self) -> Exl2Curves:
        raise AssertionError("was not prepared")


class Prepared(Given):
    """A format that keeps something in the work directory."""

    def prepare(self, work: Path, progress: Any, measurement: Path | None = None) -> Any:
        ResumeStore(work, "step", {"a": 1})
        return (("step", {"a": 1}),)


def test_one_that_is_left_is_measured(tmp_path: Path) -> None:
    maker, artifacts = Exl2Curves(), RunArtifacts(tmp_path)
    formats = {"other": Refused(BpwiseError("tool: not there. Install it.")), "exl2": Prepared(maker)}
    with pytest.warns(BpwiseWarning, match=r"other: not measured\. tool: not there\. Install it\."):
        assert prepared_curves(formats, tmp_path / "m", tmp_path, artifacts, silent) == [maker]
    assert len(list(tmp_path.iterdir())) == 1
    artifacts.discard()  # it was named
    assert list(tmp_path.iterdir()) == []


def test_without_any_the_reason_is_the_error(tmp_path: Path) -> None:
    formats = {"other": Refused(BpwiseError("tool: not there. Install it."))}
    with pytest.raises(BpwiseError, match="tool: not there"):
        prepared_curves(formats, tmp_path / "m", tmp_path, RunArtifacts(tmp_path), silent)


def test_a_full_disk_is_no_missing_tool(tmp_path: Path) -> None:
    formats = {"other": Refused(WorkDirectoryError("x: full. Clear it.")), "exl2": Given(Exl2Curves())}
    with pytest.raises(WorkDirectoryError, match="full"):
        prepared_curves(formats, tmp_path / "m", tmp_path, RunArtifacts(tmp_path), silent)
