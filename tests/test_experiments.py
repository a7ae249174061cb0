"Queues: what they refuse, in which order they run, and what is left when they are killed."
import json, os, shutil, signal, subprocess, sys, time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import psutil, pytest
from conftest import ROOT, environment

from self_distill import experiments
from self_distill.config import config_hash, load_config
from self_distill.experiments import BeamValues, QueueError, load_queue, recorded, run_command, run_experiment, run_queue, steps_left, survey
from self_distill.records import RecordError, Utterance, make_array, make_decode, new_record, read_ledger, read_record, write_record
from self_distill.trainer import train

CONFIG = '''# A run of seconds.
data: {utterances: 48}
model: {num_layers: 1, hidden_size: 16, conv_channels: 16}
feature_matching: {teacher_layers: [0], student_layers: [0]}
training: {epochs: 6, batch_size: 6, gradient_accumulation_steps: 1, optimizer: {learning_rate: 1e-2}}
threads: 1
'''
QUEUE = '''
title: a test
config: tiny.yaml
overrides: {augmentation.time_width: 20}
groups:
  main:
    title: synthetic speech
    prefix: tiny
    frozen: a test of the queue
    decoders: {beam: {lm_weight: 0.5, beam_width: 4}}
    rows:
      student: {seed: 100, teacher: baseline}
      control: {seed: 100}
      baseline: {seed: 0}
'''

@pytest.fixture
def root(tmp_path, shared_cache, monkeypatch):
    "A folder of its own with a tiny queue."
    (tmp_path/'tiny.yaml').write_text(CONFIG)
    (tmp_path/'queue.yaml').write_text(QUEUE)
    os.symlink(shared_cache, tmp_path/'cache', target_is_directory=True)
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    return tmp_path

def changed(root, old, new):
    assert old in QUEUE
    (root/'queue.yaml').write_text(QUEUE.replace(old, new))

# what a queue says

def test_the_queues_of_this_repository_can_be_read():
    for path in sorted((ROOT/'configs/experiments').glob('*.yaml')): assert load_queue(path)

def test_an4_has_the_rows_of_the_plan():
    runs = load_queue(ROOT/'configs/experiments/an4.yaml')
    folds = Counter(x.row for x in runs.values() if x.group == 'folds')
    assert folds == dict(baseline=5, student=5, control=5, compute=5)
    for x in runs.values():
        if x.group == 'folds': assert x.config.data.fold == x.number and x.config.seed == x.number + (0 if x.row == 'baseline' else 100)
        if x.teacher: assert list(runs).index(x.teacher) < list(runs).index(x.name)
    assert runs['an4_folds_student_f3'].teacher == 'an4_folds_baseline_f3'
    assert runs['an4_folds_compute_f0'].config.training.epochs == sum(runs[n].config.training.epochs for n in ('an4_folds_baseline_f0', 'an4_folds_student_f0'))
    hashes = Counter(config_hash(x.config) for x in runs.values() if x.group in ('ablations', 'options'))
    assert set(hashes.values()) == {1}, 'two ablations are the same experiment'

@pytest.mark.parametrize('old, new, message', [
    ('frozen: a', 'frozn: a', 'groups.main.frozn`: unknown key; the nearest valid key is `frozen`'),
    ('title: a test\n', 'title: a test\nrow: 1\n', '`row`: unknown key'),
    ('lm_weight', 'lm_wait', 'unknown key; the nearest valid key is `lm_weight`'),
    ('beam_width: 4', 'beam_width: 0', 'greater than or equal to 1'),
    ('seed: 0', 'seed: -1', 'groups.main.rows.baseline.seed'),
    ('augmentation.time_width', 'augmentation.time_wide', 'unknown key `augmentation.time_wide`'),
    ('teacher: baseline', 'teacher: basline', "no row 'basline' in group 'main'"),
    ('seed: 0', 'seed: 0, teacher: student', 'in a circle'),
    ('config: tiny.yaml', 'config: tinny.yaml', 'did you mean tiny.yaml'),
    ('config: tiny.yaml', '', 'no config file'),
    ('title: a test', 'title: [a', 'not valid YAML')])
def test_a_wrong_queue_is_refused_by_place(root, old, new, message):
    changed(root, old, new)
    with pytest.raises(ValueError, match='queue.yaml|tiny') as caught: load_queue('queue.yaml')
    assert message in str(caught.value)

def test_unknown_override_run_and_group_are_refused(root):
    with pytest.raises(ValueError, match='training.epochs'): load_queue('queue.yaml', ['training.epoch=1'])
    with pytest.raises(QueueError, match='did you mean tiny_student'): run_experiment('queue.yaml', 'tiny_studnt')
    with pytest.raises(QueueError, match='has no group mine; it has main'): run_queue('queue.yaml', only=['mine'])

def test_a_teacher_that_has_heard_the_test_speakers_is_refused(root):
    changed(root, 'teacher: baseline', 'folds: [0, 1], teacher: baseline') # one baseline for both folds
    with pytest.raises(QueueError, match=r'queue.yaml: tiny_student_f0 \(fold 0 of protocol folds\) would be taught by tiny_baseline \(protocol official\), which has heard test speakers'): load_queue('queue.yaml')
    changed(root, 'frozen: a test of the queue', 'folds: [0, 1]')
    assert load_queue('queue.yaml')['tiny_student_f1'].teacher == 'tiny_baseline_f1'

def test_commands_of_a_list_are_words_for_a_shell(root):
    assert run_command('a queue.yaml', 'tiny_control', ['data.path=/my data']) == "self-distill experiments 'a queue.yaml' --run tiny_control 'data.path=/my data'"

# what counts as done

def bare_record(x, **fields):
    return new_record('training', x.config, epochs=[dict(epoch=1, wer=50.0)], **fields)

def test_a_corrupt_record_is_named_and_kept(root):
    runs = load_queue('queue.yaml')
    path = write_record(bare_record(runs['tiny_control']))
    path.write_text(path.read_text()[:200])
    with pytest.raises(RecordError, match='tiny_control.json'): survey(runs)
    with pytest.raises(RecordError, match='tiny_control.json'): run_queue('queue.yaml', poll=0.01)
    assert len(path.read_text()) == 200

def test_records_of_other_settings_or_teachers_do_not_count(root):
    runs = load_queue('queue.yaml')
    write_record(bare_record(runs['tiny_control']))
    with pytest.raises(QueueError, match='training.epochs 6, now 7.*rename the row'): recorded(load_queue('queue.yaml', ['training.epochs=7'])['tiny_control'])
    assert recorded(load_queue('queue.yaml', ['threads=2', 'device=cpu'])['tiny_control'])
    write_record(bare_record(runs['tiny_student'], teacher=dict(run='another', checkpoint_sha256='0')))
    with pytest.raises(QueueError, match='taught by another'): recorded(runs['tiny_student'])

def test_a_test_set_is_read_only_where_the_row_is_frozen(root):
    record = bare_record(load_queue('queue.yaml')['tiny_control'])
    assert ('decode', 'test') in steps_left(load_queue('queue.yaml')['tiny_control'], record)
    changed(root, '    frozen: a test of the queue\n', '')
    assert ('decode', 'test') not in steps_left(load_queue('queue.yaml')['tiny_control'], record)

SPOKEN = [Utterance(id='u', speaker='s', duration=1.0, reference='go on')]
VALUES = dict(lm_weight=0.35, word_insertion=0.0, beam_width=20, engine='pyctcdecode') # as a record keeps them, not the defaults

def decoded(x, *more):
    "A record that has read dev and test, greedily and with VALUES, and `more`: (split, decoder, checkpoint)."
    known = [(s, d, 'best') for s in ('dev', 'test') for d in ('greedy', 'beam')]
    decodes = [make_decode(s, d, SPOKEN, ['go on'], VALUES if d == 'beam' else {}, c, '0' * 64) for s, d, c in [*known, *more]]
    return bare_record(x, utterances=dict(dev=SPOKEN, test=SPOKEN), decodes=decodes, arrays={'entropy/temperature': make_array([1.0])})

@pytest.mark.parametrize('values, left', [('search', []), ('{lm_weight: 0.35, word_bonus: 0.0, beam_width: 20}', []), ('{lm_weight: 0.4, word_bonus: 0.0, beam_width: 20}', ['dev', 'test']),
                                          ('{lm_weight: 0.35, beam_width: 20}', ['dev', 'test']), ('{lm_weight: 0.35, word_bonus: 0.0, beam_width: 10}', ['dev', 'test'])])
def test_decodings_with_other_values_are_made_again(root, values, left):
    changed(root, '{lm_weight: 0.5, beam_width: 4}', values)
    x = load_queue('queue.yaml')['tiny_control']
    assert steps_left(x, decoded(x)) == [('decode', split) for split in left]

def test_an_ensemble_of_other_epochs_is_made(root):
    changed(root, 'decoders: {beam: {lm_weight: 0.5, beam_width: 4}}', 'decoders: {beam: search}\n    ensemble: [4, 2]')
    x = load_queue('queue.yaml')['tiny_control']
    assert steps_left(x, decoded(x, *((s, 'greedy', 'ensemble_002_004') for s in ('dev', 'test')))) == []
    assert steps_left(x, decoded(x, *((s, 'greedy', 'ensemble_002_004_006') for s in ('dev', 'test')))) == [('ensemble', 'dev'), ('ensemble', 'test')]

def test_records_of_this_repository_hold_the_values_of_its_queue():
    for x in load_queue(ROOT/'configs/experiments/an4.yaml').values():
        record = recorded(x, ROOT/'results')
        for d in record.decodes if record else ():
            if isinstance(x.decoders.get(d.decoder), BeamValues): assert experiments._decoded(record, d.split, d.decoder, x.decoders[d.decoder]), (x.name, d.settings)
            if d.checkpoint.startswith('ensemble'): assert d.checkpoint == experiments._ensemble_name(x.ensemble)

def test_the_test_set_is_read_with_the_values_of_dev(root, monkeypatch):
    "Also where models/<run>/decoding.json is missing; and once a decoder, with the former values' decoding replaced."
    changed(root, '{lm_weight: 0.5, beam_width: 4}', 'search')
    x = load_queue('queue.yaml')['tiny_control']
    record, asked, scored = decoded(x), [], []
    record = record.model_copy(update=dict(decodes=[d for d in record.decodes if (d.split, d.decoder) != ('test', 'beam')]))
    loaded, decoder = SimpleNamespace(sha256='0' * 64, path=x.checkpoint, tokenizer=None), nullcontext()
    decoder.decode_batch = None
    monkeypatch.setattr(experiments, 'open_split', lambda *_: (loaded, None, SimpleNamespace(checkpoint='best'), record))
    monkeypatch.setattr(experiments, 'build_decoder', lambda *a: asked.append(a[3]) or (decoder, {}, ''))
    monkeypatch.setattr(experiments, 'score', lambda record, *a, **k: scored.append(record) or record)
    experiments._decode(x, 'test', 'cpu')
    assert asked == [dict(lm_weight=0.35, word_bonus=0.0, beam_width=20)]
    given = load_queue('queue.yaml')['tiny_control']
    given.decoders['beam'] = BeamValues(lm_weight=0.5)
    experiments._decode(given, 'dev', 'cpu')
    assert asked[-1]['lm_weight'] == 0.5 and not [d for d in scored[-1].decodes if (d.split, d.decoder) == ('dev', 'beam')]

def test_a_search_with_more_text_has_its_own_language_model(root, monkeypatch):
    "Dev is searched and both sets are decoded with it; the record says so, and other text or another order is decoded anew."
    changed(root, '{beam: {lm_weight: 0.5, beam_width: 4}}', '{beam: search, beam_text: {order: 5, extra_text: [more.txt]}}')
    x = load_queue('queue.yaml')['tiny_control']
    record, searched, built, kept = decoded(x), [], [], []
    decoder = nullcontext()
    decoder.decode_batch = None
    loaded = SimpleNamespace(config=x.config, tokenizer=None)
    monkeypatch.setattr(experiments, 'open_split', lambda *_: (loaded, None, SimpleNamespace(checkpoint='best'), record))
    monkeypatch.setattr(experiments, 'language_model_for', lambda corpus, config, order, extra_text: f'{order}gram of {" ".join(extra_text)}')
    monkeypatch.setattr(experiments, 'search_beam', lambda *_, language_model, **k: searched.append(language_model))
    monkeypatch.setattr(experiments, 'read_record', lambda path: record)
    monkeypatch.setattr(experiments, 'build_decoder', lambda *a: built.append(a[2:]) or (decoder, dict(VALUES, language_model_order=5), ''))
    monkeypatch.setattr(experiments, 'score', lambda record, logits, batch, name, settings, **k: kept.append((name, settings)) or record)
    assert [s for s in steps_left(x, record)] == [('decode', 'dev'), ('decode', 'test')]
    experiments._decode(x, 'dev', 'cpu')
    assert searched == ['5gram of more.txt'] and built == [('5gram of more.txt', {})]
    assert kept == [('beam_text', dict(VALUES, language_model_order=5, extra_text=['more.txt']))]
    record = record.model_copy(update=dict(decodes=[*record.decodes, make_decode('dev', 'beam_text', SPOKEN, ['go on'], kept[0][1], 'best', '0' * 64)]))
    assert steps_left(x, record) == [('decode', 'test')]
    experiments._decode(x, 'test', 'cpu')
    assert len(searched) == 1 and built[-1] == ('5gram of more.txt', dict(lm_weight=0.35, word_bonus=0.0, beam_width=20))
    for other in (dict(order=4), dict(extra_text=['other.txt'])):
        x.decoders['beam_text'] = x.decoders['beam_text'].model_copy(update=other)
        assert ('decode', 'dev') in steps_left(x, record)

def test_a_wrong_key_of_a_decoder_is_named_with_the_nearest(root):
    changed(root, '{lm_weight: 0.5, beam_width: 4}', '{ordre: 5}')
    with pytest.raises(QueueError, match='ordre`: unknown key; the nearest valid key is `order`'): load_queue('queue.yaml')

def test_a_run_is_not_started_beside_records_of_another_device(root):
    runs = load_queue('queue.yaml')
    record = decoded(runs['tiny_control'])
    write_record(record)
    experiments.refuse_mixing(runs, runs['tiny_baseline'])
    write_record(record.model_copy(update=dict(device=record.device.model_copy(update=dict(name='another processor')))))
    with pytest.raises(QueueError, match='tiny_baseline would be trained on .*tiny_control: cpu, another processor'): run_experiment('queue.yaml', 'tiny_baseline')
    assert not (root/'models').exists()

def test_weights_that_the_record_does_not_tell_of_are_refused(root, monkeypatch):
    "A student is taught, and a test set read, by the weights of the record or by none."
    x = load_queue('queue.yaml')['tiny_baseline']
    write_record(decoded(x).model_copy(update=dict(arrays={})))
    x.checkpoint.parent.mkdir(parents=True)
    x.checkpoint.touch()
    monkeypatch.setattr(experiments, 'load_checkpoint', lambda path: dict(sha256='1' * 64))
    for run in ('tiny_student', 'tiny_baseline'):
        with pytest.raises(QueueError, match='other weights than the record of tiny_baseline'): run_experiment('queue.yaml', run)

def test_weights_that_were_trained_anew_to_the_same_numbers_are_the_records(root, monkeypatch):
    "Records travel without their weights; on the same processor the same command makes them again, at other times."
    x = load_queue('queue.yaml')['tiny_baseline']
    epochs = [dict(epoch=n, wer=wer, loss=wer / 7, seconds=1.0) for n, wer in enumerate((50.0, 30.0, 40.0), 1)]
    record = decoded(x).model_copy(update=dict(epochs=epochs))
    write_record(record)
    assert experiments._lacks_weights(x, record)
    x.checkpoint.parent.mkdir(parents=True)
    x.checkpoint.touch()
    anew = [e | dict(seconds=2.0) for e in epochs]
    def holding(history): monkeypatch.setattr(experiments, 'load_checkpoint', lambda path: dict(sha256='1' * 64, training=dict(history=history)))
    holding(anew[:2])
    experiments._needs_weights(x)
    for other, unfinished in ((anew[:1], True), (anew, False), ([anew[0], anew[1] | dict(loss=4.0)], False), ([], False)): # not the best epoch yet; past it; another number; nothing
        holding(other)
        assert experiments._lacks_weights(x, record) == unfinished
        with pytest.raises(QueueError, match='other weights than the record'): experiments._needs_weights(x)

def test_a_clone_with_records_alone_trains_a_teacher_anew(root, monkeypatch):
    "To the numbers of its record, which stays as it is; other numbers are refused before a student is taught."
    def in_this_process(name, output, parameters):
        train(load_config(parameters['config'], parameters['overrides']))
        return 0
    monkeypatch.setattr(experiments, 'run_notebook', in_this_process)
    path = root/'results/tiny_baseline.json'
    run_experiment('queue.yaml', 'tiny_baseline')
    written = path.read_bytes()
    shutil.rmtree(root/'models')
    student = run_experiment('queue.yaml', 'tiny_student')
    assert path.read_bytes() == written and student.teacher.run == 'tiny_baseline'
    assert student.teacher.checkpoint_sha256 not in {d.checkpoint_sha256 for d in read_record(path).decodes}

    shutil.rmtree(root/'models')
    (root/'results/tiny_student.json').unlink()
    record = read_record(path)
    write_record(record.model_copy(update=dict(epochs=[e | dict(loss=e['loss'] + 1) for e in record.epochs])))
    written = path.read_bytes()
    with pytest.raises(QueueError, match='came to other numbers than its record .loss of epoch 1'): run_experiment('queue.yaml', 'tiny_student')
    assert path.read_bytes() == written and not (root/'models/tiny_student').exists()

def test_a_notebook_has_the_root_of_its_queue(tmp_path, monkeypatch):
    "Not that of the clone which the package is installed from."
    monkeypatch.delenv('SELF_DISTILL_ROOT', raising=False)
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = self_distill\n')
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(subprocess, 'Popen', lambda command, **settings: given.append(settings['env']['SELF_DISTILL_ROOT']) or SimpleNamespace(wait=lambda: 0))
    assert experiments.run_notebook('30_train', tmp_path/'out.ipynb', {}) == 0 and given == [str(tmp_path.resolve())]

# killed, stopped, and two at a time

def queue_process(root):
    code = "from self_distill.experiments import run_queue; run_queue('queue.yaml', jobs=2, poll=0.2)"
    with open(root/'queue.out', 'ab') as out:
        return subprocess.Popen([sys.executable, '-c', code], cwd=root, env=environment(ROOT, SELF_DISTILL_ROOT=str(root)), stdout=out, stderr=out, start_new_session=True)

def wait_for(root, text, process, seconds=120):
    "Until the training log says something."
    end, log = time.monotonic() + seconds, root/'logs/training.log'
    while not (log.exists() and text in log.read_text()):
        assert process.poll() is None and time.monotonic() < end, (root/'queue.out').read_text()
        time.sleep(0.05)

def kill_tree(process):
    "End a process and all that it started, as a power cut would."
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try: member.kill()
        except psutil.NoSuchProcess: pass
    psutil.wait_procs(family, timeout=20)
    process.wait()

def finish(root, *processes):
    for p in processes: assert p.wait(timeout=280) == 0, (root/'queue.out').read_text() + ''.join(f.read_text() for f in root.glob('logs/*/queue.log'))

def killed_and_resumed(root, runs, queues):
    "Kill a queue in its first run, let others finish; what is held of every outcome."
    first = queue_process(root)
    wait_for(root, 'tiny_baseline: Epoch 2/6', first)
    kill_tree(first)
    finish(root, *(queue_process(root) for _ in range(queues)))
    log = (root/'logs/training.log').read_text()
    records = {n: read_record(f'results/{n}.json') for n in runs}
    assert log.count('Resumed tiny_baseline') == 1 and log.count('Started tiny_student') == 1
    assert log.index('tiny_baseline: Epoch 6/6') < log.index('Started tiny_student')
    assert records['tiny_student'].teacher.checkpoint_sha256 == records['tiny_baseline'].decodes[0].checkpoint_sha256
    for name, record in records.items():
        assert [e['epoch'] for e in record.epochs] == [1, 2, 3, 4, 5, 6]
        assert log.count(f'{name}: Epoch 6/6') == 1
        assert record.arrays['entropy/temperature'].shape == record.arrays['entropy/all_frames'].shape
    return records

def test_a_killed_queue_goes_on_where_it_was(root):
    changed(root, '      control: {seed: 100}\n', '')
    text = (root/'queue.yaml').read_text()
    (root/'queue.yaml').write_text(''.join(line for line in text.splitlines(True) if 'frozen' not in line and 'decoders' not in line))
    killed_and_resumed(root, ['tiny_baseline', 'tiny_student'], queues=1)
    before = {p: p.read_bytes() for p in (root/'results').iterdir()}
    assert {s.state for s in run_queue('queue.yaml', poll=0.01).values()} == {'done'}
    assert before == {p: p.read_bytes() for p in (root/'results').iterdir()}
    assert not len(read_ledger()), 'nothing here is frozen'

@pytest.mark.torture
def test_two_queues_share_the_work_of_a_killed_one(root):
    records = killed_and_resumed(root, ['tiny_baseline', 'tiny_student', 'tiny_control'], queues=2)
    for record in records.values():
        assert {(d.split, d.decoder) for d in record.decodes} == {(s, d) for s in ('dev', 'test') for d in ('greedy', 'beam')}
    ledger = read_ledger()
    assert len(ledger) == 6 and set(ledger.why) == {'a test of the queue'}, 'every test set is read once'

@pytest.mark.torture
def test_a_stopped_queue_writes_its_checkpoints_and_leaves_no_process(root):
    changed(root, '      student: {seed: 100, teacher: baseline}\n      control: {seed: 100}\n', '')
    (root/'tiny.yaml').write_text(CONFIG.replace('epochs: 6', 'epochs: 2000'))
    process = queue_process(root)
    wait_for(root, 'tiny_baseline: Epoch 1/', process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    assert 'stopped by SIGTERM; the same command goes on' in (root/'queue.out').read_text()
    assert 'Stopped by SIGTERM' in (root/'logs/training.log').read_text()
    assert not psutil.wait_procs(family, timeout=20)[1]
