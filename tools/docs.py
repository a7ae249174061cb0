"""Build the documentation into _docs/: `make docs`, or `python tools/docs.py` where there is no make.

Sphinx, with MyST-NB, reads the guides in docs/ and every notebook with the outputs that it stores; nothing is run.
The pages bring their own scripts and fonts. To read them with the search: python -m http.server -d _docs
"""
import importlib.util, re, shutil, subprocess, sys, tempfile
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT/'_docs'
GUIDES = 'recordings', 'from_the_guide', 'remedies', 'devices', 'extending', 'reproduce', 'glossary'
CHAPTERS = {'Start': '.', 'Core': '1_core', 'Data': '2_data', 'Training': '3_train', 'Decoding': '4_decode', 'Evaluation': '5_evaluate',
            'Studies': '6_study', 'Use': '7_use', 'Measurements': 'bench', 'Figures and tables': 'figures', 'Results': 'pages'}  # title → folder of nbs/
SHOWN = 'configs', 'thesis_figures', 'nbs/images', 'settings.ini', 'requirements.lock', 'LICENSE', 'CHANGELOG.md', 'CITATION.cff'

def install():
    "Install settings.ini's docs_requirements, within the versions of requirements.lock, where they are missing."
    if importlib.util.find_spec('myst_nb') and importlib.util.find_spec('furo'): return
    settings = ConfigParser(delimiters=['='], interpolation=None)
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    wanted = settings['DEFAULT']['docs_requirements'].split()
    subprocess.run([sys.executable, '-m', 'uv', 'pip', 'install', '--quiet', '--python', sys.executable,
                    '--constraints', ROOT/'requirements.lock', *wanted], check=True)

def notebooks():
    "Every chapter's notebooks by file name: 04_corpora.ipynb, 04a_public_corpora.ipynb, 05_batches.ipynb, …"
    def pages(folder): return [p for p in (ROOT/'nbs'/folder).glob('*.ipynb') if p.stem != 'index']
    return {title: sorted(pages(folder)) for title, folder in CHAPTERS.items()}

def readable(notebook):
    "The notebook as nbdev's directives ask: without hidden cells, inputs of `echo: false`, and the directives."
    cells = []
    for cell in notebook.cells:
        directives = re.findall(r'^#\| *(\S+)', cell.source, re.M) if cell.cell_type == 'code' else []
        if {'hide', 'default_exp'} & set(directives) or cell.source.startswith('## Export'): continue
        if 'echo:' in directives: cell.metadata.tags = ['remove-input']
        if directives: cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
        if cell.cell_type == 'markdown':  # Jupyter keeps a heading's capitals in the link to it
            cell.source = re.sub(r'\]\(([\w./]*?(?:\.ipynb)?#[^)]*)\)', lambda m: f']({m[1].lower()})', cell.source)
        cells.append(cell)
    notebook.cells = cells
    return notebook

def contents(caption, pages):
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *pages, '```', ''])

def pages_only(text):
    "README.md's text for the site: links to folders and to its own notebook, which have no page, become plain words."
    def no_page(path): return (ROOT/path).is_dir() or path == 'nbs/index.ipynb'
    return re.sub(r'\[([^\]]*)\]\(([^):#]*)\)', lambda m: m[1] if no_page(m[2]) else m[0], text)

def gather(source):
    "Write what Sphinx reads into the folder `source`, which looks like the repository."
    for name in SHOWN:
        copy = shutil.copytree if (ROOT/name).is_dir() else shutil.copy
        copy(ROOT/name, source/name)
    shutil.copytree(ROOT/'docs', source/'docs')
    for name in ('conf.py', 'static'): shutil.move(source/'docs'/name, source/name)
    chapters = notebooks()
    for path in sum(chapters.values(), []):
        (source/path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(readable(nbformat.read(path, as_version=4)), source/path.relative_to(ROOT))
    pages = {'Guides': [f'docs/{name}' for name in GUIDES]}
    pages |= {title: [str(path.relative_to(ROOT).with_suffix('')) for path in paths] for title, paths in chapters.items()}
    pages['Results'] += [f'The page of {name} <thesis_figures/{name.replace(" ", "_")}>' for name in ('results', 'methods', 'few transcripts', 'speed')]
    pages['Results'].append('CHANGELOG')
    trees = [contents(caption, names) for caption, names in pages.items()]
    readme = pages_only((ROOT/'README.md').read_text(encoding='utf-8'))
    (source/'index.md').write_text('\n'.join([readme, *trees]), encoding='utf-8')

def main():
    install()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)/'source'
        source.mkdir()
        gather(source)
        built = Path(folder)/'built'/'html'  # MyST-NB leaves a folder beside it
        subprocess.run([sys.executable, '-m', 'sphinx', '--quiet', '--fail-on-warning', '--keep-going', '--doctree-dir',
                        Path(folder)/'trees', source, built], check=True)
        shutil.rmtree(BUILT, ignore_errors=True)
        shutil.move(built, BUILT)
    print(f'{BUILT.name}/index.html is written; to read it with the search: python -m http.server -d {BUILT.name}')

if __name__ == '__main__':
    try: main()
    except subprocess.CalledProcessError as error: sys.exit(error.returncode)
