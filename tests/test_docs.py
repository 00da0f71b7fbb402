"""Tests of the documentation: pages are reachable in reading order, links resolve, headings have one style."""

import re
import subprocess
from pathlib import Path

import pytest

from ablation.spec import JobSpec

ROOT = Path(__file__).parent.parent
START = "docs/00-overview.md"
NAME = "weight-ablation"
FOREIGN = ("DESIGN" + ".md", "STYLE" + ".md")  # pages that are not in the repository, so nothing may cite them
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)


def files(*patterns: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return [name for name in listed if (ROOT / name).is_file()]


def links(page: str, text: str) -> list[str]:
    """The targets of a page's relative links, as paths below the root of the repository."""
    targets = [link.split("#")[0] for link in LINK.findall(without_code(text)) if "://" not in link]
    places = [(ROOT / page).parent.joinpath(target).resolve() for target in targets if target]
    return [place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else str(place) for place in places]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def heading_faults(text: str) -> list[str]:
    """Headings that break the style: one title, levels without a gap, sentence case, no number, no full stop."""
    found = [(len(marks), title) for marks, title in HEADING.findall(without_code(text))]
    faults = [] if [level for level, _ in found].count(1) == 1 and found[0][0] == 1 else ["not one title, on top"]
    before = 1
    for level, title in found:
        words = re.sub(r"`[^`]*`", "", title)
        if level > before + 1:
            faults.append(f"{title}: a level is left out")
        if re.match(r"\d+\. ", title) and not re.match(r"\d{4}\. ", title):
            faults.append(f"{title}: numbered")
        if title != NAME and (title[-1] in ".?!:" or (title[0] != "`" and words.lstrip("0123456789. ")[:1].islower())):
            faults.append(f"{title}: not in sentence case, or with a mark at its end")
        before = level
    return faults


def test_every_page_is_reachable_from_the_overview_in_reading_order() -> None:
    reached = [START]
    for page in reached:  # grows while it is walked
        for target in links(page, (ROOT / page).read_text("utf-8")):
            if target.startswith("docs/") and target.endswith(".md") and target not in reached:
                reached.append(target)
    pages = files("docs/*.md", "docs/**/*.md")
    assert sorted(set(pages) - set(reached)) == []
    numbered = [page for page in reached if re.match(r"docs/\d\d-", page)]
    assert numbered == sorted(numbered)


@pytest.mark.parametrize("page", files("*.md"))
def test_every_link_leads_somewhere(page: str) -> None:
    assert [link for link in links(page, (ROOT / page).read_text("utf-8")) if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", files("*.md"))
def test_headings_have_one_style(page: str) -> None:
    assert heading_faults((ROOT / page).read_text("utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "no title",
        "# One\n# Two",
        "# One\n### Three",
        "# 1. One",
        "# One.",
        "# One\n## what comes next",
        "## Two\n# One",
    ],
)
def test_a_heading_of_another_style_is_found(text: str) -> None:
    assert heading_faults(text)


def test_a_link_to_nothing_is_found() -> None:
    target, beyond = links(START, "[a](nowhere.md#part) ```\n[b](https://example.org) [c](../README.md)")
    assert not (ROOT / target).exists()
    assert (ROOT / beyond).exists()


def test_the_page_of_the_service_has_every_field_of_a_job_spec() -> None:
    page = (ROOT / "docs/04-service.md").read_text("utf-8")
    table = page.split("## Job spec")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(JobSpec.model_fields)


def missing_files(text: str, known: list[str]) -> list[str]:
    """Code files that a page names and that don't exist; a name may leave out the folders it begins with."""
    named = re.findall(r"`([\w/]+\.(?:py|jsonl))", text)
    return [name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in known)]


@pytest.mark.parametrize("page", files("*.md"))
def test_every_code_file_that_a_page_names_exists(page: str) -> None:
    assert missing_files((ROOT / page).read_text("utf-8"), files()) == []


def test_a_code_file_that_does_not_exist_is_found() -> None:
    assert missing_files("`a/b.py`, `b.py` and `c/b.py`, `b.py::f`", ["a/b.py"]) == ["c/b.py"]


@pytest.mark.parametrize("line", ["# DESIGN" + ".md 3.4", "see STYLE" + ".md"])
def test_a_citation_of_a_foreign_page_is_found(line: str) -> None:
    assert cites_foreign(line)


def cites_foreign(text: str) -> bool:
    return any(name in text for name in FOREIGN)


def test_nothing_outside_the_repository_is_cited() -> None:
    texts = {name: (ROOT / name).read_text("utf-8", errors="ignore") for name in files()}
    assert sorted(name for name, text in texts.items() if cites_foreign(text)) == []


def test_the_changelog_begins_with_this_version_or_with_what_is_unreleased() -> None:
    titles = [title for marks, title in HEADING.findall((ROOT / "CHANGELOG.md").read_text("utf-8")) if marks == "##"]
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    released = [title for title in titles if title != "Unreleased"]
    assert titles in (released, ["Unreleased", *released])
    assert re.fullmatch(rf"{re.escape(version[1])} \(\d{{4}}-\d\d-\d\d\)", released[0])


def test_every_list_of_changes_is_added_changed_or_fixed() -> None:
    found = {title for marks, title in HEADING.findall((ROOT / "CHANGELOG.md").read_text("utf-8")) if marks == "###"}
    assert found <= {"Added", "Changed", "Fixed", "Removed"}
    assert found
