"""The site of `make docs`: pages that lie elsewhere in the repository, their links, and equations without scripts."""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
ELSEWHERE |= {f"results/{path.name}": f"results/{path.name}" for path in (ROOT / "results").glob("*.[ms][dv]*")}
OF_PAGE = {page: source for source, page in ELSEWHERE.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
EQUATION = re.compile(r'<(div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
NAME = re.compile(r"\[(<code>)~?([^<]*</code>)\]")  # [`DROConfig`]
# (`int`, *optional*), and behind it what mkdocstrings takes for the default
TYPE = re.compile(
    r"\(<code>(`[^<]*)</code>(?:,\s*default:\s*<code>.*?</code>)?\s*\)", re.DOTALL
)  # (`int`, *optional*)
NO_MARKS = str.maketrans("", "", "`*")
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and figures that lie outside docs/."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def site_path(source: str) -> str | None:
    """Returns where a file of the repository is on the site; `None`: it is not there."""
    return ELSEWHERE.get(source, source.removeprefix("docs/") if source.startswith("docs/") else None)


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Makes links to files of the repository links of the site; of those that it does not have the text stays."""
    source = OF_PAGE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(link: re.Match[str]) -> str:
        mark, text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if "://" in target or not (ROOT / path).exists():
            return link[0]  # a link that leads nowhere stays, for mkdocs to complain of
        if (place := site_path("results/README.md" if path == "results" else path)) is None:
            return text
        return f"{mark}[{text}]({posixpath.relpath(place, posixpath.dirname(page.file.src_uri))}{anchor or ''})"

    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))


def on_page_content(content: str, **_: object) -> str:
    """Renders equations as MathML, which browsers show by themselves, and docstrings as Hugging Face's are meant."""
    content = EQUATION.sub(
        lambda found: convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline"), content
    )
    content = NAME.sub(r"\1\2", content)
    return TYPE.sub(lambda found: f"(<code>{found[1].translate(NO_MARKS)}</code>)", content)
