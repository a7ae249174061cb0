"What several test files share: where the repository is, and copies of it that a test may change."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in ROOT.glob('nbs/**/*.ipynb') if '.ipynb_checkpoints' not in p.parts)
DATA = Path(os.environ.get('SELF_DISTILL_DATA', ROOT/'data'))  # real recordings for some tests: an4/, prompts/; they are skipped without
LEFT_OUT = {'.git', '.venv', 'models', 'logs', 'cache', 'runs', 'build', 'dist', '_proc', '_docs', 'data'}  # at the top
LITTER = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.pytest_cache', '.hypothesis', '*.egg-info')

def copy_repository(folder):
    "The repository's sources in `folder`, uncommitted changes included, without what was installed or left by runs."
    for path in ROOT.iterdir():
        if path.name in LEFT_OUT or path.suffix == '.egg-info': continue
        if path.is_dir(): shutil.copytree(path, folder/path.name, ignore=LITTER)
        else: shutil.copy2(path, folder/path.name)
    return folder

def environment(root, **more):
    "Environment variables for a process that works in `root`, with the package that is there."
    kept = {k: v for k, v in os.environ.items() if k != 'SELF_DISTILL_ROOT'}
    return {**kept, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1', **more}

def tool(name, *arguments, root):
    "Run a command of this environment in `root`; what it says is in the failure when it fails."
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f'{name} failed:\n{done.stdout}\n{done.stderr}'
    return done.stdout + done.stderr

@pytest.fixture
def copied(tmp_path):
    "A copy of the repository, for one test to change."
    return copy_repository(tmp_path)

@pytest.fixture(scope='session')
def shared_cache(tmp_path_factory):
    "One folder of computed features for all tests and workers of this session, so that a corpus is made once."
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: folder = folder.parent
    (folder/'shared-cache').mkdir(exist_ok=True)
    return folder/'shared-cache'
