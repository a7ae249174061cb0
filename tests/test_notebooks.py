"Every notebook runs from top to bottom, in a copy of the repository, so that nothing here is changed."
import json, os, signal
from contextlib import suppress
from multiprocessing import get_all_start_methods, get_context
from tempfile import TemporaryDirectory

import lessons, nbformat, pytest
from conftest import NOTEBOOKS, ROOT, copy_repository, environment, tool
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

SECONDS = 300  # for a whole notebook; a lesson should take less than a tenth of it
ELSEWHERE = 'figures', 'pages'  # they draw recorded runs: test_figures runs them, and test_repository the index

ONCE = {'31_step_time': dict(rounds=1, data=['data.corpus=demo', 'data.utterances=48', 'training.batch_size=4']), '33_decoding_speed': dict(utterances=100, blocks=1),
        '37_scale': dict(rows=[60], bare_rows=[], starts=1, long=4, capacities=[64])}  # measured with more

CAN_FORK = 'forkserver' in get_all_start_methods()
processes = get_context('forkserver' if CAN_FORK else 'spawn')
if CAN_FORK: processes.set_forkserver_preload(lessons.IMPORTS)

def end(process):
    "End a process and those that it has started."
    process.kill()
    with suppress(OSError, AttributeError): os.killpg(process.pid, signal.SIGKILL)

def cells_of(path):
    "The code to be run: without the cells that nbdev leaves out too."
    cells = parameterize_notebook(load_notebook_node(str(path)), ONCE.get(path.stem, {})).cells
    return [c.source for c in cells if c.cell_type == 'code' and '#| eval: false' not in c.source]

@pytest.mark.parametrize('path', [o for o in NOTEBOOKS if o.stem not in ('index', 'walkthrough') and (o.parent.name not in ELSEWHERE or o.stem[0] == '3')], ids=lambda o: o.stem)
def test_notebook_runs(path, tmp_path, shared_cache):
    root = copy_repository(tmp_path)
    os.symlink(shared_cache, root/'cache', target_is_directory=True)
    result, failure = processes.Pipe(duplex=False)
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        where = environment(root, TMPDIR=scratch, IPYTHONDIR=scratch)
        process = processes.Process(target=lessons.run, args=(cells_of(path), root, where, failure, root/path.parent.relative_to(ROOT)))
        process.start()
        failure.close()
        try:
            said = result.recv() if result.poll(SECONDS) else f'not done after {SECONDS} s'
            process.join(10 if not said else 0)
        except EOFError: said = 'its process died'
        finally: end(process)
    if said: pytest.fail(f'{path.relative_to(ROOT)}\n{said}', pytrace=False)

def test_walkthrough_compares_both_runs(tmp_path, shared_cache):
    "Under papermill, with runs too small to learn anything: its last table names both."
    root = copy_repository(tmp_path)
    os.symlink(shared_cache, root/'cache', target_is_directory=True)
    small = ['model.num_layers=2', 'model.hidden_size=32', 'model.conv_channels=32',
             'feature_matching.teacher_layers=[0,1]', 'feature_matching.student_layers=[0,1]']
    parameters = ['-p', 'epochs', 1, '-p', 'utterances', 48, '-p', 'prefix', 'tiny', '-y', f'{{data: {json.dumps(small)}}}']
    tool('papermill', root/'nbs/walkthrough.ipynb', root/'done.ipynb', '--cwd', root/'nbs', '-k', 'python3', *parameters, root=root)
    outputs = [o for c in nbformat.read(root/'done.ipynb', as_version=4).cells for o in c.get('outputs', [])]
    *_, last = (o.data['text/html'] for o in outputs if '<table' in o.get('data', {}).get('text/html', ''))
    assert 'tiny_baseline' in last and 'tiny_student' in last
