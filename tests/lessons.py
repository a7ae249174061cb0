"Runs a notebook's cells in a process that has imported already what lessons import."
import multiprocessing, os, sys, tempfile

import torch
from execnb.shell import CaptureShell

IMPORTS = ['IPython.lib.display', 'execnb.shell', 'jiwer', 'matplotlib_inline.backend_inline', 'nbdev.showdoc', 'pandas',
           'pyctcdecode', 'soundfile', 'torch', 'torchaudio']  # nothing of the package: each copy brings its own

def prepare(root, variables, folder):
    "Make this process, which was forked from another, like one that was started in `root`'s notebooks."
    if hasattr(os, 'setsid'): os.setsid()  # a group with whatever it starts
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.path.insert(0, str(root))
    tempfile.tempdir = None  # the variables name another
    torch.set_num_threads(int(variables['OMP_NUM_THREADS']))
    multiprocessing.set_start_method(None, force=True)  # the platform's own

def run(cells, root, variables, failure, folder):
    "Run cells of code as a kernel would; send the first one that fails and what it said, or ''."
    prepare(root, variables, folder)
    shell = CaptureShell(mpl_format='png')
    for cell in cells:
        outputs = shell.run(cell)
        if not shell.exc: continue
        said = [line for o in outputs for line in o.get('text', []) + o.get('traceback', [])]
        return failure.send(f'{cell}\n{"-" * 40}\n{"".join(said)}')
    failure.send('')
