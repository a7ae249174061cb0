"Write requirements.lock: one resolution of settings.ini's requirements for every platform and Python that setup.py admits."
import json, re, subprocess, sys, tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT/'requirements.lock'
EXTRAS = 'demo', 'dev', 'beam'  # tools/install.py leaves beam out where it has no wheel
PLATFORMS = 'linux', 'darwin', 'win32'
PYTHON_BELOW = "python_full_version < '3.13'"

def requirements():
    "What settings.ini asks for, the locked extras included, and the oldest Python."
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    settings = parser['DEFAULT']
    keys = ['requirements', *(f'{extra}_requirements' for extra in EXTRAS)]
    return [o for key in keys for o in settings[key].split()], settings['min_python']

def shorten(lock):
    "Drop what every line says: any of the platforms, below the newest Python."
    everywhere = ' or '.join(f"sys_platform == '{o}'" for o in sorted(PLATFORMS))
    lock = lock.replace(f' and ({everywhere})', '')
    lock = lock.replace(f'{PYTHON_BELOW} and ', '').replace(f' and {PYTHON_BELOW}', '')
    return re.sub(f' ; {re.escape(PYTHON_BELOW)}$', '', lock, flags=re.M)

def main():
    wanted, oldest = requirements()
    environments = [f"sys_platform == '{o}' and {PYTHON_BELOW}" for o in PLATFORMS]
    with tempfile.TemporaryDirectory() as folder:
        # uv takes platforms and an upper bound on Python only from a pyproject.toml, so it is given one
        project, lock = Path(folder)/'pyproject.toml', Path(folder)/'requirements.lock'
        project.write_text(f'[project]\nname = "locked"\nversion = "0"\nrequires-python = ">={oldest}"\n'
                           f'dependencies = {json.dumps(wanted)}\n[tool.uv]\nenvironments = {json.dumps(environments)}\n')
        if LOCK.exists() and '--upgrade' not in sys.argv: lock.write_text(LOCK.read_text(encoding='utf-8'))
        options = ['--universal', '--python-version', oldest, '--no-annotate', '--no-emit-index-url', '--quiet',
                   '--custom-compile-command', 'make lock', '--output-file', str(lock), *sys.argv[1:]]
        subprocess.run([sys.executable, '-m', 'uv', 'pip', 'compile', str(project), *options], check=True, cwd=folder)
        LOCK.write_text(shorten(lock.read_text()), encoding='utf-8', newline='\n')

if __name__ == '__main__': main()
