"A corpus looked at before training: its faults, and nothing is changed or left behind but the page."
import re

import numpy as np, pandas as pd, pytest
from conftest import DATA, ROOT
from self_distill.data.demo import picture_values, write_pictures

from self_distill.use.cli import main
from self_distill.core.config import build_config
from self_distill.use.prepare import faults_of, look, prepare

@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    write_pictures(tmp_path)
    return tmp_path

def config(**more): return build_config(picture_values(**more))
def change(root, **columns): # column → {row: value}
    table = pd.read_csv(root/'pictures.csv', dtype=object)
    for name, values in columns.items():
        for k, value in values.items(): table.loc[k, name] = value
    table.to_csv(root/'pictures.csv', index=False)

def test_a_sound_corpus_has_its_page_figure_and_cost(root, capsys):
    found = prepare(config())
    assert found.faults == found.left_out == [] and 'an epoch of 7 updates' in found.page() and '120 .npy' in found.page()
    assert (root/'runs/pictures/prepare.txt').read_text() == found.page() + '\n' and (root/'runs/pictures/prepare.png').stat().st_size > 10_000
    assert found.page() in capsys.readouterr().out
    assert not (root/'models').exists() and not (root/'results').exists()             # nothing was trained

def test_all_unusable_utterances_are_told_at_once(root):
    np.save(root/'nan.npy', np.full((80, 12), np.nan, np.float32))
    change(root, path={7: 'nan.npy', 8: 'missing.npy'}, text={12: '?', 13: 'the xylophones'})
    corpus, faults = faults_of(config(text=dict(alphabet=' adehilnorst')))
    told = ["'?' holds no word", 'outside the vocabulary', 'not finite', 'missing.npy: no such file']
    assert len(faults) == len(told) and all(sum(t in f for f in faults) == 1 for t in told), faults
    assert len(corpus.manifest) == 120 - len(told) and corpus.input_size == 12        # what is left could be trained on

@pytest.mark.parametrize('told, columns', [
    ('ids given more than once: u000', dict(id={1: 'u000'})), ('splits dve are unknown', dict(split={2: 'dve'})),
    ('recordings in more than one split', dict(path={4: '0.npy'})), ('would be spelled in English', dict(text={13: 'the 2 seas'})),
    ('same content in more than one split', dict(path={4: 'copy.npy'})), ('frames of different widths', dict(path={6: 'wide.npy'})),
    ('no such file', dict(path={k: f'no{k}.npy' for k in range(120)}))])
def test_a_fault_of_the_table_is_told(root, told, columns):
    np.save(root/'wide.npy', np.zeros((80, 13), np.float32))
    (root/'copy.npy').write_bytes((root/'3.npy').read_bytes())                        # a dev recording that is a training one
    change(root, **columns)
    corpus, faults = faults_of(config(text=dict(alphabet='αβ adehilnorst')))
    assert corpus is None and any(told in f for f in faults) and len(faults) <= 2, faults

def test_a_teacher_that_is_not_there_is_a_fault(root):
    faults = look(config(teacher=dict(checkpoint='models/nobody/checkpoint_best.pt'))).faults
    assert len(faults) == 1 and 'no such checkpoint' in faults[0]

def test_the_command(root, capsys):
    words = ['prepare', '--config', str(ROOT/'configs/demo.yaml'), 'data.corpus=manifest', 'data.path=pictures.csv', 'features.kind=precomputed', 'model.hidden_size=16', 'run=mine']
    for more, code, told in (('text.alphabet=train', 0, 'faults: 0'), ('data.path=nowhere.csv', 1, 'nowhere.csv'), ('text.alphabet=abc', 1, 'outside the vocabulary')):
        with pytest.raises(SystemExit) as stopped: main([*words, more])
        assert (stopped.value.code or 0) == code and told in capsys.readouterr().out
    assert (root/'runs/mine/prepare.txt').exists()

def test_texts_shared_between_splits(root):
    change(root, text={4: 'the sea is near', 0: 'the sea is near', 5: 'the lost sea'}, speaker={4: 's00'})
    page = look(config(text=dict(alphabet=' adehilnorst'))).page()
    assert re.search(r'dev: [1-9]\d* of 20 sentences and 1 of \d+ speakers', page) and 'lost' in page.partition('are unknown to it')[2]

PROMPTS = DATA/'prompts/manifest.csv'

@pytest.mark.skipif(not PROMPTS.exists(), reason='no prompts/ in data/ or $SELF_DISTILL_DATA')
def test_raw_recordings(root, shared_cache):
    found = look(build_config(dict(run='prompts', data=dict(corpus='manifest', path=str(PROMPTS), cache=str(shared_cache)))))
    assert {f.split("'")[1].removeprefix('audio/') for f in found.faults} == {'confbridge-binaural-off', 'confbridge-binaural-on', 'demo-instruct', 'spy-h323'}
    assert all('can be read in two ways' in f for f in found.faults)
    assert len(found.left_out) == 3 and 'features.sample_rate=8000 suits them' in found.page() and re.search(r'signs that are gone: .*\b1 \(', found.page())
