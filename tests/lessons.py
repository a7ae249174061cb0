"Runs a notebook's cells in a process that has imported already what lessons import."
import os, sys, tempfile

from execnb.shell import CaptureShell

IMPORTS = ['lessons', 'IPython.lib.display', 'jiwer', 'matplotlib_inline.backend_inline', 'nbdev.showdoc', 'pandas',
           'pyctcdecode', 'soundfile', 'torch', 'torchaudio']  # nothing of the package: each copy brings its own

def run(cells, root, variables, failure):
    "Run cells of code as a kernel in `root`'s notebooks would; send the first one that fails and what it said, or ''."
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # that of the variables
    os.chdir(root/'nbs')
    sys.path.insert(0, str(root))
    shell = CaptureShell(mpl_format='png')
    for cell in cells:
        outputs = shell.run(cell)
        if not shell.exc: continue
        said = ''.join(line for o in outputs if o['output_type'] == 'stream' for line in o['text'])
        return failure.send(f'{cell}\n{"-" * 40}\n{said}')
    failure.send('')
