"A student whose teacher was computed once: the same losses, resumed and restarted runs, and when the teacher is computed all the same."
import os, shutil, signal
from dataclasses import replace

import numpy as np, pandas as pd, pytest, torch
from self_distill.data.demo import picture_config, write_pictures

from self_distill.train import teacher_cache
from self_distill.train.checkpoint import load_model
from self_distill.core.environment import computes_bfloat16
from self_distill.train.trainer import Trainer, TrainingStopped

@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    "A folder with the corpus and a teacher of one epoch."
    root = tmp_path_factory.mktemp('taught')
    write_pictures(root, 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SELF_DISTILL_ROOT', str(root))
        Trainer(picture_config('teacher', training=dict(epochs=1))).fit()
    return root

@pytest.fixture(autouse=True)
def root(taught, tmp_path, monkeypatch):
    shutil.copytree(taught, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    return tmp_path

AUGMENT = dict(stretch=0.2, paces=3, noise=0.3, time_masks=1, time_width=4)

def student(run='student', cache=2.0, augment=AUGMENT, **more):
    settings = dict(seed=1, teacher=dict(checkpoint='models/teacher/checkpoint_best.pt', cache=cache), augmentation=augment,
                    training=dict(epochs=2, gradient_accumulation_steps=2), model=dict(dropout=0.1))
    return Trainer(picture_config(run, **settings | more))

def losses(run):
    "Each term of each update."
    numbers = pd.read_json(run.log.lines, lines=True)
    return numbers[[c for c in numbers if c.startswith('train/loss')]].dropna().to_numpy()

def files(root): return sorted(p.name for p in root.glob('cache/teacher/[!.]*'))

def asked(root): return [line for line in (root/'logs/training.log').read_text().splitlines() if 'eacher computed' in line or 'eacher outputs' in line]

def state(run): return [*run.model.state_dict().values(), *run.average.state_dict().values(), *run.objective.state_dict().values()]

def test_losses_are_those_of_a_teacher_that_has_teacher(root):
    online = student('online', 0.0)
    online.fit()
    cached = student('cached')
    cached.fit()
    assert online.train_set.stored is None and cached.train_set.stored and len(files(root)) == 2
    assert losses(online).shape[1] == 7
    np.testing.assert_allclose(losses(cached), losses(online), rtol=1e-3)

@pytest.mark.parametrize('workers, again', [(0, False), (2, True)], ids=['outputs kept', 'outputs lost'])
def test_a_resumed_run_has_the_same_numbers(root, workers, again):
    whole = student()
    whole.fit()
    shutil.rmtree(whole.folder)
    if again: shutil.rmtree(root/'cache/teacher')
    stopped, log = student(), whole.log.lines.read_text()
    counted = stopped._count
    stopped._count = lambda *a: (counted(*a), stopped.update == 3 and os.kill(os.getpid(), signal.SIGTERM))[0]
    with pytest.raises(TrainingStopped): stopped.fit()
    resumed = student(training=dict(epochs=2, gradient_accumulation_steps=2, workers=workers))
    resumed.fit()
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(resumed), strict=True))
    assert resumed.log.lines.read_text() == log

def test_answers_cut_short_are_computed_again_and_nothing_is_left(root, monkeypatch):
    run = student()
    run.store_outputs()
    before, rows = files(root), run.train_set.stored(0, 2)
    for name in before: (root/'cache/teacher'/name).unlink()
    compute, calls = teacher_cache._compute, []
    def pulled(*arguments):
        calls.append(arguments)
        if len(calls) == 4: raise KeyboardInterrupt  # the plug
        return compute(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, '_compute', pulled)
        with pytest.raises(KeyboardInterrupt): student().store_outputs()
    assert not files(root)
    (root/f'cache/teacher/.{before[0]}.0a.tmp').write_bytes(b'killed')
    with pytest.raises(TrainingStopped): student().store_outputs(['SIGTERM'])
    run = student()
    run.store_outputs()
    assert files(root) == before and torch.equal(run.train_set.stored(0, 2), rows)
    assert not list(root.glob('cache/teacher/.*.tmp'))

def test_answers_of_others_are_not_read(root):
    def file(**changes):
        run = student()
        for name, value in changes.items(): setattr(run, name, value)
        run.store_outputs()
        return run.train_set.stored.file.name
    run = student()
    other = load_model('models/teacher/checkpoint_best.pt')
    data = dict(run.data, fingerprint=run.data['fingerprint'] | dict(train='0' * 64))
    names = [file(), file(), file(data=data), file(teacher=replace(other, weights_sha256='0' * 64)),
             file(config=replace(run.config, memory_optimization=replace(run.config.memory_optimization, teacher_fp16=True)))]
    assert names[0] == names[1] and len(set(names)) == 3 + computes_bfloat16()

@pytest.mark.parametrize('augment, cache, why', [
    (dict(AUGMENT, paces=0), 2.0, 'augmentation.stretch draws any pace; augmentation.paces=3 makes it one of three'),
    (AUGMENT, 1e-6, 'and teacher.cache is 1e-06'), (AUGMENT, 0.0, None)], ids=['stretch', 'limit', 'off'])
def test_why_a_teacher_is_computed_at_every_step(root, augment, cache, why):
    run = student('online', cache, augment)
    run.store_outputs()
    assert run.train_set.stored is None and not files(root)
    assert [why in line for line in asked(root)] == ([True] if why else [])
