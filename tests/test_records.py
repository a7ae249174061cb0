"Records and ledger across processes, after failures, and those that are committed"
import json, multiprocessing, os, subprocess, sys
from concurrent.futures import ProcessPoolExecutor

import pytest
from conftest import ROOT

from self_distill.config import Config
from self_distill.ledger import append_ledger, read_ledger
from self_distill.metrics import PARTS, count_errors
from self_distill.records import Utterance, add_decode, make_decode, new_record, read_record, record_text, records_in, write_record

SPOKEN = [Utterance(id=f'u{k}', speaker=f's{k % 3}', duration=1.5, reference='größe über alles') for k in range(6)]

def example(hypothesis='größe uber'):
    record = new_record('training', Config(run='example'), epochs=[dict(epoch=1, loss=float('inf'))])
    return add_decode(record, make_decode('dev', 'greedy', SPOKEN, [hypothesis] * 6), SPOKEN)

def counted(decode, utterances):
    "Whether a decoding's counts are a recount of its texts"
    counts = count_errors([u.reference for u in utterances], decode.hypotheses)
    return all(getattr(decode.words, name) == counts[name].tolist() for name in PARTS)

def test_text_is_the_same_in_every_process(tmp_path):
    path = write_record(example(), tmp_path)
    code = f'from self_distill.records import *; print(record_text(read_record({str(path)!r})), end="")'
    for seed in ('0', '1'):
        done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, check=True, env=os.environ | {'PYTHONHASHSEED': seed})
        assert done.stdout == path.read_bytes()
    assert json.loads(path.read_text(encoding='utf-8'))['epochs'] == [{'epoch': 1, 'loss': None}] # infinity has no JSON

@pytest.mark.parametrize('failing', ['replace', 'fsync'])
def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch, failing):
    path = write_record(example(), tmp_path)
    before = path.read_bytes()
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match='No space left'): write_record(example('alles'), tmp_path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]

def _append(arguments):
    path, worker = arguments
    for k in range(25): append_ledger(f'run{worker}', 'greedy ' + 'x' * 3000, 'demo', 'abc', f'reading {k}', path=path)

def test_processes_append_whole_lines(tmp_path):
    path = tmp_path/'ledger.jsonl'
    with ProcessPoolExecutor(4) as pool: list(pool.map(_append, [(path, k) for k in range(4)]))
    assert read_ledger(path).groupby('run').size().tolist() == [25] * 4

def test_nothing_personal_is_recorded():
    config = Config(run='paths')
    config.data.path, config.teacher.checkpoint = '/home/someone/an4', str(ROOT/'models/baseline/checkpoint_best.pt')
    text = record_text(new_record('training', config))
    assert '/home' not in text and str(ROOT) not in text and 'models/baseline/checkpoint_best.pt' in text
    for name in map(os.environ.get, ('HOSTNAME', 'USER')): assert not name or len(name) < 6 or name not in text

def test_stored_counts_are_a_recount(): assert counted(example('größe alles ja ja').decodes[0], SPOKEN)

def test_committed_records_are_valid_and_their_test_readings_are_in_the_ledger():
    readings = set(read_ledger().run)
    for record in records_in('results'):
        for decode in record.decodes: assert counted(decode, record.utterances[decode.split]), f'{record.run}: {decode.key}'
        if any(d.split == 'test' for d in record.decodes): assert record.run in readings, f'{record.run}: no line in the ledger'

def _decode_in_a_process(arguments):
    root, k = arguments
    os.environ['SELF_DISTILL_ROOT'] = str(root)
    from self_distill.evaluate import Beam, evaluate
    evaluate('models/pictures/checkpoint_best.pt', decoders=[Beam(name=f'beam{k}', workers=1)], show=False)

def test_decodings_at_once_are_all_kept(tmp_path, monkeypatch):
    from self_distill.pictures import picture_config, write_pictures
    from self_distill.training import train
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    write_pictures(tmp_path)
    train(picture_config(training=dict(epochs=1)))
    with ProcessPoolExecutor(3, multiprocessing.get_context('spawn')) as pool: list(pool.map(_decode_in_a_process, [(tmp_path, k) for k in range(3)]))
    assert {d.decoder for d in read_record('results/pictures.json').decodes} == {'greedy', 'beam0', 'beam1', 'beam2'}

