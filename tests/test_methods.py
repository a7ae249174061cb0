"The methods within a run: they end as they would have without a stop, and leave other runs what they were."

import functools, json
from copy import deepcopy
from dataclasses import asdict

import numpy as np, pandas as pd, pytest, torch
from self_distill.data.demo import picture_config, write_pictures
from test_torture import TRAINING, settings

from self_distill.train import trainer
from self_distill.data.batches import output_frames
from self_distill.train.checkpoint import load_checkpoint
from self_distill.core.config import Config, ConfigError, build_config, config_dict, differences, dotted, free_keys
from self_distill.data.corpora import load_corpus
from self_distill.evaluate.evaluate import evaluate
from self_distill.decode.language_model import training_sentences
from self_distill.train.learner import TrainingError
from self_distill.evaluate.session import open_session
from self_distill.train.trainer import Trainer
from self_distill.train.training import train

METHODS = dict(
    consistency=dict(consistency=dict(weight=0.2, warmup=1.)),
    moving_teacher=dict(teacher=dict(moving=True, warmup=1.)),
    voices=dict(augmentation=dict(warp=0.1, time_masks=4, stretch=0.1)),
)

@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    return tmp_path

def short(cache, run, method, **more): return settings(run, cache, **dict(training=TRAINING | dict(epochs=2)) | method | more)

def every_method(cache):
    every = {section: part for method in METHODS.values() for section, part in method.items()}
    return every | dict(augmentation=every['augmentation'] | dict(warp=0.)) # not beside two views and a teacher

def begun_elsewhere(cache):
    "From another run's weights, without averaging, in batches by frames, with normalization by corpus"
    features = dict(features=dict(normalization='corpus'))
    train(short(cache, 'first', features))
    return features | dict(training=TRAINING | dict(epochs=2, ema_window=0, batch_frames=1500, initial_checkpoint='models/first/checkpoint_best.pt'))

@pytest.mark.parametrize('what', [every_method, begun_elsewhere])
def test_a_stopped_run_ends_as_an_undisturbed_one(what, shared_cache, monkeypatch):
    every = what(shared_cache)
    train(short(shared_cache, 'whole', every))
    if what is every_method: # no views at the start of the first epoch, as their weight is warmed up
        first = json.loads(trainer.root_path('logs/whole/metrics.jsonl').read_text().splitlines()[0])
        assert first['train/loss_components/consistency_loss_weighted'] == 0
    steps, step = [], Trainer.train_step
    def stopping(self, window, T):
        steps.append(1)
        if len(steps) == 5: raise KeyboardInterrupt # in the second epoch
        return step(self, window, T)
    config = short(shared_cache, 'stopped', every)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, 'train_step', stopping)
        with pytest.raises(KeyboardInterrupt): train(config)
    record = train(config)
    whole, stopped = (load_checkpoint(trainer.root_path(f'models/{run}/checkpoint_last.pt')) for run in ('whole', 'stopped'))
    for key, value in whole['model'].items(): assert torch.equal(value, stopped['model'][key]), key
    assert [h['wer'] for h in whole['training']['history']] == [h['wer'] for h in stopped['training']['history']]
    again = evaluate('models/stopped/checkpoint_best.pt', 'dev', folder='elsewhere', show=False)
    assert again.decodes[0].hypotheses == record.decodes[0].hypotheses
    if what is begun_elsewhere: assert any(note.startswith('Started from first') for note in record.notes)

def test_a_method_is_the_same_when_it_is_read_from_its_record():
    for method in map(build_config, METHODS.values()): assert build_config(config_dict(method)) == method

def test_every_setting_but_the_free_ones_makes_another_experiment():
    plain = json.loads(json.dumps(asdict(Config())))
    for key in dotted(plain):
        other, (*sections, name) = deepcopy(plain), key.split('.')
        functools.reduce(dict.get, sections, other)[name] = 'another'
        seen = key == 'data.path' or not key.startswith(tuple(free_keys())) # of a table its name, as it may be another one
        assert bool(differences(plain, other)) == seen, key

def test_a_moving_teacher_is_no_frozen_one():
    with pytest.raises(ConfigError, match='name two teachers'):
        build_config(dict(teacher=dict(moving=True, checkpoint='a.pt')))
    with pytest.raises(ConfigError, match='ema_window'): build_config(dict(teacher=dict(moving=True), training=dict(ema_window=0.)))

def test_the_second_of_two_views_has_no_teacher_of_another_voice(shared_cache):
    both = dict(consistency=dict(weight=0.2), augmentation=dict(warp=0.1), teacher=dict(moving=True))
    with pytest.raises(ValueError, match='another voice'): Trainer(short(shared_cache, 'both', both))

# speech without transcripts

def test_recordings_without_transcripts_are_heard_by_a_student_alone(shared_cache, capsys):
    teacher = short(shared_cache, 'quarter', {}); teacher.data.transcribed = 0.25
    train(teacher)
    assert 'nothing but transcripts teaches this run' in capsys.readouterr().out
    for named, run in ((), 'quarter'), (('data.corpus=demo',), 'quarter'), (('data.transcribed=1.0',), 'quarter_on_demo'): # which a language model would read
        session = open_session('models/quarter/checkpoint_best.pt', named)
        assert session.record.run == run and (session.corpus.rows('train').text == '').any() == (run == 'quarter')
    student = short(shared_cache, 'student', dict(teacher=dict(checkpoint='models/quarter/checkpoint_best.pt'))); student.data.transcribed = 0.25
    alone, taught = Trainer(teacher), Trainer(student)
    assert 0 < len(alone.train_set) < len(taught.train_set)/3 and (alone.train_set.rows.text != '').all()
    assert list(taught.train_set.rows.id[taught.train_set.rows.text != '']) == list(alone.train_set.rows.id)
    train(student)
    assert 'they are used without CTC loss' in capsys.readouterr().out

def test_the_language_model_does_not_read_hidden_transcripts(shared_cache):
    config = short(shared_cache, 'lm', {}); config.data.transcribed = 0.25
    corpus = load_corpus(config.data, config.text, config.features)
    sentences = training_sentences(corpus, config)
    assert '' not in sentences and len(sentences) < len(corpus.rows('train'))/3

def test_a_manifest_may_leave_transcripts_empty(root):
    write_pictures(root, utterances=24)
    table = pd.read_csv(root/'pictures.csv')
    table.loc[(table.split == 'train') & (table.index % 2 == 0), 'text'] = ''
    table.to_csv(root/'pictures.csv', index=False)
    config = picture_config()
    corpus = load_corpus(config.data, config.text, config.features)
    assert (corpus.rows('train').text == '').sum() == (table.text[table.split == 'train'] == '').sum() > 3
    assert len(Trainer(config).train_set) == (corpus.rows('train').text != '').sum()
    table.loc[table.split == 'dev', 'text'] = ''
    table.to_csv(root/'pictures.csv', index=False)
    with pytest.raises(ValueError, match='holds no word'): load_corpus(config.data, config.text, config.features)
