"""What a package index is told, and what the extras bring."""

import re
from email.message import Message
from importlib.metadata import PackageMetadata
from pathlib import Path

import pytest
from build.util import project_wheel_metadata
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def metadata() -> PackageMetadata:
    """Metadata of the wheel."""
    return project_wheel_metadata(ROOT, isolated=False)


def values(metadata: PackageMetadata, key: str) -> list[str]:
    assert isinstance(metadata, Message)
    return [str(value) for value in metadata.get_all(key, [])]


def requirements(metadata: PackageMetadata, extra: str) -> dict[str, Requirement]:
    """What an extra brings beside the base install, by name."""
    found = [Requirement(text) for text in values(metadata, "Requires-Dist")]
    return {each.name.lower(): each for each in found if each.marker is not None and each.marker.evaluate({"extra": extra})}


def test_licence_and_links(metadata: PackageMetadata) -> None:
    assert values(metadata, "License-Expression") == ["MIT"]
    assert values(metadata, "License-File") == ["LICENSE"]
    assert not [text for text in values(metadata, "Classifier") if text.startswith("License")]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert values(metadata, "Version") == re.findall(r"^version: (.+)$", citation, re.MULTILINE)
    # A repository is named once it is published
    published = "repository-code" in citation
    names = {text.split(",")[0] for text in values(metadata, "Project-URL")}
    assert names == ({"Paper", "Homepage", "Issues", "Changelog"} if published else {"Paper"})


def test_every_extra_is_described_and_part_of_all(metadata: PackageMetadata) -> None:
    extras = values(metadata, "Provides-Extra")
    described = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "install.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(described) == sorted(extras)
    together = {name for extra in extras if extra != "all" for name in requirements(metadata, extra)}
    assert requirements(metadata, "all").keys() == together


@pytest.mark.parametrize("extra", ["safety", "all"])
def test_mujoco_stays_within_the_range_that_was_tested(metadata: PackageMetadata, extra: str) -> None:
    allowed = requirements(metadata, extra)["mujoco"].specifier
    assert all(version in allowed for version in ("3.1.0", "3.17.0", "4.0.0"))
    assert not any(version in allowed for version in ("3.0.1", "4.1.0"))


def test_the_constraints_fit(metadata: PackageMetadata) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = (line.split("==") for line in lines if not line.startswith("#"))
    versions = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned}
    for text in values(metadata, "Requires-Dist"):
        required = Requirement(text)
        assert versions[re.sub(r"[-_.]+", "-", required.name).lower()] in required.specifier, text
