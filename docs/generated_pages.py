"""Pages that are made when the site is built: the config reference, the tutorials, and the files that pages link to.

mkdocs calls `on_files` and `on_page_markdown` (mkdocs.yml, `hooks`); the tests call `generated`, for what links lead
to.

- `reference/config.md`   from the config's dataclasses and the registries
- `tutorials/*.md`        from the scripts in docs/tutorials: comments become prose
- `changelog.md`, `contributing.md`   the files of the checkout's root
- `source/**`             every file outside docs/ that a page links to, as it stands
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
INTRODUCTION = """# Config reference

Made from the dataclasses and registries that check a config. `metamem schema` prints the same as a JSON Schema, with
which an editor completes and checks a file; `metamem check FILE` checks one with all that it refers to. Any key can be
set on the command line too: `training.steps=20`.

Beside the keys below, `extends: FILE`, or a list of files: each is read first, later ones win, mappings merge and lists
replace. A file is relative to the one that names it; `metamem:memory/titans.yaml` is one that ships, from any folder,
for `base:` of an ablation too, and on the command line: `metamem check metamem:quickstart.yaml`.

`${vars.dim}` stands for a variable. Where a kind or a task is named, so can be the dotted path of a class of your own,
whose arguments are then the options."""
FROM_ROOT = ("CHANGELOG", "CONTRIBUTING")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".md": "markdown"}


@cache
def generated() -> dict[str, str]:
    """Path in the site -> markdown of every page that is not a file in docs/."""
    pages = {f"{name.lower()}.md": from_root((ROOT / f"{name}.md").read_text()) for name in FROM_ROOT}
    pages["reference/config.md"] = config_reference()
    pages |= {f"tutorials/{path.stem}.md": tutorial(path.read_text()) for path in sorted(DOCS.glob("tutorials/*.py"))}
    written = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")}
    linked = {file for path, text in {**written, **pages}.items() for file in outside(text, path)}
    return pages | {source_page(file): source(file) for file in sorted(linked)}


def from_root(text: str) -> str:
    """A file of the root as a page of docs/: links into docs/ lose that folder."""
    return LINK.sub(lambda found: found[1].removeprefix("docs/"), text)


def outside(text: str, page: str) -> Iterator[Path]:
    """The files of the checkout outside docs/ that a page links to."""
    for target in LINK.findall(text):
        file = (DOCS / posixpath.dirname(page) / target).resolve()
        if file.is_relative_to(ROOT) and not file.is_relative_to(DOCS) and file.exists():
            yield file


def source_page(file: Path) -> str:
    """The page that shows a file; a package's is that of its `__init__.py`."""
    return f"source/{file.relative_to(ROOT).as_posix()}.md"


def source(file: Path) -> str:
    """A file as a page."""
    name = file.relative_to(ROOT).as_posix()
    if file.is_dir():
        listed = "\n".join(f"- `{path.name}`" for path in sorted(file.iterdir()) if path.suffix in LANGUAGES)
        package = file / "__init__.py"
        return f"# {name}\n\n{listed}\n\n" + (fenced(package.read_text(), "python") if package.exists() else "")
    return f"# {name}\n\n{fenced(file.read_text(), LANGUAGES.get(file.suffix, 'text'))}"


def fenced(text: str, language: str) -> str:
    """A block of code that may hold blocks itself."""
    return f"`````{language}\n{text.rstrip()}\n`````\n"


def tutorial(text: str) -> str:
    """A script as a page: its docstring, then comments at the margin as prose between blocks of code. `# %%` begins a
    section."""
    parts = re.split(r'^"""(.*?)"""\n', text, maxsplit=1, flags=re.DOTALL)
    title, _, rest = parts[1].partition("\n")
    page = [f"# {title.rstrip('.')}\n", rest.strip()]
    for comments, code in re.findall(r"((?:^#.*\n)*)((?:^(?!#).*\n?)*)", parts[2], re.MULTILINE):
        prose = "\n".join(line.removeprefix("#").removeprefix(" ") for line in comments.splitlines())
        page.append(re.sub(r"^%% (.*)$", r"## \1\n", prose, flags=re.MULTILINE))
        page.append(fenced(code.strip("\n"), "python") if code.strip() else "")
    return "\n\n".join(part for part in page if part) + "\n"


def config_reference() -> str:
    """Every key of a config with its type and default, and every option of what a config can name."""
    from metamem.config import ablation, schema
    from metamem.episodes import schema as episodes
    from metamem.episodes.registry import EPISODE_MODULES, EPISODES
    from metamem.registry import MODULES, TASKS, TRACKERS

    for module in ("network", "tasks", "training.tracking", "episodes.tasks", "episodes.modules"):
        importlib.import_module(f"metamem.{module}")
    registries = {
        "Module kinds": MODULES,
        "Tasks": TASKS,
        "Module kinds of episodes": EPISODE_MODULES,
        "Episodic tasks": EPISODES,
        "Trackers": TRACKERS,
    }
    sections = [
        INTRODUCTION,
        "## A config",
        *map(dataclass_section, described(schema.Config)),
        "## A meta-training over tasks",
        "A file with `module:` in the place of `network:` ([learning from a few examples](../episodes.md)).",
        *map(dataclass_section, described(episodes.EpisodesConfig, besides=schema)),
        "## The adaptation of a causal language model",
        "A file in `configs/adapt/` ([adaptation](../adaptation.md#causal-language-models-of-transformers)).",
        *map(dataclass_section, described(schema.AdaptConfig, besides=schema)),
        "## An ablation",
        "A file with `base:` ([ablations](../ablations.md)).",
        *map(dataclass_section, described(ablation.AblationConfig)),
    ]
    for title, registry in registries.items():
        sections += [f"## {title}", *(entry_section(registry, name) for name in registry)]
    return "\n\n".join(sections) + "\n"


def described(cls: Any, besides: Any = None) -> list[Any]:
    """A dataclass and those that its fields hold, each once; those of the module `besides` have their table already."""
    found = [cls]
    for kind in found:  # grows as it goes
        for hint in get_type_hints(kind, include_extras=True).values():
            held = [part for part in parts(hint) if is_part(part) and part not in found]
            found += [part for part in held if besides is None or part.__module__ != besides.__name__]
    return found


def dataclass_section(cls: Any) -> str:
    """A dataclass of the config: its docstring, and a table of its keys."""
    from metamem.config.convert import key_of, schema_fields

    hints = get_type_hints(cls, include_extras=True)
    rows = []
    for field in schema_fields(cls):
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        rows.append((key_of(field), hints[field.name], default))
    return f"### {cls.__name__}\n\n{inspect.getdoc(cls)}\n\n{table(rows)}"


def entry_section(registry: Any, name: str) -> str:
    """Something registered: what it is, and a table of its options."""
    rows = [(option, hint, default) for option, (hint, default) in registry.options(name).items()]
    constructor = registry.get(name)
    text = (inspect.getdoc(constructor) or "").partition("\n\n")[0]
    where = f"`{constructor.__module__}.{constructor.__qualname__}`"
    return f"### `{name}` {{ #{slug(registry.noun)}-{name} }}\n\n{text}\n\n{where}\n\n{table(rows)}"


def slug(text: str) -> str:
    """Words as part of an anchor."""
    return re.sub(r"\W+", "-", text.lower())


def table(rows: list[tuple[str, Any, Any]]) -> str:
    """Key, what is accepted, default."""
    if not rows:
        return "It has no options."
    lines = [f"| `{key}` | {accepted(hint)} | {shown(default)} |" for key, hint, default in rows]
    return "\n".join(["| key | value | default |", "|---|---|---|", *lines])


def accepted(hint: Any) -> str:
    """What is accepted, in words; a part of the config by the link to its table."""
    from metamem.config.convert import describe
    from metamem.registry import is_module, is_module_mapping

    if is_module_mapping(hint):
        return "a mapping of modules"
    if is_module(hint):
        return "a module"
    for part in parts(hint):
        if is_part(part):
            return f"{describe(hint)}: [{part.__name__}](#{part.__name__.lower()})".replace("|", "\\|")
    return describe(hint).replace("|", "\\|")


def is_part(hint: Any) -> bool:
    """Whether an annotation is a part of the config, with a table of its own."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def parts(hint: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield hint
    for argument in get_args(hint) if get_origin(hint) is not None else ():
        yield from parts(argument)


def shown(default: Any) -> str:
    """A default as YAML has it."""
    if default is dataclasses.MISSING:
        return "needed"
    if dataclasses.is_dataclass(default):
        return "its defaults"
    if isinstance(default, list | tuple):
        return f"`[{', '.join(map(str, default))}]`"
    names = {None: "null", True: "true", False: "false"}
    return f"`{names[default] if default is None or isinstance(default, bool) else default if default != {} else '{}'}`"


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages to the site."""
    from mkdocs.structure.files import File

    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files outside docs/ go to the pages that show them."""
    here = page.file.src_uri

    def link(found: re.Match[str]) -> str:
        file = next(outside(f"]({found[1]})", here), None)
        return found[1] if file is None else posixpath.relpath(source_page(file), posixpath.dirname(here) or ".")

    return LINK.sub(link, markdown)
