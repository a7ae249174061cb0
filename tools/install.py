"""Install everything into .venv, from any Python 3: `make install`, or `python tools/install.py` where there is no make.

Finds a Python 3.11 or 3.12 (or lets uv bring one), makes .venv, installs what requirements.lock names and then the
project itself, editable. Where kenlm cannot be built, it says what to install and goes on. Where
ctc-beam-decoder has no wheel, pyctcdecode searches in its place.
"""
import os, re, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK, VENV = ROOT/'requirements.lock', ROOT/'.venv'
BIN = VENV/('Scripts' if os.name == 'nt' else 'bin')
PYTHON = BIN/('python.exe' if os.name == 'nt' else 'python')
VERSIONS = '3.11', '3.12'  # the locked versions were measured together on 3.11, so it comes first

NO_WHEEL = 'ctc-beam-decoder has no wheel for this machine: the beam search uses pyctcdecode, with the same texts, slower'
COMPILER = """
  kenlm is not installed, for want of a C++ compiler and Python's headers. {works} without it. To have it too, install
    Debian, Ubuntu:   apt-get install build-essential python3-dev
    Fedora, RHEL:     dnf install gcc-c++ python3-devel
    macOS:            xcode-select --install
    Windows:          the Visual Studio Build Tools, with "Desktop development with C++"
  and then run: make -B install    (without make: python tools/install.py)
"""
NO_PYTHON = """
  No Python 3.11 or 3.12 with its venv module was found, and uv could not bring one: that takes a network.
  Install one as the system offers it (Debian 12 and Ubuntu 24.04: apt-get install python3 python3-venv) and try again.
"""
SAVE_HOOK = f"""
from pathlib import Path

def clean_on_save(model, path, contents_manager, **kwargs):
    "Strip from this project's notebooks what git should not see, as nbdev_clean does."
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    root = Path({str(ROOT)!r})
    if model['type'] != 'notebook' or root not in Path(contents_manager.root_dir, path.strip('/')).resolve().parents: return
    settings = get_config(path=root)
    clean_nb(model['content'], allowed_cell_metadata_keys=settings.allowed_cell_metadata_keys.split(), clean_ids=settings.clean_ids)

c.ContentsManager.pre_save_hook = clean_on_save
"""

def say(message): print(f'install: {message}', flush=True)

def run(*command, **kwargs): return subprocess.run([str(o) for o in command], **kwargs)

def answers(*command):
    "What `command` prints, or None where it is missing or fails."
    try: done = run(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    except OSError: return None
    return done.stdout.decode().strip() if done.returncode == 0 else None

def version(*python): return answers(*python, '-c', 'import sys; print("%d.%d" % sys.version_info[:2])')

def can_make_venv(*python): return answers(*python, '-c', 'import venv, ensurepip') is not None

def find_python():
    "The command of a Python 3.11 or 3.12 that can make a virtual environment, or None."
    names = [[f'python{o}'] for o in VERSIONS] + [['py', f'-{o}'] for o in VERSIONS] + [['python3'], ['python'], [sys.executable]]
    return next((o for o in names if version(*o) in VERSIONS and can_make_venv(*o)), None)

def make_venv(uv):
    "Make .venv with a Python that is here, else with one that uv brings."
    python = find_python()
    if python:
        say(f'making .venv with Python {version(*python)}')
        return run(*python, '-m', 'venv', '--clear', VENV, check=True)
    say(f'no Python {" or ".join(VERSIONS)} here: asking uv for one')
    with tempfile.TemporaryDirectory() as folder:
        command = [shutil.which('uv')]
        if command == [None]:
            if not can_make_venv(sys.executable): sys.exit(NO_PYTHON)
            run(sys.executable, '-m', 'venv', folder, check=True)
            command = [Path(folder)/BIN.name/PYTHON.name, '-m', 'uv']
            run(*command[:2], 'pip', 'install', '--quiet', uv, check=True)
        if run(*command, 'venv', '--seed', '--clear', '--python', VERSIONS[0], VENV).returncode: sys.exit(NO_PYTHON)

def can_compile():
    "Whether a C++ program that includes Python.h compiles here (on Windows: whether Visual Studio is installed)."
    if os.name == 'nt': return bool(shutil.which('cl') or Path(os.environ.get('ProgramFiles(x86)', '.'),
                                    'Microsoft Visual Studio', 'Installer', 'vswhere.exe').exists())
    include = answers(PYTHON, '-c', 'import sysconfig; print(sysconfig.get_path("include"))')
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)/'try.cpp'
        source.write_text('#include <string>\n#include <Python.h>\n')
        return any(answers(*o.split(), '-I', include, '-c', source, '-o', source.with_suffix('.o')) is not None
                   for o in (os.environ.get('CXX'), 'c++', 'g++', 'clang++') if o)

def install(uv):
    "Everything in requirements.lock, then the project; whether kenlm could be built and ctc-beam-decoder has a wheel."
    pip = [PYTHON, '-m', 'uv', 'pip', 'install', '--python', PYTHON]
    run(PYTHON, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', uv, check=True)
    lines = LOCK.read_text(encoding='utf-8').splitlines(keepends=True)
    kenlm, beam = optional = [next(o for o in lines if o.startswith(f'{name}==')) for name in ('kenlm', 'ctc-beam-decoder')]
    with tempfile.TemporaryDirectory() as folder:
        others = Path(folder)/'requirements.txt'
        others.write_text(''.join(o for o in lines if o not in optional), encoding='utf-8')
        run(*pip, '--build-constraints', LOCK, '-r', others, check=True)
    built = can_compile() and run(*pip, '--build-constraints', LOCK, kenlm.strip()).returncode == 0
    fast = answers(*pip, '--no-deps', '--only-binary', ':all:', beam.strip()) is not None
    run(*pip, '--build-constraints', LOCK, '--no-deps', '--editable', ROOT, check=True)
    return built, fast

def install_hooks():
    """Notebooks are cleaned when Jupyter saves them, and git merges them cell by cell. (nbdev_install_hooks does the same,
    but writes into the home folder and needs nbdev on the PATH; these stay in .venv and in this clone's .git/config.)"""
    config = VENV/'etc'/'jupyter'/'jupyter_server_config.py'
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(SAVE_HOOK.lstrip(), encoding='utf-8')
    top = answers('git', '-C', ROOT, 'rev-parse', '--show-toplevel')
    if not top or Path(top).resolve() != ROOT: return
    driver = f'{(BIN/"nbdev_merge").relative_to(ROOT).as_posix()} %O %A %B %P'
    for key, value in (('name', 'resolve conflicts in notebooks'), ('driver', driver)):
        run('git', '-C', ROOT, 'config', '--local', f'merge.nbdev-merge.{key}', value)

def main():
    locked = re.search(r'^uv==[^\s;]+', LOCK.read_text(encoding='utf-8'), re.M)[0]
    if version(PYTHON) not in VERSIONS: make_venv(locked)
    built, fast = install(locked)
    install_hooks()
    (VENV/'.installed').touch()
    if not fast: say(NO_WHEEL)
    if not built: print(COMPILER.format(works='Everything but perplexities works' if fast else 'Everything but the language model works'))
    say('done')

if __name__ == '__main__':
    try: main()
    except subprocess.CalledProcessError as error:
        sys.exit(f'install: this command failed with exit code {error.returncode}; what it said stands above:\n  {" ".join(error.cmd)}')
