"""What README, docs/ and messages name exists: links, files, commands, flags, extras."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent
from urllib.parse import urlsplit

import pytest

import lvlm
from lvlm.core.discovery import GROUPS
from lvlm.main import run_verb
from lvlm.runtime.bundle.reader import READABLE
from lvlm.verbs import MODULES

ROOT = Path(__file__).parents[1]
TOOLS = ("scripts", "tests/campaign")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CODE = [
    file
    for folder in (*("src", "runtime", "export", "calibration", "plugins_trt"), *TOOLS)
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".py", ".sh")
]
NATIVE = [
    file
    for folder in ("runtime", "plugins_trt")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".h", ".cpp")
]
PARTS = {
    "build": ("plugins", "engine", "cpu", "triton"),
    "compare": ("checkpoint", "devices", "layers"),
}
PACKAGES = {"bench", "calibration", "core", "export", "plugins_trt", "runtime"}
EXAMPLES = sorted(file for file in (ROOT / "examples").rglob("*") if file.is_file())
FOLDERS = "assets|calibration|docs|examples|export|plugins_trt|runtime|scripts|src|tests"
FILE = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w*./-]*\w\.\w+")
BARE_FILE = re.compile(r"(?<![\w./-])[A-Za-z_]\w*\.py\b")
MADE_UP = {"try_family.py"}  # files that a reader of a worked example writes
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERBS = sorted(name.removeprefix("lvlm-") for name in PROJECT["scripts"] if name != "lvlm")
COMMAND = re.compile(rf"\blvlm[- ](?:{'|'.join(VERBS)})(?=\s|$)")
NAMED = re.compile(r"\blvlm-([a-z]+)\b")
# Flags of other programs: pip, venv, pytest (tests/conftest.py), gunicorn, docker, tritonserver.
FOREIGN = {
    "--constraint",
    "--system-site-packages",
    "--whole",
    "--numprocesses",
    "--dist",
    "--stress-steps",
    "--sanitize",
    "--preload",
    "--gpus",
    "--shm-size",
    "--model-repository",
    "--backend-directory",
    "--exit-timeout-secs",
}


WEB = re.compile(r"https?://[^\s)>\"'`|\\]+")
# Where links lead: the sources themselves, no mirror of one. Look at a new one before it is added
SITES = {"arxiv.org", "docs.ray.io", "github.com", "keepachangelog.com", "semver.org"}
NOWHERE = {"127.0.0.1", "app.example.com", "example.com", "localhost"}
NOTES = sorted((ROOT / "docs/notes").rglob("*.md"))
TABLE = re.compile(r"^\|.*\n\|[ :|-]+\n", re.MULTILINE)
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")
RUN = re.compile(r"\b(?:lvlm-[a-z]+|pytest|scripts/[\w/]+\.\w+|python -m campaign)")
MACHINE = re.compile(r"\bmachine [A-Z]\b|\bcores\b|\bH[12]00\b")


@cache
def help_of(*verb: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        run_verb(verb[0], [*verb[1:], "--help"])
    return text.getvalue()


@cache
def flags_of(*verb: str) -> frozenset[str]:
    return frozenset(FLAG.findall(help_of(*verb)))


@cache
def all_flags() -> frozenset[str]:
    known = set(FOREIGN)
    for verb in MODULES:
        known |= flags_of(verb)
    for verb, parts in PARTS.items():
        for part in parts:
            known |= flags_of(verb, part)
    for file in CODE:
        if file.relative_to(ROOT).as_posix().startswith(TOOLS):
            known |= declared(file)
    return frozenset(known)


def declared(script: Path) -> set[str]:
    """Flags that a script takes: what it gives to add_argument, or a case of the shell; those of
    the script that it hands all its arguments to."""
    text = script.read_text()
    flags = set(re.findall(r"""add_argument\((?:\s*"-\w",)?\s*"(--[a-z][a-z0-9-]+)""", text))
    flags |= set(re.findall(r"""\badd\((?:\s*"-\w",)?\s*"(--[a-z][a-z0-9-]+)""", text))
    flags |= set(re.findall(r"^\s*(--[a-z][a-z0-9-]+)\)", text, re.MULTILINE))
    for inner in re.findall(r"(scripts/\w+\.py) \"\$@\"", text):
        flags |= declared(ROOT / inner)
    return flags


def commands(page: str) -> Iterator[str]:
    """Lines of indented or fenced blocks, and code within lines, that call a command of ours."""
    joined = page.replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"^```.*\n((?:.*\n)*?)```$", joined, re.MULTILINE))
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^ {4}.*$", "", joined, flags=re.MULTILINE))
    blocks = re.findall(r"^ {4}(.+)$", joined, re.MULTILINE)
    for text in [*inline, *blocks, *fenced.splitlines()]:
        for each in re.split(r"[;&|]+| # ", text):
            if COMMAND.match(each.strip()):
                yield each.strip()


def strings(source: str) -> Iterator[str]:
    """Every text of a module that is no docstring; the parts of an f-string joined."""
    tree = ast.parse(source)
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in silent:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or f"# {anchor}".replace("-", " ") in target.read_text().lower(), link


def astray(text: str) -> list[str]:
    """Web links of a text that are not https, or lead elsewhere than to the known sites; those of
    this machine, of examples and of names without a dot (containers) are none."""
    sites = [(url, urlsplit(url).hostname or "") for url in WEB.findall(text)]
    outside = [(url, site) for url, site in sites if site not in NOWHERE and "." in site]
    return [url for url, site in outside if site not in SITES or not url.startswith("https://")]


def test_web_links_lead_to_the_sources_themselves() -> None:
    for file in [*PAGES, *CODE, *EXAMPLES, ROOT / "pyproject.toml"]:
        assert astray(file.read_text()) == [], file.relative_to(ROOT)
    assert astray("see [it](http://arxiv.org/abs/1), https://github.com/x") == [
        "http://arxiv.org/abs/1"
    ]
    assert astray("`https://pypi.mirror.example.org/simple`") != []


def above(page: str, end: int) -> str:
    """What stands above a place under its heading and under those that enclose it."""
    level, parts = 7, []
    for block in reversed(re.split(r"^(?=#)", page[:end], flags=re.MULTILINE)):
        own = len(block) - len(block.lstrip("#"))
        if own < level:
            level = own
            parts.append(block)
    return "\n\n".join(reversed(parts))


@pytest.mark.parametrize("page", NOTES, ids=lambda page: page.name)
def test_a_table_of_figures_says_when_where_and_how(page: Path) -> None:
    """A paragraph above it has a date and a machine; a command stands there or below."""
    text = page.read_text()
    for table in TABLE.finditer(text):
        if page.name == "mutations.md":
            return  # no figures: held equal to the faults by a test of its own
        before = re.split(r"\n\s*\n", above(text, table.start()))
        dated = [i for i, part in enumerate(before) if DATE.search(part) and MACHINE.search(part)]
        assert dated, f"{page.name}: no date and machine above {table.group()}"
        after = "\n".join(before[dated[-1] :])
        assert RUN.search(after), f"{page.name}: no command above {table.group()}"


@pytest.mark.parametrize("page", [p for p in PAGES if p not in NOTES], ids=lambda page: page.name)
def test_pages_of_users_say_how_things_are(page: Path) -> None:
    """Not how they were until some day: that is for docs/notes."""
    assert not re.search(r"\b(?:until|since|before)\s+20\d\d-\d\d", page.read_text())


def documents(page: Path) -> set[Path]:
    """The pages that it links to, and itself."""
    links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
    return {page, *((page.parent / link).resolve() for link in links if "://" not in link)}


def test_every_page_is_reached_from_the_two_that_list_them() -> None:
    reached = documents(ROOT / "README.md") | documents(ROOT / "docs/README.md")
    reached |= documents(ROOT / "docs/notes/README.md")
    assert {page.resolve() for page in PAGES} <= reached


def test_files_that_are_named_exist() -> None:
    for file in [*PAGES, *CODE, *EXAMPLES]:
        for name in FILE.findall(file.read_text()):
            assert list(ROOT.glob(name)), f"{file.relative_to(ROOT)} names {name}"


def test_modules_that_are_named_without_a_folder_exist() -> None:
    there = {file.name for folder in FOLDERS.split("|") for file in (ROOT / folder).rglob("*.py")}
    there |= {file.name for file in ROOT.glob("*.py")} | MADE_UP
    for file in [*PAGES, *CODE, *NATIVE, *EXAMPLES]:
        unknown = set(BARE_FILE.findall(file.read_text())) - there
        assert not unknown, f"{file.relative_to(ROOT)} names {unknown}"


def test_tables_of_recipes_are_what_the_recipes_say() -> None:
    script = runpy.run_path(str(ROOT / "scripts/recipe_tables.py"))
    for page in script["PAGES"]:
        assert page.read_text() == script["rewritten"](page), "run python scripts/recipe_tables.py"


def test_commands_of_a_page_are_found() -> None:
    page = """
Say `lvlm-fleet costs.json --rate 3` or `lvlm-none`.

    lvlm-run out/ --chat && lvlm serve \\
        out/

```python
engine = Engine("out/")  # lvlm-export --sessions
```
"""
    assert [" ".join(command.split()) for command in commands(page)] == [
        *("lvlm-fleet costs.json --rate 3", "lvlm-run out/ --chat", "lvlm serve out/"),
        "lvlm-export --sessions",
    ]
    assert set(VERBS) == set(MODULES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_take_the_flags_they_are_shown_with(page: Path) -> None:
    for command in commands(page.read_text()):
        words = command.replace("lvlm-", "lvlm ").split()
        verb = tuple(words[1:3] if words[1] in PARTS and len(words) > 2 else words[1:2])
        unknown = set(FLAG.findall(command)) - flags_of(*verb)
        assert not unknown, f"{command}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_take_the_flags_they_are_shown_with(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    text = text.replace("python -m campaign", "tests/campaign/__main__.py")
    scripts = r"((?:scripts|tests/campaign)/[\w/]+\.(?:py|sh))([^`#|;&\n]*)"
    for name, rest in re.findall(scripts, text):
        unknown = set(FLAG.findall(rest)) - declared(ROOT / name)
        assert not unknown - {"--help"}, f"{name}{rest}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_running_text_exist(page: Path) -> None:
    assert set(FLAG.findall(page.read_text())) <= all_flags()


def test_messages_that_troubleshooting_quotes_are_in_the_code() -> None:
    """Piece by piece: N and … stand for what a message fills in."""
    said = "\n".join(t for f in CODE if f.suffix == ".py" for t in strings(f.read_text()))
    for row in re.findall(r"^\| .*\|$", (ROOT / "docs/troubleshooting.md").read_text(), re.M):
        for quoted in re.findall(r"`([^`]+ [^`]+)`", row.rpartition(" | ")[0]):
            for piece in re.split(r"…|\bN\b", quoted):
                assert piece.strip() in said, quoted


def test_messages_name_commands_and_flags_that_exist() -> None:
    for file in CODE:
        for text in strings(file.read_text()) if file.suffix == ".py" else ():
            if " " in text:  # a sentence: no argument of another program, no name of a thread
                assert set(NAMED.findall(text)) <= {*MODULES, "deploy"}, f"{file}: {text}"
                assert set(FLAG.findall(text)) <= all_flags(), f"{file}: {text}"


def test_extras_that_are_named_exist() -> None:
    extras = set(PROJECT["optional-dependencies"])
    for file in [*PAGES, *CODE]:
        for names in re.findall(r"(?:\.|\.whl)\[([a-z,-]+)\]\"", file.read_text()):
            assert set(names.split(",")) <= extras, f"{file.name}: {names}"
        for calls in re.findall(r"\binstall\(([^)]*)\)", file.read_text()):
            assert set(re.findall(r"\"([a-z-]+)\"", calls)) <= extras, f"{file.name}: {calls}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile_and_name_what_there_is(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        tree = compile(block, page.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "lvlm":
                assert {each.name for each in node.names} <= set(dir(lvlm))
    groups = [group.removeprefix("lvlm.") for group in GROUPS.values()]
    for name in re.findall(r"`lvlm\.([A-Za-z_]\w*)", page.read_text()):
        assert name in [*dir(lvlm), *PACKAGES, "json", *groups], name


def test_the_architecture_page_names_every_room() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rooms = [
        f.parent.name for top in ("export", "runtime") for f in ROOT.glob(f"{top}/*/__init__.py")
    ]
    assert [room for room in rooms if f"`{room}`" not in page] == []
    loose = {f.name for f in (ROOT / "export").glob("*.py")} - {"__init__.py"}
    rows = re.findall(r"^\| (`\w+\.py`.*?) \|", page, re.MULTILINE)
    assert set(re.findall(r"`(\w+\.py)`", " ".join(rows))) == loose


def test_the_stability_page_names_what_is_public() -> None:
    page = (ROOT / "docs/stability.md").read_text()
    assert set(lvlm.__all__) <= set(re.findall(r"`(\w+)`", page))
    assert set(GROUPS.values()) <= set(re.findall(r"`(lvlm\.\w+)`", page))
    assert f"schemas {READABLE[0]} to {READABLE[-1]};" in page


def test_the_recipe_that_is_shown_is_the_one_there_is() -> None:
    page, source = (
        (ROOT / file).read_text() for file in ("docs/extending.md", "export/recipes/snapkv.py")
    )
    policy = dedent(source[source.index("    def cache_policy") : source.index("RECIPE =")])
    assert policy.strip() in page


def test_the_architecture_page_names_every_graph() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    files = sorted((ROOT / "export/graphs").glob("*.py"))
    graphs = [f.name for f in files if re.search(r"^    name\b.* = \"", f.read_text(), re.M)]
    assert "decode.py" in graphs
    assert [name for name in graphs if f"{name}`" not in page] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 900


def test_the_command_line_reference_is_that_of_the_parsers() -> None:
    reference = runpy.run_path(str(ROOT / "scripts/cli_reference.py"))["reference"]
    page = (ROOT / "docs/cli.md").read_text()
    assert page == reference(), "run python scripts/cli_reference.py"
