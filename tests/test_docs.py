"""The pages in docs/ say what the code does: every reader, every reason, every variable, and every page that is named."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pipelines.corpus.sources import Source

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGES = ("model", "pipelines", "slurm", "tests", "benchmarks")
CODE = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

_REASON = re.compile(r"[a-z0-9 ]+: [a-zA-Z][a-zA-Z0-9 -]*")

_MEDIA = {
    "pictures.py": "image",
    "colour.py": "image",
    "sounds.py": "audio",
    "sound_files.py": "audio",
    "_parts": "text",
    "_pixels": "image",
    "_waveforms": "audio",
}
"""The modality of a `MediaError`, by the file or the function that raises it."""


def reasons() -> set[str]:
    """Of all rejects, as the code has them."""
    folder = ROOT / "pipelines"
    files = [*(folder / "corpus").glob("*.py"), folder / "tokenize/prepare.py", folder / "tokenize/layout.py"]
    return {reason for file in files for reason in _reasons(ast.parse(file.read_text()), file.name)}


def _reasons(tree: ast.AST, where: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        inside = node.name if isinstance(node, ast.FunctionDef) and node.name in _MEDIA else where
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _REASON.fullmatch(node.value):
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "MediaError":
            _, fault = node.args
            said = [fault.body, fault.orelse] if isinstance(fault, ast.IfExp) else [fault]
            yield from (f"{_MEDIA[inside]}: {part.value}" for part in said if isinstance(part, ast.Constant))
        yield from _reasons(node, inside)


def test_every_reason_of_a_reject_is_explained_and_every_explained_one_exists() -> None:
    page = (DOCS / "preprocessing.md").read_text()
    explained = re.findall(r"^\| `([^`]+: [^`]+)` \|", page, re.M)
    assert explained == sorted(explained)
    assert set(explained) == reasons()


def test_every_reader_has_a_section_and_a_line_in_the_table() -> None:
    page = (DOCS / "readers.md").read_text()
    union, _ = get_args(Source)
    names = {get_args(kind.model_fields["reader"].annotation)[0] for kind in get_args(union)}
    assert set(re.findall(r"^\| \[`(\w+)`\]\(#\1\) \|", page, re.M)) == names
    assert set(re.findall(r"^## (\w+)$", page, re.M)) == names


def test_every_setting_of_the_readers_that_a_page_names_exists() -> None:
    union, _ = get_args(Source)
    known = {name for kind in get_args(union) for name in kind.model_fields}
    for block in re.findall(r"```yaml\n(.*?)```", (DOCS / "readers.md").read_text(), re.S):
        assert set(re.findall(r"^(?:- |  )(\w+):", block, re.M)) <= known


def test_every_variable_that_storage_reads_is_explained() -> None:
    source = (ROOT / "pipelines/corpus/remote.py").read_text()
    read = set(re.findall(r'environ\.get\("(\w+)"', source))
    assert read <= set(re.findall(r"`([A-Z_0-9]+)`", (DOCS / "storage.md").read_text()))


def test_every_page_and_heading_that_code_and_pages_name_exists() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"), *CODE]
    for file in pages:
        text = file.read_text()
        # A campaign writes its own page.
        for name in re.findall(r"docs/(?!campaigns/)[\w/.-]+\.md", text):
            assert (ROOT / name).exists(), f"{file}: {name}"
        if file.suffix == ".md":
            for target, heading in re.findall(r"\]\(([\w/.-]*\.md)?(?:#([\w-]+))?\)", text):
                page = file.parent / target if target else file
                assert page.exists(), f"{file}: {target}"
                assert not heading or heading in _anchors(page), f"{file}: {target}#{heading}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
