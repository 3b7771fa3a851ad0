"Packaging: everything is read from settings.ini, the project's one home for its metadata."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], license='Apache-2.0',
    description=cfg['description'], long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown', keywords=cfg['keywords'], author=cfg['author'],
    author_email=cfg['author_email'], url=cfg['git_url'],
    packages=find_packages(include=['phi4_ref*']), include_package_data=True,
    package_data={'phi4_ref': ['configs/*.yaml', 'configs/accelerate/*.yaml']},
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={
        'dev': cfg['dev_requirements'].split(), 'gpu': ['flash-attn'], 'pdf': ['pypdfium2'],
        'scale': ['datatrove'], 'gguf': ['gguf>=0.10'], 'eval': ['lm-eval'], 'peft': ['peft'], 'zst': ['zstandard'], 'deepspeed': ['deepspeed>=0.19'], 'bench': ['trl>=1.16', 'trafilatura'],
    },
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    zip_safe=False,
)
