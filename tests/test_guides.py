"The pages of docs/ name commands, options, settings and files that exist; the site has every page and notebook."
import re, sys

import nbformat, pytest
from conftest import ROOT
from typer.main import get_command

from self_distill.use.cli import app
from self_distill.core.config import valid_keys

sys.path.insert(0, str(ROOT/'tools'))
from docs import GUIDES, notebooks, readable

PAGES = sorted((ROOT/'docs').glob('*.md'))
COMMANDS = get_command(app).commands
EXAMPLES = {'confidence.weight'}  # of the loss that extending.md adds

def commands(page):
    "(command, what follows it) of every command on a page, lines that go on joined"
    text = page.read_text(encoding='utf-8').replace('\\\n', ' ')
    return re.findall(r'self-distill ([a-z][a-z-]*)([^\n`;]*)', text)

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_commands_and_options_exist(page):
    for name, rest in commands(page):
        assert name in COMMANDS, f'{page.name}: self-distill {name}'
        known = {o for p in COMMANDS[name].params for o in (*p.opts, *p.secondary_opts)}
        own = rest.partition('#')[0].partition(' -- ')[0]  # what follows -- belongs to Snakemake
        named = set(re.findall(r'(?<=\s)--[a-z][\w-]*', own))
        assert named <= known, f'{page.name}: self-distill {name}{rest}'

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_settings_exist(page):
    named = set(re.findall(r'\b([a-z_]+\.[a-z_.]+)=', page.read_text(encoding='utf-8')))
    assert named - EXAMPLES <= set(valid_keys())

@pytest.mark.parametrize('page', [*PAGES, ROOT/'README.md', *(ROOT/'thesis_figures').glob('*.md')], ids=lambda p: p.stem)
def test_links_and_configs_exist(page):
    text = page.read_text(encoding='utf-8')
    links = [page.parent/link for link in re.findall(r'\]\((?!https?:)([^)#]+)', text)]
    links += [ROOT/path for path in re.findall(r'\bconfigs/[\w/]+\.yaml', text)]
    assert [str(o) for o in links if not o.exists()] == []

def test_the_pages_hold_commands():
    assert {'prepare', 'train', 'search', 'evaluate-beam', 'compare', 'report', 'transcribe'} <= {
        name for name, _ in commands(ROOT/'docs'/'recordings.md')}

def test_the_site_has_every_page_and_notebook():
    assert sorted(GUIDES) == [p.stem for p in PAGES]
    assert sorted(sum(notebooks().values(), [])) == sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if p.stem != 'index' and '.ipynb_checkpoints' not in p.parts)

def test_hidden_cells_and_directives_are_left_out():
    sources = ['#| default_exp a', '#| export\nx = 1', '#| hide\nsecret', '#| echo: false\ny', '## Export -']
    cells = [nbformat.v4.new_code_cell(o) if o[1] == '|' else nbformat.v4.new_markdown_cell(o) for o in sources]
    cells.append(nbformat.v4.new_markdown_cell('[there](#Two-Words)'))
    shown = readable(nbformat.v4.new_notebook(cells=cells)).cells
    assert [c.source for c in shown] == ['x = 1\n'.strip(), 'y', '[there](#two-words)']
    assert shown[1].metadata.tags == ['remove-input']
