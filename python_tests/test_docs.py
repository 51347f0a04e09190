"""The documentation keeps up with the code: options are explained, links lead somewhere."""

import dataclasses
import re
from pathlib import Path

import pytest

from flame_ext.config import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def test_every_option_is_in_the_table_and_nothing_else():
    text = (ROOT / "docs/training.md").read_text()
    options = text.split("## Options", 1)[1]
    listed = re.findall(r"^\| `(\w+)` \|", options, flags=re.MULTILINE)
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(Config))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
