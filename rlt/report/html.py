"""report.html has the text of report.md and needs neither other files nor a network.

Pictures are embedded in the file. HTML in the Markdown is not interpreted, so a model's output is
always shown as text.
"""

import base64
import html
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt

from rlt.report.attribution import FENCE, coloured

_STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --soft: #f4f5f7; --accent: #2f6690; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4048; --soft: #22262b; --accent: #7db4dc; }
}
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
pre, code { background: var(--soft); overflow-wrap: anywhere; }
pre { padding: .7rem; overflow-x: auto; white-space: pre-wrap; }
code { padding: 0 .2em; }
pre code { padding: 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; vertical-align: top; }
th { border-bottom: 2px solid var(--accent); }
a { color: var(--accent); }
.tokens { font-family: ui-monospace, monospace; font-size: .9rem; white-space: pre-wrap; }
.tokens span { border-radius: 2px; padding: 1px 0; } .tokens .framed { outline: 2px solid; }
"""


def write_html(report: Path) -> Path:
    """Write a Markdown report as HTML with its pictures; links to other files stay relative."""
    text = report.read_text(encoding="utf-8")
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("fence", _fence)
    body = markdown.render(text)
    body = body.replace("<table>", '<div class="table"><table>').replace(
        "</table>", "</table></div>"
    )
    body = re.sub(
        r'<img src="([^"]+)"', lambda m: f'<img src="{_inline(m[1], report.parent)}"', body
    )
    first = text.partition("\n")[0].lstrip("# ")
    title = html.escape(re.sub(r"\\(.)", r"\1", first))
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
    file = report.with_suffix(".html")
    file.write_text(page, encoding="utf-8")
    return file


def _fence(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    if token.info.strip() == FENCE:
        return coloured(token.content)
    return f"<pre><code>{html.escape(token.content)}</code></pre>\n"


def _inline(source: str, folder: Path) -> str:
    """Return a PNG of the report as a data URL, and any other source unchanged."""
    file = folder / unquote(html.unescape(source))
    if file.suffix != ".png" or not file.is_file():
        return source
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
