"Write README.md from nbs/index.ipynb: `python render_readme.py`. A test keeps the two equal."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent

def render()->str:
    "The index notebook as Markdown, links made relative to the repository's root."
    notebook = nbformat.read(ROOT/"nbs"/"index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}  # which cleaning removes, and code fences need
    for cell in notebook.cells:
        if cell.source.startswith("#| echo: false"): cell.metadata["transient"] = {"remove_source": True}
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

if __name__ == "__main__": (ROOT/"README.md").write_text(render(), encoding="utf-8")
