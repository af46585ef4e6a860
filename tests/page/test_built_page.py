"""The built page that the package carries: made from the present sources, and asking nothing of anybody else.

Not here: what the page does, which `make test-page` has a browser and Node for. This needs neither, so that every run
of the tests notices a page that is older than its sources. Surprising: which files were hashed is said here a second
time, beside page/vite.config.ts, since the two are in two languages.
"""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "page"
BUILT = REPOSITORY / "src" / "puna" / "server" / "page"
DECIDING = ("index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts")
LARGEST = 400_000  # bytes of everything together


def hash_of(folder: Path) -> str:
    """SHA-256 over name, length and content of each source, in the order of their names; hexadecimal."""
    files = [folder / name for name in DECIDING] + [path for path in (folder / "src").rglob("*") if path.is_file()]
    found = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in files):
        content = path.read_bytes()
        found.update(f"{name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text within scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.inline += data


@pytest.fixture(scope="module")
def index() -> Tags:
    return Tags((BUILT / "index.html").read_text("utf-8"))


def test_it_was_built_from_the_present_sources(index: Tags) -> None:
    said = [attrs["content"] for tag, attrs in index.tags if tag == "meta" and attrs.get("name") == "puna-sources"]
    assert said == [hash_of(SOURCES)], "the built page is older than its sources: make page"


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "src" / "deep").mkdir(parents=True)
    for name in (*DECIDING, "src/a.ts", "src/deep/b.ts"):
        (tmp_path / name).write_text(name)
    hashes = [hash_of(tmp_path)]
    (tmp_path / "src" / "deep" / "b.ts").write_text("src/deep/B.ts")
    hashes.append(hash_of(tmp_path))
    (tmp_path / "src" / "c.ts").write_text("")
    hashes.append(hash_of(tmp_path))
    (tmp_path / "src" / "c.ts").rename(tmp_path / "src" / "d.ts")
    hashes.append(hash_of(tmp_path))
    assert len(set(hashes)) == 4


def test_nothing_in_it_is_inline(index: Tags) -> None:
    assert index.inline.strip() == ""
    assert [name for _, attrs in index.tags for name in attrs if name.startswith("on") or name == "style"] == []
    assert "style" not in [tag for tag, _ in index.tags]


def test_it_names_its_own_files_and_no_other(index: Tags) -> None:
    named = {attrs[name] for _, attrs in index.tags for name in ("src", "href") if attrs.get(name)}
    assert named
    assert {name for name in named if not re.fullmatch(r"/page/[\w.-]+", str(name))} == set()
    files = {path.name for path in BUILT.iterdir()}
    assert files == {str(name).removeprefix("/page/") for name in named} | {"index.html", "licences.txt"}


def test_style_sheets_load_nothing() -> None:
    sheets = list(BUILT.glob("*.css"))
    assert len(sheets) == 1
    text = sheets[0].read_text("utf-8")
    assert re.findall(r"url\(|@import|@font-face|expression\(", text) == []


def test_the_script_knows_no_other_host_and_makes_no_code() -> None:
    scripts = list(BUILT.glob("*.js"))
    assert len(scripts) == 1
    text = scripts[0].read_text("utf-8")
    # Names of XML languages, and pages that highlight.js names in messages to developers: none is ever fetched.
    known = {"http://www.w3.org/", "https://github.com/highlightjs/"}
    hosts = set(re.findall(r"(?:https?|wss?)://[\w.-]+/(?:[\w-]+/)?", text))
    assert {host for host in hosts if not any(host.startswith(name) for name in known)} == set()
    makers = r"\beval\(|\bnew Function\b|\bimportScripts\b|\bdocument\.write\b|\.insertAdjacentHTML\b"
    assert re.findall(makers, text) == []
    assert "dangerouslySetInnerHTML" not in "".join(path.read_text("utf-8") for path in SOURCES.glob("src/**/*.ts*"))


def test_it_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in BUILT.iterdir()}
    assert sum(sizes.values()) < LARGEST, sizes
