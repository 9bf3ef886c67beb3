"""A stranger's tasks: each guide followed to the letter in an empty folder, files, commands and Python."""

from pathlib import Path

import pytest
from guide import ROOT, blocks, follow

GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guide_leads_where_it_says(guide: Path, tmp_path: Path):
    assert follow(guide, tmp_path)


def written(guide: str, *names: str) -> str:
    """The files that a guide has its reader write."""
    texts = {block.title: block.text for block in blocks(ROOT / f"docs/guides/{guide}.md") if block.title}
    return "".join(texts[name] for name in names)


def test_an_update_rule_of_ones_own_takes_at_most_forty_lines():
    assert 5 < len(written("add_rule", "my_rules.py", "sign_symmetric.yaml").splitlines()) <= 40


@pytest.mark.parametrize("guide", ["add_objective", "add_memory", "add_task", "own_module"])
def test_what_one_adds_is_named_by_its_path_and_registered_nowhere(guide: str):
    files = [block for block in blocks(ROOT / f"docs/guides/{guide}.md") if block.title]
    modules = [Path(block.title).stem for block in files if block.language == "python"]
    assert modules and not any("register" in block.text for block in files)
    assert all(any(f"{module}." in block.text for block in files if block.language == "yaml") for module in modules)
