"Reads everything from settings.ini, the one place where the project's metadata is written."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
settings = parser['DEFAULT']
name = settings['lib_name']

setup(
    name=name,
    version=settings['version'],
    description=settings['description'],
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=settings['author'],
    author_email=settings['author_email'],
    license='Apache-2.0',
    keywords=settings['keywords'].split(),
    packages=find_packages(include=[name, f'{name}.*']),
    include_package_data=True,
    python_requires=f">={settings['min_python']},<3.13",  # numpy 1.26, which pyctcdecode needs, has no wheels for 3.13
    install_requires=settings['requirements'].split(),
    extras_require={extra: settings[f'{extra}_requirements'].split()
                    for extra in ('demo', 'dev', 'beam', 'export', 'formats', 'docs')},
    entry_points={'console_scripts': [settings['console_scripts']], 'nbdev': [f'{name}={name}._modidx:d']},
    zip_safe=False,
)
