"""Runs that are killed, stopped or starved at any moment, resumed, and held against a run that nobody disturbed."""
import json, math, multiprocessing, os, random, signal, time
from pathlib import Path

import pytest, torch

import self_distill.checkpoint, self_distill.trainer as trainer
from self_distill.checkpoint import CheckpointError, load_checkpoint
from self_distill.config import build_config
from self_distill.records import read_record
from self_distill.trainer import Trainer, TrainingStopped

EPOCHS, UPDATES = 6, 3  # of the student; updates an epoch

def settings(run, cache, **extra):
    "A tiny run on 48 synthetic utterances: three updates an epoch, three stages of the temperature."
    values = dict(run=run, threads=1, data=dict(utterances=48, cache=str(cache)), model=dict(num_layers=1, hidden_size=16, conv_channels=16),
                  feature_matching=dict(teacher_layers=[0], student_layers=[0]), checkpoints=dict(every=2),
                  training=dict(epochs=EPOCHS, batch_size=6, gradient_accumulation_steps=2, gradient_norms_every=4, optimizer=dict(learning_rate=1e-2)))
    return build_config(values | extra)

def student(cache, **extra): return settings('student', cache, seed=1, teacher=dict(checkpoint='models/teacher/checkpoint_best.pt'), **extra)

# moments: each patches one function in the child process, so that its `count`-th call is the last thing that process does

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def patched(owner, name, count, before):
    "Replace `owner.name` by one that calls `before(*arguments)` at its `count`-th call and then goes on."
    function, calls = getattr(owner, name), iter(range(1, 10**9))
    def replacement(*arguments, **named):
        if next(calls) == count: before(*arguments)
        return function(*arguments, **named)
    setattr(owner, name, replacement)

def half_written(payload, file):
    "Write the first half of a checkpoint, make it reach the disk, and die."
    import io
    whole = io.BytesIO(); torch_save(payload, whole)
    file.write(whole.getvalue()[:len(whole.getvalue())//2]); file.flush(); os.fsync(file.fileno())
    die()
torch_save = torch.save

MOMENTS = dict(
    step=lambda n: patched(trainer.Objective, 'forward', n, die),
    after_the_update=lambda n: patched(Trainer, '_log_update', n, die),
    validation=lambda n: patched(Trainer, 'recognize', n, die),
    half_a_checkpoint=lambda n: patched(torch, 'save', n, half_written),
    before_the_rename=lambda n: patched(os, 'replace', n, die),
    before_the_second_name=lambda n: patched(os, 'link', n, die),
    log_line=lambda n: patched(trainer.RunLog, 'log', n, die),
    rewinding=lambda n: patched(trainer.RunLog, 'rewind', n, die))

def child(root, config, moment=None, count=1):
    "Train in this process, which dies at the `count`-th time that `moment` comes."
    os.environ['SELF_DISTILL_ROOT'], os.environ['TQDM_DISABLE'] = str(root), '1'
    torch.set_num_threads(1)
    if moment: MOMENTS[moment](count)
    with open(root/'child.log', 'a') as log:
        os.dup2(log.fileno(), 1); os.dup2(log.fileno(), 2)
        trainer.train(config)

@pytest.fixture(scope='module')
def spawn():
    "Start a training in a process of its own; a server that has torch loaded makes that cheap."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['self_distill.trainer'])
    def start(*arguments):
        process = context.Process(target=child, args=arguments)
        process.start()
        return process
    return start

def finish(process, root, code=0):
    process.join(120)
    assert process.exitcode == code, f'exit code {process.exitcode}, not {code}:\n{(root/"child.log").read_text()[-3000:]}'

@pytest.fixture(scope='module')
def undisturbed(spawn, shared_cache, tmp_path_factory):
    "A folder with a teacher and a student whose training nobody disturbed, and the seconds that took."
    root = tmp_path_factory.mktemp('undisturbed')
    finish(spawn(root, settings('teacher', shared_cache, training=dict(epochs=1, batch_size=6, optimizer=dict(learning_rate=1e-2)))), root)
    start = time.monotonic()
    finish(spawn(root, student(shared_cache)), root)
    return root, time.monotonic() - start

@pytest.fixture
def root(undisturbed, tmp_path):
    "A folder with the same teacher and no student."
    (tmp_path/'models').mkdir()
    (tmp_path/'models/teacher').symlink_to(undisturbed[0]/'models/teacher')
    return tmp_path

# what must hold after every kill, and at the end

def whole(root):
    "Every checkpoint under its final name can be loaded; nothing of the ones being written counts."
    found = sorted((root/'models/student').glob('*.pt'))
    for path in found: load_checkpoint(path)
    return found

def position(root):
    path = root/'models/student/checkpoint_last.pt'
    return load_checkpoint(path)['training']['update'] if path.exists() else 0

def timeless(value):
    "A nested value without what depends on the clock."
    if isinstance(value, dict): return {k: timeless(v) for k, v in value.items() if k not in ('seconds', 'sha256')}
    if isinstance(value, (list, tuple)): return [timeless(v) for v in value]
    return value

def differences(a, b, where=''):
    "Where two nested values differ, tensors bit by bit."
    if isinstance(a, dict) and isinstance(b, dict): return [d for k in a.keys() | b.keys() for d in differences(a.get(k), b.get(k), f'{where}.{k}')]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b): return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{where}.{i}')]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b or a != a and b != b
    return [] if same else [where]

def assert_equal_runs(root, other):
    "Weights, averages, projections, optimizer, random state, history, best and numbered checkpoints, record and logged numbers agree."
    names = [p.name for p in whole(root)]
    assert names == [p.name for p in whole(other)] == ['checkpoint_best.pt', *(f'checkpoint_epoch_{e:03d}.pt' for e in range(2, EPOCHS + 1, 2)), 'checkpoint_last.pt']
    for name in names:
        a, b = (timeless(load_checkpoint(r/'models/student'/name)) for r in (root, other))
        if name == 'checkpoint_best.pt': assert a['epoch'] == b['epoch']
        assert not differences(a, b), name
    a, b = (read_record(r/'results/student.json') for r in (root, other))
    assert timeless(a.epochs) == timeless(b.epochs) and a.decodes[0].hypotheses == b.decodes[0].hypotheses and a.decodes[0].wer == b.decodes[0].wer
    a, b = ([json.loads(line) for line in (r/'logs/student/metrics.jsonl').read_text().splitlines()] for r in (root, other))
    assert a == b and len(a) == EPOCHS*(UPDATES + 1)
    left = [p.name for p in (root/'models/student').iterdir() if p.suffix != '.pt' and p.name != '.lock']
    assert not left, f'left behind: {left}'

def kill_and_resume(spawn, root, cache, kills):
    "Start the run again and again, kill it as `kills` says, then let it end; how many died."
    died = 0
    for kill in kills:
        before = position(root)
        if isinstance(kill, tuple): process = spawn(root, student(cache), *kill)
        else:
            process = spawn(root, student(cache))
            process.join(kill)
            process.kill()
        process.join(120)
        assert process.exitcode in (-signal.SIGKILL, 0), (root/'child.log').read_text()[-3000:]
        died += process.exitcode != 0
        whole(root)
        assert position(root) >= before
    finish(spawn(root, student(cache)), root)
    return died

def test_killed_runs_end_as_if_nothing_had_happened(spawn, root, undisturbed, shared_cache):
    kills = [('step', 9), ('half_a_checkpoint', 2), ('before_the_second_name', 1), ('validation', 2)]
    assert kill_and_resume(spawn, root, shared_cache, kills) == len(kills)
    assert_equal_runs(root, undisturbed[0])
