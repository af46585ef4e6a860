"""Words that stay out of the repository: paths of somebody's machine, package registries, notes to self.

What it is: a search through every text file that git tracks or would track.
What is surprising: the patterns are spelled so that this file does not match itself.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

FORBIDDEN = {
    "a path of one machine": re.compile(
        r"(?<![\w.~$})*-])/(?:work|root|home|Users|mnt)/[\w.-]|\b[A-Za-z]:\\+Users\\+\w|/(?:tmp)/bash_jobs"
    ),
    "the host of a package registry": re.compile(
        r"\b(?:(?:test\.)?pypi[.]org|files[.]pythonhosted|pythonhosted[.]org|download[.]pytorch[.]org|anaconda[.]org"
        r"|registry[.]npmjs|static[.]crates|index[.]crates|proxy[.]golang|ghcr[.]io|docker[.]io)",
        re.IGNORECASE,
    ),
    "a note to self": re.compile(r"\b(?:TO[D]O|FIX[M]E|XX[X]|HA[C]K)\b"),
}


def faults(name: str, text: str) -> list[str]:
    """Each forbidden word in a text, with its line."""
    return [
        f"{name}:{number} has {what}: {match.group()}"
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in FORBIDDEN.items()
        if (match := pattern.search(line))
    ]


def built(name: str) -> bool:
    """Whether a file is the page's bundled script: a highlighter in it knows the words that it colours in comments."""
    return name.startswith("src/puna/server/page/") and name.endswith(".js")


def test_the_repository_keeps_to_itself() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found, read = [], 0
    for name in filter(None, listed.split("\0")):
        path = REPOSITORY / name
        if path.is_symlink() or not path.is_file():  # deleted and not yet committed
            continue
        data = path.read_bytes()
        if b"\0" in data[:8192]:  # weights, pictures
            continue
        read += 1
        some = faults(name, data.decode("utf-8"))
        found += [fault for fault in some if not (built(name) and "note to self" in fault)]
    assert read > 10
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "see /" + "home/somebody/models",
        'PATH = "/' + 'work/main"',
        "file:///" + "root/x",
        "C:" + r"\Users\somebody",
        "C:" + r"\\Users\\somebody",
        "pip install -i https://" + "pypi" + ".org/simple puna",
        "https://files." + "python" + "hosted.org/packages/x.whl",
        "# TO" + "DO: later",
        "// FIX" + "ME",
    ],
)
def test_a_forbidden_word_is_found(line: str) -> None:
    assert len(faults("x.py", f"first\n{line}\n")) == 1
    assert faults("x.py", f"first\n{line}\n")[0].startswith("x.py:2 ")


@pytest.mark.parametrize(
    "line",
    [
        "~/.local/share/puna",
        "docs/home/index.md",
        "https://example.com/home/page",
        "at work/home",
        "https://huggingface.co",
    ],
)
def test_an_innocent_line_is_let_through(line: str) -> None:
    assert faults("x.md", line) == []
