"Records and ledger across processes, after failures, and those that are committed"
import json, os
from concurrent.futures import ProcessPoolExecutor

from conftest import ROOT

from self_distill.core.config import Config
from self_distill.core.records import append_ledger, read_ledger, Utterance, add_decode, make_decode, new_record, record_text, records_in
from self_distill.core.metrics import PARTS, count_errors

SPOKEN = [Utterance(id=f'u{k}', speaker=f's{k % 3}', duration=1.5, reference='größe über alles') for k in range(6)]

def example(hypothesis='größe uber'):
    record = new_record('training', Config(run='example'), epochs=[dict(epoch=1, loss=float('inf'))])
    return add_decode(record, make_decode('dev', 'greedy', SPOKEN, [hypothesis] * 6), SPOKEN)

def counted(decode, utterances):
    "Whether a decoding's counts are a recount of its texts"
    counts = count_errors([u.reference for u in utterances], decode.hypotheses)
    return all(getattr(decode.words, name) == counts[name].tolist() for name in PARTS)

def test_infinity_has_no_json():
    assert json.loads(record_text(example()))['epochs'] == [{'epoch': 1, 'loss': None}]

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

def test_committed_records_are_valid_and_their_test_readings_are_in_the_ledger():
    readings = set(read_ledger().run)
    for record in records_in('results'):
        for decode in record.decodes: assert counted(decode, record.utterances[decode.split]), f'{record.run}: {decode.key}'
        if any(d.split == 'test' for d in record.decodes): assert record.run in readings, f'{record.run}: no line in the ledger'

