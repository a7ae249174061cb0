"Every notebook runs from top to bottom, in a copy of the repository, so that nothing here is changed."
import os, time

import pytest
from conftest import NOTEBOOKS, copy_repository, environment
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

SECONDS = 300  # for a whole notebook; a lesson should take less than a tenth of it
ARTIFACTS = '456'  # first digits of the notebooks that draw recorded runs; test_figures runs them all, on invented records

ONCE = {'31_step_time': dict(rounds=1), '33_decoding_speed': dict(utterances=100, blocks=1),
        '37_scale': dict(rows=[60], bare_rows=[], starts=1, long=4, capacities=[64])}  # measured with more

def prepared(path):
    "The notebook as it is to be run: without the cells that nbdev leaves out too."
    notebook = parameterize_notebook(load_notebook_node(str(path)), ONCE.get(path.stem, {}))
    for cell in notebook.cells:
        if cell.cell_type == 'code' and '#| eval: false' in cell.source: cell.source = ''
    return notebook

@pytest.mark.parametrize('path', [o for o in NOTEBOOKS if o.stem[0] not in ARTIFACTS], ids=lambda o: o.stem)
def test_notebook_runs(path, tmp_path, shared_cache):
    root = copy_repository(tmp_path)
    os.symlink(shared_cache, root/'cache', target_is_directory=True)
    end = time.monotonic() + SECONDS
    client = NotebookClient(prepared(path), kernel_name='python3', resources={'metadata': {'path': str(root/'nbs')}},
                            timeout_func=lambda cell: max(1, int(end - time.monotonic())))
    failure = None
    try: client.execute(env=environment(root))
    except (CellExecutionError, CellTimeoutError) as error: failure = str(error)
    if failure: pytest.fail(f'nbs/{path.name}\n{failure}', pytrace=False)
