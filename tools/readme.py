"Write README.md from nbs/index.ipynb: run it, clean it, render it."
import re, subprocess, sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT/'nbs'/'index.ipynb', ROOT/'README.md'
NOTE = '<!-- Written from nbs/index.ipynb by `make readme`: edit the notebook. -->\n\n'

def execute(path):
    "The notebook at `path`, run from top to bottom in its folder."
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    return notebook

def from_root(text):
    "Links that are relative to nbs/ made relative to the folder above it, where README.md lies."
    return re.sub(r'\]\((?!\w+:|#)(?:\./|\.(?=\)))?([^)]*)\)', lambda m: f']({m[1][3:]})' if m[1].startswith('../') else f'](nbs/{m[1]})', text)

def render(notebook):
    "The Markdown of `notebook`, as nbdev's directives ask: no cell of `#| hide`, no source of `#| echo: false`."
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        directives = re.findall(r'^#\| *(.+)$', cell.source, re.M) if cell.cell_type == 'code' else []
        cell.metadata.tags = [tag for tag in ('hide', 'echo: false') if tag in directives]
    tags = Config(TagRemovePreprocessor=dict(enabled=True, remove_cell_tags=['hide'], remove_input_tags=['echo: false']))
    body, _ = MarkdownExporter(config=tags).from_notebook_node(notebook)
    return NOTE + re.sub(r'\n{3,}', '\n\n', from_root(body)).strip() + '\n'

def main():
    notebook = execute(INDEX)
    for cell in notebook.cells: cell.metadata.pop('execution', None)
    nbformat.write(notebook, INDEX)
    subprocess.run([Path(sys.executable).with_name('nbdev_clean'), '--fname', INDEX], check=True, cwd=ROOT)
    README.write_text(render(nbformat.read(INDEX, as_version=4)), encoding='utf-8', newline='\n')

if __name__ == '__main__': main()
