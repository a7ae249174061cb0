"""The trainer's promises that a page cannot hold: accumulation, numbers that are not finite, and what a resumed run refuses."""
import math, shutil, signal, subprocess, sys
from dataclasses import replace

import numpy as np, pandas as pd, pytest, torch
from conftest import ROOT, environment
from self_distill.data.demo import picture_config, write_pictures
from test_torture import TRAINING, settings

from self_distill.evaluate import ensemble, session
from self_distill.core import environment as machine
from self_distill.train import learner, teacher, trainer
from self_distill.data.batches import UtteranceDataset, epoch_batches, frame_batches
from self_distill.train.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint
from self_distill.evaluate.ensemble_table import evaluate_ensemble
from self_distill.evaluate.evaluate import Beam, Greedy, evaluate
from self_distill.train.learner import TrainingError, loader
from self_distill.core.records import RecordError
from self_distill.train.schedule import learning_rate_at
from self_distill.train.trainer import Trainer
from self_distill.train.training import train, training_record

BEST = 'models/short/checkpoint_best.pt'

@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    return tmp_path

@pytest.fixture(scope='module')
def trained(shared_cache, tmp_path_factory):
    "The folder of a run of two epochs."
    root = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SELF_DISTILL_ROOT', str(root))
        train(short(shared_cache))
    return root

def short(cache, run='short', **training): return settings(run, cache, training=TRAINING | dict(epochs=2) | training)

@pytest.fixture
def copy(trained, root):
    "The same folder, for one test to damage."
    shutil.copytree(trained, root, dirs_exist_ok=True)
    return root/'models/short/checkpoint_last.pt'

# accumulation

@pytest.mark.parametrize('batch, steps', [(6, 1), (6, 2), (6, 4), (7, 3), (36, 3), (5, 8), ('frames', 2)])
def test_every_utterance_is_in_one_update_an_epoch(batch, steps, shared_cache, monkeypatch):
    windows, seen = [], []
    def step(self, window, T):
        windows.append((int(self.train_set.epoch), T, [i for batch in window for i in batch.ids]))
        return dict(hard_ctc_loss=1., gradient_norm=1.)
    def end_epoch(self):
        seen.append(windows[:]); windows.clear()
        self.epoch, self.window = self.epoch + 1, 0
    monkeypatch.setattr(Trainer, 'train_step', step)
    monkeypatch.setattr(Trainer, 'end_epoch', end_epoch)
    sizes = dict(batch_frames=1200) if batch == 'frames' else dict(batch_size=batch)
    run = Trainer(short(shared_cache, **sizes, gradient_accumulation_steps=steps))
    run.log.rewind(0)
    run.epoch = 1
    with pytest.raises(trainer.TrainingStopped): run._train(['SIGTERM']) # in the middle: what is left makes the same updates
    run._train([])
    run.epoch = 0
    run._train([])
    for (epoch, T), made in zip(((2, 3.5), (1, 4.), (2, 3.5)), seen, strict=True):
        make, size = (frame_batches, 1200) if batch == 'frames' else (epoch_batches, batch)
        batches = make(run.train_set.lengths, size, 0, epoch)
        expected = [[run.train_set.rows.id[i] for batch in batches[k:k + steps] for i in batch] for k in range(0, len(batches), steps)]
        assert made == [(epoch, T, ids) for ids in expected] and len(made) == run.updates_per_epoch
    assert run.update == 3 * run.updates_per_epoch
    run.log.close()

def test_an_update_is_the_same_in_one_batch_or_several(shared_cache):
    "A loss is divided by the frames of the whole update, and its gradient clipped"
    def updated(*window):
        run = Trainer(short(shared_cache, gradient_clip=0.5))
        run.model.eval() # no dropout, and no batch norm over batches
        numbers = run.train_step([*loader(run.train_set, window)], 4.)
        moments = torch.cat([run.optimizer.state[p]['exp_avg'].flatten() for p in run.parameters])
        return numbers['hard_ctc_loss'], numbers['gradient_norm'], float(moments.norm())
    whole = updated([*range(12)])
    assert updated([*range(3)], [*range(3, 12)]) == pytest.approx(whole, rel=1e-4)
    assert whole[1] > 0.5 and whole[2] == pytest.approx(0.1 * 0.5, rel=1e-3) # Adam's first moment is a tenth of the gradient

def test_the_earliest_of_equal_epochs_is_the_best(shared_cache, root):
    run = Trainer(short(shared_cache))
    run.validate = lambda: dict(wer=50., cer=1., loss=1.)
    run.fit()
    assert (run.epoch, load_checkpoint(root/BEST)['epoch']) == (2, 1)

def test_without_memory_the_remedy_is_told(shared_cache, monkeypatch):
    def full(*_): raise torch.OutOfMemoryError('tried to allocate 2 GiB')
    monkeypatch.setattr(Trainer, 'train_step', full)
    with pytest.raises(TrainingError, match='2 GiB. Remedy: halve training.batch_size'): train(short(shared_cache))

# numbers

def poisoned(run, make=lambda x: x*math.nan, ids=None):
    "The run, with the features of some training utterances spoilt."
    read = run.corpus.read
    run.corpus.read = lambda row: make(read(row)) if row.id.startswith('train') and (ids is None or row.id in ids) else read(row)
    return run

@pytest.mark.parametrize('make', [lambda x: x*math.nan, lambda x: x + math.inf], ids=['nan', 'inf'])
def test_a_poisoned_utterance_is_skipped_counted_and_named(make, shared_cache, root, capsys):
    run = poisoned(Trainer(short(shared_cache)), make, ['train-0003'])
    run.fit()
    assert run.skipped == 2 and run.update == 6 and run.bad in (0, 1)  # once an epoch
    rates = [learning_rate_at(e['update'] - 1, run.updates, run.config.training.optimizer) for e in run.history]
    assert [e['learning_rate'] for e in run.history] == rates
    assert all(torch.isfinite(p).all() for p in (*run.model.state_dict().values(), *run.average.state_dict().values()))
    named = [line for line in (root/'logs/training.log').read_text().splitlines() if 'Skipped update' in line]
    assert len(named) == 2 and all('train-0003' in line and len(line.split('utterances ')[1].split(', ')) == 12 for line in named)
    assert train(short(shared_cache)).times['skipped_updates'] == 2

def test_gradients_that_are_not_finite_change_nothing(shared_cache):
    run = Trainer(short(shared_cache))
    batch = next(iter(loader(run.train_set, [[0, 1, 2]])))
    run.train_step([batch], 4.)
    before = [v.clone() for v in (*run.model.state_dict().values(), *run.average.state_dict().values(), *(s for p in run.optimizer.state.values() for s in p.values()))]
    next(run.model.parameters()).register_hook(lambda g: g*math.inf)
    numbers = run.train_step([batch], 4.)
    after = [*run.model.state_dict().values(), *run.average.state_dict().values(), *(s for p in run.optimizer.state.values() for s in p.values())]
    assert math.isfinite(numbers['hard_ctc_loss']) and not math.isfinite(numbers['gradient_norm']) and run.skipped == 1
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))

def test_too_many_bad_steps_stop_with_the_last_good_checkpoint(shared_cache, root):
    config = settings('short', shared_cache, training=TRAINING | dict(epochs=3), monitoring=dict(max_bad_steps=3))
    run = Trainer(config)
    validate = run.validate
    def after_validation(): poisoned(run); return validate()
    run.validate = after_validation  # all is well in the first epoch, and nothing from then on
    with pytest.raises(TrainingError, match=r'3 updates in a row were not finite\. The last good checkpoint is .*checkpoint_last\.pt\. Remedy: lower training\.optimizer\.learning_rate'): run.fit()
    good = load_checkpoint(root/'models/short/checkpoint_last.pt')
    assert good['epoch'] == 1 and good['training']['skipped'] == 0
    assert all(torch.isfinite(v).all() for v in good['model'].values())

def test_utterances_too_short_for_their_labels_are_listed_and_left_out(shared_cache, root):
    long = 'far too many words for so short a recording ' * 8
    def with_long_text(load):
        def loaded(*settings):
            corpus = load(*settings)
            corpus.manifest.loc[corpus.manifest.id == 'train-0005', 'text'] = long.strip()
            return corpus
        return loaded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, 'load_corpus', with_long_text(learner.load_corpus))
        record = train(short(shared_cache))
    said = (root/'logs/training.log').read_text()
    assert 'Excluded: 1 utterances (train-0005: ' in said and '(35 train, 6 dev utterances)' in said
    assert any(note.startswith('excluded train-0005: ') and 'its labels need' in note for note in record.notes)

# resuming

def refused(cache, match, **training):
    with pytest.raises(TrainingError, match=match): Trainer(short(cache, **training)).fit()

def rewrite(path, **changes): save_checkpoint(load_checkpoint(path) | changes, path)

def test_a_resumed_run_accepts_another_device_cache_or_number_of_processes(copy, shared_cache, tmp_path_factory):
    config = short(shared_cache, workers=1, gradient_norms_every=0)
    config.threads, config.monitoring.max_bad_steps, config.device, config.checkpoints.every = 2, 7, 'cpu', 1
    config.data.cache, config.teacher.cache = str(tmp_path_factory.mktemp('cache')), 0
    assert Trainer(config).resume()
    torch.set_num_threads(1)

def test_a_resumed_run_refuses_another_vocabulary(copy, shared_cache):
    tokens = load_checkpoint(copy)['tokenizer']
    rewrite(copy, tokenizer=tokens | dict(tokens=[*tokens['tokens'][:-1], 'é']))
    refused(shared_cache, r'demo has changed since this run began \(tokens\); restore it')

def test_a_resumed_run_refuses_another_training_split(copy, shared_cache):
    state = load_checkpoint(copy)['training']
    for h in state['history']: h['update'] = 5*h['epoch']
    rewrite(copy, training=state)
    refused(shared_cache, r'demo has changed since this run began \(number of training utterances\)')

def test_a_checkpoint_without_training_state_says_where_to_go_on_from(copy, shared_cache):
    shutil.copy(copy.parent/'checkpoint_epoch_002.pt', copy)
    refused(shared_cache, 'holds a model but no training state.*copy checkpoint_best.pt here')
    shutil.copy(copy.parent/'checkpoint_best.pt', copy)
    assert Trainer(short(shared_cache)).resume()

def test_a_setting_that_came_later_has_its_default(copy, shared_cache):
    config = load_checkpoint(copy)['config']
    del config['features']['n_mels'], config['augmentation']
    rewrite(copy, config=config)
    assert Trainer(short(shared_cache)).resume()

def test_a_run_that_was_begun_elsewhere_says_so_in_its_record(copy, shared_cache):
    state = load_checkpoint(copy)['training']
    rewrite(copy, training=state | dict(first_call=state['first_call'] | dict(started='2026-01-01T00:00:00+00:00', revision='a', dirty=None))) # no git there
    run = Trainer(short(shared_cache))
    run.fit()
    record = training_record(run)
    assert record.started == '2026-01-01T00:00:00+00:00' and record.git.revision != 'a'
    assert record.notes == [f'begun on {record.device.name} with revision a, and resumed']

def test_another_teacher_is_refused(copy, shared_cache):
    taught = settings('taught', shared_cache, teacher=dict(checkpoint='models/short/checkpoint_best.pt'), training=TRAINING | dict(epochs=1))
    Trainer(taught).fit()
    rewrite(copy.parent/'checkpoint_best.pt', best_val_wer=1.)  # the same weights
    assert Trainer(taught).resume()
    model = load_checkpoint(BEST)['model']
    rewrite(copy.parent/'checkpoint_best.pt', model={k: v + 1 for k, v in model.items()})
    with pytest.raises(TrainingError, match='taught by another teacher'): Trainer(taught).fit()

def test_a_finished_run_returns_its_record_and_writes_nothing(copy, shared_cache, root):
    before = {p: p.stat().st_mtime_ns for p in (root/'models').rglob('*.pt')}
    record = train(short(shared_cache))
    assert len(record.epochs) == 2 and {p: p.stat().st_mtime_ns for p in (root/'models').rglob('*.pt')} == before

@pytest.mark.skipif(not machine.computes_bfloat16(), reason='no bfloat16 here')
def test_a_model_teaches_in_another_precision(copy, shared_cache, root):
    losses = []
    for precision in ('float32', 'bfloat16'):
        run = Trainer(settings(precision, shared_cache, teacher=dict(checkpoint=str(copy)), training=TRAINING | dict(epochs=1, precision=precision), memory_optimization=dict(teacher_fp16=True)))
        run.fit()
        losses.append(run.history[0]['train/hard_ctc_loss'])
        assert {p.dtype for p in load_checkpoint(root/f'models/{precision}/checkpoint_best.pt')['model'].values() if p.is_floating_point()} == {torch.float32}
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)

def test_a_cpu_without_bfloat16_asks_for_float32(monkeypatch):
    for module in (machine, teacher): monkeypatch.setattr(module, 'computes_bfloat16', lambda: False)
    with pytest.raises(ValueError, match="'bfloat16': LSTM layers of this CPU do not compute in it; choose 'float32'"): machine.pick_device('cpu', 'bfloat16')
    config = picture_config(memory_optimization=dict(teacher_fp16=True))
    assert teacher.teacher_precision(config, machine.pick_device('cpu', 'float32')) == 'float32'

def test_words_that_training_lacks_are_scored_and_left_out_of_the_loss(root):
    write_pictures(root, 60)
    table = pd.read_csv(root/'pictures.csv')
    table['text'] = ['the zoo' if i == 'u004' else t for i, t in zip(table.id, table.text)] # of dev
    table.to_csv(root/'pictures.csv', index=False)
    run = Trainer(picture_config(text=dict(tokenizer='word')))
    run._introduce(False)
    assert 'zoo' not in run.tokenizer.tokens and run.dev_set.unwritable == {'u004'} and len(run.dev_set) == 10 and run.corpus.skipped == []
    assert '1 dev utterances hold words that training lacks' in (root/'logs/training.log').read_text()
    texts, loss = run.recognize(run.model.eval(), run.dev_set)
    run.corpus.manifest = run.corpus.manifest[run.corpus.manifest.id != 'u004']
    rest = UtteranceDataset(run.corpus, 'dev', run.tokenizer, run.config.features)
    assert 'u004' in texts and math.isfinite(loss) and run.recognize(run.model, rest)[1] == pytest.approx(loss)

# devices

def test_members_and_averages_run_on_the_device_that_is_asked_for(copy, monkeypatch):
    load, devices = ensemble.load_model, []
    monkeypatch.setattr(ensemble, 'load_model', lambda path, device='cpu': devices.append(str(device)) or load(path))
    table = evaluate_ensemble([BEST, 'models/short/checkpoint_epoch_002.pt'], device='cpu:0')
    assert list(table.model) == ['member'] * 2 + ['mean of probabilities', 'mean of weights'] and set(devices) == {'cpu:0'}

# teachers

def taught(cache, **more): return settings('taught', cache, teacher=dict(checkpoint=str(more.pop('teacher', BEST))), **more)

def test_a_teacher_with_other_statistics_is_refused(copy, shared_cache):
    config, features = load_checkpoint(BEST)['config'], dict(normalization='corpus')
    mean, deviation = Trainer(settings('plain', shared_cache, features=features)).statistics
    for shift, fits in ((0, True), (1e-6, True), (0.1, False)):
        rewrite(copy, config=config | dict(features=config['features'] | features), feature_statistics=[mean + shift, deviation])
        if fits: assert Trainer(taught(shared_cache, teacher=copy, features=features)).teacher
        else:
            with pytest.raises(CheckpointError, match='normalises features by other statistics'): Trainer(taught(shared_cache, teacher=copy, features=features))

def test_the_teachers_wer_is_that_of_its_weights(copy, shared_cache, root):
    rewrite(copy, val_wer=88.25, best_val_wer=77.)
    run = Trainer(taught(shared_cache, teacher=copy))
    run._introduce(False)
    assert 'dev WER 88.25 %' in (root/'logs/training.log').read_text() and run._payload()['teacher']['wer'] == 88.25
    assert run._teacher_wer() == 88.25
    run.teacher.payload['data'] = run.data | dict(fingerprint=run.data['fingerprint'] | dict(dev='0' * 64))
    assert run._teacher_wer() is None # of another dev set

# the record of a run, and other data than the run's own

def test_another_demo_corpus_is_not_the_runs_own_test_set(copy, root):
    other = session.open_session(BEST, ['data.utterances=32', 'data.seed=1'])
    assert (other.record.run, other.record.kind) == ('short_on_demo', 'decoding') and other.elsewhere

def test_other_utterances_are_not_the_runs_own_test_set(copy, root, monkeypatch):
    load = session.load_corpus
    def changed(change): monkeypatch.setattr(session, 'load_corpus', lambda *a: (c := load(*a)) and replace(c, manifest=change(c.manifest)))
    for change, what in ((lambda m: m[m.id != 'dev-0001'], r'6 dev utterances, which are not the 5 that demo has now: the first that differs was \(id=.dev-0001.*\), is \(id=.dev-0002'),
                         (lambda m: m.assign(id=m.id.str.replace('dev-0001', 'dev-01')), r'was \(id=.dev-0001.*\), is \(id=.dev-01.'),
                         (lambda m: m.assign(speaker='s'), 'is \\(id=.dev-0000. speaker=.s.'),
                         (lambda m: m[::-1], 'is \\(id=.dev-0005')):
        changed(change)
        with pytest.raises(RecordError, match=rf'short: its record lists .*{what}.*Set data\.path to the corpus'): evaluate(BEST, 'test')
    changed(lambda m: m[m.id != 'test-0001'])
    assert len(evaluate(BEST, 'test').utterances['test']) == 5 and (root/'results/test_ledger.jsonl').read_text().count('\n') == 1
    changed(lambda m: m)
    with pytest.raises(RecordError, match=r'lists 5 test utterances, which are not the 6 that demo has now: .*, is \(id=.test-0001'): evaluate(BEST, 'dev')

def test_a_target_is_met_or_missed(copy, capsys):
    payload, best = load_checkpoint(BEST), copy.parent/'checkpoint_best.pt'
    for low, high, said in ((90., 100., 'met'), (45., 45.5, 'missed; ')):
        save_checkpoint(payload | dict(config=payload['config'] | dict(monitoring=payload['config']['monitoring'] | dict(target_greedy=[low, high], target_beam=[low, high]))), best)
        evaluate(BEST, 'dev')
        assert f'Target: {low:g} to {high:g}% (greedy): {said}' in capsys.readouterr().out
        evaluate(BEST, 'dev', (Greedy(), Beam()))
        told = capsys.readouterr().out
        assert all(f'Target: {low:g} to {high:g}% ({d}): {said}' in told for d in ('greedy', 'beam')) and told.count('a wider search') == (said != 'met') and told.index('Target') < told.index('Improvement')
    evaluate(BEST, 'train')
    assert 'Target' not in capsys.readouterr().out
    save_checkpoint(payload, best)
    evaluate(BEST, 'dev')
    assert 'Target' not in capsys.readouterr().out

# folders

def test_where_folders_cannot_be_made_the_error_says_so(shared_cache, root):
    (root/'models').mkdir(); (root/'models/short').write_text('a file')
    refused(shared_cache, r'models/short: cannot be written .File exists.*when this is mended, the same command resumes')

# signals

SIGNALLED = """
import signal, sys
from self_distill.core.config import build_config
from self_distill.train.trainer import Trainer
values = dict(run='signals', threads=1, data=dict(utterances=48, cache=sys.argv[1]), model=dict(num_layers=2, hidden_size=64, conv_channels=32),
              training=dict(epochs=4, batch_size=6, gradient_accumulation_steps=1))
def train(every):
    signal.signal(signal.SIGALRM, lambda *_: None)
    trainer = Trainer(build_config(values | dict(run=f'signals_{every > 0}')))
    signal.setitimer(signal.ITIMER_REAL, every, every)
    trainer.fit()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return [{k: v for k, v in e.items() if k != 'seconds'} for e in trainer.history], trainer.skipped
assert train(0.003) == train(0)
"""

@pytest.mark.skipif(not hasattr(signal, 'pthread_sigmask'), reason='signals cannot be held back here')
def test_signals_do_not_reach_an_update(tmp_path, shared_cache):
    done = subprocess.run([sys.executable, '-c', SIGNALLED, str(shared_cache)], env=environment(ROOT, SELF_DISTILL_ROOT=str(tmp_path)), cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

# other data than before

def edited(folder, split, text):
    "Give the first utterance of a split another text."
    table = pd.read_csv(folder/'pictures.csv')
    table.loc[table.index[table.split == split][0], 'text'] = text
    table.to_csv(folder/'pictures.csv', index=False)

def other_features(folder):
    path = folder/pd.read_csv(folder/'pictures.csv').query('split == "train"').path.iloc[0]
    np.save(path, np.load(path) + 1)

@pytest.mark.parametrize('change', [lambda f: edited(f, 'dev', 'the sea is dear'), lambda f: edited(f, 'train', 'the sea is dear'),
                                    other_features], ids=['dev text', 'train text', 'train features'])
def test_a_resumed_run_refuses_data_that_changed(change, tmp_path, monkeypatch):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    write_pictures(tmp_path)
    config = picture_config(training=dict(epochs=1))
    train(config)
    train(config)                                                                       # nothing changed: accepted
    change(tmp_path)
    with pytest.raises(TrainingError, match='has changed since this run began .train and dev utterances.'): train(config)

def test_a_teacher_that_was_trained_on_the_test_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    write_pictures(tmp_path)
    train(picture_config(training=dict(epochs=1)))
    table = pd.read_csv(tmp_path/'pictures.csv')
    table.assign(split=table.split.replace(dict(train='test', test='train'))).to_csv(tmp_path/'swapped.csv', index=False)
    def student(**data):
        return picture_config('student', data=dict(path='swapped.csv', **data), teacher=dict(checkpoint='models/pictures/checkpoint_best.pt'),
                              feature_matching=dict(teacher_layers=[0], student_layers=[0]), training=dict(epochs=1))
    with pytest.raises(CheckpointError, match='has heard .* test utterances'): train(student())
    assert train(student(allow_leaks=True)).config['data']['allow_leaks'] is True
    record = evaluate('models/student/checkpoint_best.pt', 'test', show=False) # it has heard what its teacher has
    assert any('the model has heard' in note for note in record.notes)
    first, tuned = 'models/pictures/checkpoint_best.pt', 'models/tuned/checkpoint_best.pt' # and what the weights have that it began with
    train(picture_config('tuned', data=dict(path='swapped.csv', allow_leaks=True), training=dict(epochs=1, initial_checkpoint=first)))
    assert any('the model has heard' in note for note in evaluate(tuned, 'test', show=False).notes)
    assert len(ensemble.load_ensemble([first, tuned]).payload['data']['sounds']) > len(load_model(first).payload['data']['sounds'])
