"Records and ledger across processes, after failures, and those that are committed."
import json, os, subprocess, sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from self_distill.config import Config, find_root
from self_distill.metrics import PARTS, count_errors
from self_distill.records import (LEDGER, Utterance, add_decode, append_ledger, make_decode, new_record, read_ledger, read_record,
                                  record_text, records_in, write_record)

ROOT = find_root()
SPOKEN = [Utterance(id=f'u{k}', speaker=f's{k % 3}', duration=1.5, reference='größe über alles') for k in range(6)]


def example(run='example', hypothesis='größe uber'):
    return add_decode(new_record('training', Config(run=run), epochs=[dict(epoch=1, loss=float('inf'))]),
                      make_decode('dev', 'greedy', SPOKEN, [hypothesis] * 6), SPOKEN)


def test_text_is_the_same_in_every_process(tmp_path):
    path = write_record(example(), tmp_path)
    code = f'from self_distill.records import *; print(record_text(read_record({str(path)!r})), end="")'
    for seed in ('0', '1'):
        done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, check=True, env=os.environ | {'PYTHONHASHSEED': seed})
        assert done.stdout == path.read_bytes()
    assert json.loads(path.read_text(encoding='utf-8'))['epochs'] == [{'epoch': 1, 'loss': None}]      # infinity has no JSON


@pytest.mark.parametrize('failing', ['replace', 'fsync'])
def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch, failing):
    path = write_record(example(), tmp_path)
    before = path.read_bytes()
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match='No space left'): write_record(example(hypothesis='alles'), tmp_path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def _append(arguments):
    path, worker = arguments
    for k in range(25): append_ledger(f'run{worker}', 'greedy ' + 'x' * 3000, 'demo', 'abc', f'reading {k}', path=path)


def test_processes_append_whole_lines(tmp_path):
    path = tmp_path / 'ledger.jsonl'
    with ProcessPoolExecutor(4) as pool: list(pool.map(_append, [(path, k) for k in range(4)]))
    assert read_ledger(path).groupby('run').size().tolist() == [25] * 4


def test_nothing_personal_is_recorded(tmp_path, monkeypatch):
    config = Config(run='paths')
    config.data.path, config.teacher.checkpoint = '/home/someone/an4', str(ROOT / 'models/baseline/checkpoint_best.pt')
    text = record_text(new_record('training', config))
    assert '/home' not in text and str(ROOT) not in text and 'models/baseline/checkpoint_best.pt' in text
    for name in (os.environ.get('HOSTNAME'), os.environ.get('USER')): assert not name or len(name) < 6 or name not in text


def test_outside_a_repository_the_revision_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    record = example()
    assert (record.git.revision, record.git.dirty) == (None, None)
    assert read_record(write_record(record)) == record and (tmp_path / 'results/example.json').exists()


def test_stored_counts_are_a_recount(tmp_path):
    decode = example(hypothesis='größe alles ja ja').decodes[0]
    counts = count_errors([u.reference for u in SPOKEN], decode.hypotheses)
    assert {name: getattr(decode.words, name) for name in PARTS} == {name: counts[name].tolist() for name in PARTS}


def test_committed_records_are_valid_and_their_test_readings_are_in_the_ledger():
    readings = read_ledger(LEDGER)
    for record in records_in('results'):
        for decode in record.decodes:
            references = [u.reference for u in record.utterances[decode.split]]
            counts = count_errors(references, decode.hypotheses)
            assert [counts[name].tolist() for name in PARTS] == [getattr(decode.words, name) for name in PARTS], f'{record.run}: {decode.decoder} on {decode.split}'
        if any(d.split == 'test' for d in record.decodes): assert record.run in set(readings.run), f'{record.run}: its test set was read, and the ledger does not say so'
