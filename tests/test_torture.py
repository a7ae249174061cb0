"""Runs that are killed, stopped or starved at any moment, resumed, and held against a run that nobody disturbed."""
import io, itertools, json, multiprocessing, os, random, re, signal, subprocess, sys, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, psutil, pytest, torch
from conftest import ROOT, environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from self_distill.evaluate import evaluate
from self_distill.train import learner, training
from self_distill.train.checkpoint import load_checkpoint, save_checkpoint
from self_distill.core.config import Config, build_config, config_dict
from self_distill.data.corpora import load_corpus
from self_distill.data.demo import demo_corpus
from self_distill.study.figures import Results, save_figure
from self_distill.data.feature_cache import store
from self_distill.train.learner import TrainingError
from self_distill.core.records import append_ledger, read_ledger, new_record, read_record, write_record
from self_distill.decode.language_model import estimate_arpa
from self_distill.train.trainer import Trainer
from self_distill.train.training_log import TrainingLog

EPOCHS, UPDATES = 6, 3  # of the student; updates an epoch
TRAINING = dict(epochs=EPOCHS, batch_size=6, gradient_accumulation_steps=2, gradient_norms_every=4, optimizer=dict(learning_rate=1e-2))

def settings(run, cache, **extra):
    "A tiny run on 48 synthetic utterances: three updates an epoch."
    values = dict(run=run, threads=1, data=dict(utterances=48, cache=str(cache)), model=dict(num_layers=1, hidden_size=16, conv_channels=16),
                  feature_matching=dict(teacher_layers=[0], student_layers=[0]), checkpoints=dict(every=2), training=TRAINING)
    return build_config(values | extra)

def student(cache, **extra):
    "Three losses, averaged weights, three stages of the temperature."
    return settings('student', cache, seed=1, teacher=dict(checkpoint='models/teacher/checkpoint_best.pt'), **extra)

# moments: each patches one function in the child process, so that its `count`-th call is the last thing that process does

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def patched(owner, name, count, before):
    "Replace `owner.name` by one that calls `before(*arguments)` at its `count`-th call and then goes on."
    function, calls = getattr(owner, name), iter(range(1, 10**9))
    def replacement(*arguments, **named):
        if next(calls) == count: before(*arguments)
        return function(*arguments, **named)
    setattr(owner, name, replacement)

def half_written(payload, file, save=torch.save):
    "Write the first half of a checkpoint, make it reach the disk, and die."
    whole = io.BytesIO()
    save(payload, whole)
    file.write(whole.getvalue()[:len(whole.getvalue())//2]); file.flush(); os.fsync(file.fileno())
    die()

def fill(folder):
    "Leave no room on the file system of `folder`."
    with open(folder/'filler', 'wb', buffering=0) as f:
        try:
            while f.write(bytes(4096)): pass
        except OSError: pass

MOMENTS = dict(
    step=lambda n: patched(learner.Objective, 'forward', n, die),
    after_the_update=lambda n: patched(Trainer, '_count', n, die),
    validation=lambda n: patched(Trainer, 'recognize', n, die),
    half_a_checkpoint=lambda n: patched(torch, 'save', n, half_written),
    before_the_rename=lambda n: patched(os, 'replace', n, die),
    before_the_second_name=lambda n: patched(os, 'link', n, die),
    log_line=lambda n: patched(TrainingLog, 'log', n, die),
    rewinding=lambda n: patched(TrainingLog, 'rewind', n, die))
FULL = dict(
    save=lambda n, folder: patched(torch, 'save', n, lambda *_: fill(folder)),
    log=lambda n, folder: patched(TrainingLog, 'log', n, lambda *_: fill(folder)))

def child(root, config, prepare=None, arguments=(), wer=True):
    "Train in this process, after `prepare(*arguments)`."
    os.environ['SELF_DISTILL_ROOT'], os.environ['TQDM_DISABLE'] = str(root), '1'
    torch.set_num_threads(1)
    multiprocessing.set_start_method('fork', force=True)  # for the processes that load data: this one came from a server, they need not
    if wer:  # so small a model writes nothing yet: its loss stands for its WER, or the first epoch would always be the best
        validate = Trainer.validate
        Trainer.validate = lambda self: (m := validate(self)) | dict(wer=10*m['loss'])
    if prepare: (MOMENTS | FULL)[prepare](*arguments)
    with open(root/'child.log', 'a') as log:
        os.dup2(log.fileno(), 1); os.dup2(log.fileno(), 2)
        training.train(config)

def decode(root, names, settings={}, prepare=None):
    "Decode the teacher's test set under several names in this process, by beam search where there are settings"
    os.environ['SELF_DISTILL_ROOT'] = str(root)
    torch.set_num_threads(1)
    if prepare: prepare()
    decoders = [evaluate.Beam(name=n, **settings) if settings else evaluate.Greedy(n) for n in names]
    with open(root/'child.log', 'a') as log:
        os.dup2(log.fileno(), 1); os.dup2(log.fileno(), 2)
        evaluate.evaluate('models/teacher/checkpoint_best.pt', 'test', decoders, device='cpu', why='torture', show=False)

MARK = f'{os.getpid()} {time.time_ns()}'

def left():
    "Processes that a test of this file has started, at whatever distance, but the server that they come from"
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get('SELF_DISTILL_TORTURE') == MARK and process.ppid() != os.getpid(): found.append(process)
    return found

def assert_none_left():
    end = time.monotonic() + 20 # torch's data workers look for their parent every five seconds
    while (found := left()) and time.monotonic() < end: time.sleep(0.2)
    assert not found, [' '.join(p.cmdline()) for p in found]

@pytest.fixture(scope='module')
def spawn():
    "Start a training in a process of its own; a server that has torch loaded makes that cheap."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['self_distill.train.training', 'self_distill.evaluate.evaluate'])
    os.environ['SELF_DISTILL_TORTURE'] = MARK
    def start(*arguments, target=child, **named):
        process = context.Process(target=target, args=arguments, kwargs=named)
        process.start()
        return process
    yield start
    del os.environ['SELF_DISTILL_TORTURE']

def finish(process, root, code=0):
    process.join(200)
    assert process.exitcode == code, f'exit code {process.exitcode}, not {code}:\n{(root/"child.log").read_text()[-3000:]}'

@pytest.fixture(scope='module')
def undisturbed(spawn, shared_cache, tmp_path_factory):
    "A folder with a teacher and a student whose training nobody disturbed, and the seconds that took."
    root = tmp_path_factory.mktemp('undisturbed')
    finish(spawn(root, settings('teacher', shared_cache, training=TRAINING | dict(epochs=1))), root)
    start = time.monotonic()
    finish(spawn(root, student(shared_cache)), root)
    return root, time.monotonic() - start

def with_teacher(folder, undisturbed):
    "The same folder, with the undisturbed one's teacher."
    (folder/'models').mkdir()
    (folder/'models/teacher').symlink_to(undisturbed[0]/'models/teacher')
    return folder

@pytest.fixture
def root(undisturbed, tmp_path): return with_teacher(tmp_path, undisturbed)

# what must hold after every kill, and at the end

def whole(root, run='student'):
    "Every checkpoint under its final name can be loaded."
    found = sorted((root/'models'/run).glob('*.pt'))
    for path in found: load_checkpoint(path)
    return [p.name for p in found]

def position(root, run='student'):
    "Updates that the last checkpoint holds."
    path = root/'models'/run/'checkpoint_last.pt'
    return load_checkpoint(path)['training']['update'] if path.exists() else 0

def logged(root, run='student'):
    "Whole lines of the run's numbers."
    path = root/'logs'/run/'metrics.jsonl'
    return [json.loads(l) for l in path.read_text().splitlines() if l.endswith('}')] if path.exists() else []

def comparable(value):
    "A nested value without the clock, and without what may change when a run is resumed."
    if isinstance(value, dict): return {k: comparable(v) for k, v in value.items() if k not in ('seconds', 'sha256', 'workers', 'first_call')}
    return [comparable(v) for v in value] if isinstance(value, (list, tuple)) else value

def differences(a, b, where=''):
    "Where two nested values differ, tensors bit by bit."
    if isinstance(a, dict) and isinstance(b, dict): return [d for k in a.keys() | b.keys() for d in differences(a.get(k), b.get(k), f'{where}.{k}')]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b): return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{where}.{i}')]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b or a != a and b != b
    return [] if same else [where]

def assert_equal_runs(root, other, run='student', epochs=EPOCHS):
    "Weights, averages, projections, optimizer, random state, history, best and numbered checkpoints, record and logged numbers agree."
    names = whole(root, run)
    assert names == whole(other, run) == ['checkpoint_best.pt', *(f'checkpoint_epoch_{e:03d}.pt' for e in range(2, epochs + 1, 2)), 'checkpoint_last.pt']
    for name in names:
        a, b = (comparable(load_checkpoint(r/'models'/run/name)) for r in (root, other))
        assert not differences(a, b), name
    a, b = (read_record(r/f'results/{run}.json') for r in (root, other))
    assert comparable(a.epochs) == comparable(b.epochs) and a.decodes[0].hypotheses == b.decodes[0].hypotheses and a.decodes[0].wer == b.decodes[0].wer
    assert logged(root, run) == logged(other, run) and len(logged(root, run)) == epochs*(UPDATES + 1)
    left = [p.name for p in (root/'models'/run).iterdir() if p.suffix != '.pt' and p.name not in ('.lock', 'filler')]
    assert not left, f'left behind: {left}'

# kills

def train_until(spawn, root, config, kill):
    "Train until `kill` comes, seconds or (moment, count); the exit code, -9 where it came before the end."
    process = spawn(root, config, kill[0], (kill[1],)) if isinstance(kill, tuple) else spawn(root, config)
    process.join(None if isinstance(kill, tuple) else kill)
    process.kill()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0), f'{kill}:\n{(root/"child.log").read_text()[-3000:]}'
    whole(root)
    lost = max([0, *(line['update'] - position(root) for line in logged(root))])
    assert lost <= UPDATES, f'{kill} cost {lost} updates, more than an epoch'
    return process.exitcode

def assert_curves_are_the_log(root):
    "TensorBoard shows every number of metrics.jsonl once, the weighted losses and their sum among them"
    curves = EventAccumulator(str(root/'logs/student'), size_guidance=dict(scalars=0)).Reload()
    shown = {tag: [(e.step, e.value) for e in curves.Scalars(tag)] for tag in curves.Tags()['scalars'] if '/' in tag}
    written = {}
    for line in logged(root):
        for tag, value in line.items():
            if '/' in tag: written.setdefault(tag, []).append((line['update'], pytest.approx(value, rel=1e-6)))
    assert shown == written and {'val/wer', 'val/cer', 'val/loss', 'train/temperature', 'train/learning_rate'} <= set(shown)
    losses = [f'train/loss_components/{name}_loss' for name in ('distillation', 'hard_ctc', 'feature_matching')]
    parts = [shown[f'{tag}_weighted'] for tag in losses]
    for tag, weight, part in zip(losses, (0.7, 0.2, 0.1), parts):
        assert [v for _, v in part] == pytest.approx([weight * v for _, v in shown[tag]], rel=1e-5)
    assert [v for _, v in shown['train/loss']] == pytest.approx([sum(v for _, v in row) for row in zip(*parts)], rel=1e-5)

def test_killed_runs_end_as_if_nothing_had_happened(spawn, root, undisturbed, shared_cache):
    for kill in [('step', 9), ('half_a_checkpoint', 2), ('before_the_second_name', 1), ('validation', 2)]:
        assert train_until(spawn, root, student(shared_cache), kill) == -signal.SIGKILL
    finish(spawn(root, student(shared_cache)), root)
    assert_equal_runs(root, undisturbed[0])
    assert_curves_are_the_log(root)

@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_many_kills(spawn, undisturbed, shared_cache, tmp_path_factory, capsys):
    """At least 60 kills, half at random times, half inside a moment drawn at random; every other run has a process that loads
    its data. Two runs go on at a time."""
    seed, kills, starts = int(os.environ.get('TORTURE_SEED', time.time_ns() % 10**6)), Counter(), Counter()
    folder, numbers = tmp_path_factory.mktemp('runs'), itertools.count()
    def run(number):
        (folder/str(number)).mkdir()
        root, chance = with_teacher(folder/str(number), undisturbed), random.Random(f'{seed} {number}')
        config = student(shared_cache, training=TRAINING | dict(workers=number % 2))
        while True:
            moment, count = chance.choice(sorted(MOMENTS)), chance.randint(1, 8)
            kill = chance.uniform(0, undisturbed[1]) if chance.random() < 0.5 else (moment, 1 if moment == 'rewinding' else count)
            code = train_until(spawn, root, config, kill)
            starts[number] += 1
            if code == 0: return assert_equal_runs(root, undisturbed[0])
            kills[kill[0].replace('_', ' ') if isinstance(kill, tuple) else 'a random time'] += 1
    def runs(_):
        while kills.total() < 60: run(next(numbers))
    with ThreadPoolExecutor(2) as pool: list(pool.map(runs, range(2)))
    assert_none_left()
    with capsys.disabled():
        print(f'\n{kills.total()} kills in {starts.total()} starts of {len(starts)} runs (TORTURE_SEED={seed}): no corrupt file, no kill cost more '
              f'than its epoch, every run ended equal to the undisturbed one, 0 processes left.\n'
              f'Killed at ' + ', '.join(f'{name} ({n})' for name, n in kills.most_common()))

# what outlives its parent

@pytest.mark.torture
@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere a kernel or a worker notices later that its parent is gone')
def test_nothing_outlives_its_parent(spawn, root, undisturbed, shared_cache):
    "Data workers, a kernel and papermill, each of a parent that is killed"
    assert train_until(spawn, root, student(shared_cache, training=TRAINING | dict(workers=2)), ('step', 4)) == -signal.SIGKILL
    (root/'long.yaml').write_text(json.dumps(config_dict(settings('long', shared_cache, training=TRAINING | dict(epochs=10**4)))))
    with open(root/'out.log', 'w') as out:
        process = subprocess.Popen([str(c) for c in command('self-distill', root/'long.yaml', root) + ['--notebook']], cwd=ROOT, stdout=out, stderr=out,
                                   env=environment(ROOT, SELF_DISTILL_ROOT=str(root)))
    while len(logged(root, 'long')) < 6: assert process.poll() is None, (root/'out.log').read_text()
    assert left() # the kernel
    process.kill(); process.wait()
    assert_none_left()

# stop signals, through papermill

LONG = 24  # epochs: some seconds in which to stop

@pytest.fixture(scope='module')
def long_run(spawn, shared_cache, tmp_path_factory):
    "A longer run without a teacher, that nobody disturbed: its config and its folder."
    root, config = tmp_path_factory.mktemp('long'), settings('long', shared_cache, training=TRAINING | dict(epochs=LONG))
    finish(spawn(root, config, wer=False), root)
    return config, root

def command(kind, config, root):
    "How a person starts a training."
    if kind == 'self-distill': return [Path(sys.executable).with_name('self-distill'), 'train', '--config', config]
    return [sys.executable, '-m', 'papermill', ROOT/'nbs/30_train.ipynb', root/'train.ipynb', '-k', 'python3', '-p', 'config', config]

@pytest.mark.parametrize('kind, signal_name', [('self-distill', 'SIGTERM'), ('papermill', 'SIGINT'),
                                               *(pytest.param(*p, marks=pytest.mark.torture) for p in (('self-distill', 'SIGINT'), ('papermill', 'SIGTERM')))])
def test_a_stop_signal_writes_a_checkpoint_first(kind, signal_name, long_run, spawn, tmp_path):
    config, undisturbed = long_run
    (tmp_path/'long.yaml').write_text(json.dumps(config_dict(config)))
    with open(tmp_path/'out.log', 'w') as out:
        process = subprocess.Popen([str(c) for c in command(kind, tmp_path/'long.yaml', tmp_path)], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                                   env=environment(ROOT, SELF_DISTILL_ROOT=str(tmp_path)), start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(logged(tmp_path, 'long')) < 6 and process.poll() is None and time.monotonic() < deadline: time.sleep(0.02)
        if signal_name == 'SIGINT': os.killpg(process.pid, signal.SIGINT)  # as a terminal does at Ctrl-C
        else: process.terminate()
        code = process.wait(60)
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path/'out.log').read_text()
    assert code != 0 and 0 < position(tmp_path, 'long') < LONG*UPDATES, f'exit code {code}:\n{said[-3000:]}'
    stopped = 'Stopped by SIG' in (tmp_path/'logs/training.log').read_text()
    assert stopped or (kind, signal_name) == ('papermill', 'SIGTERM'), said[-3000:]  # which papermill does not hand on: as a kill, it costs the epoch in flight
    finish(spawn(tmp_path, config, wer=False), tmp_path)
    assert_equal_runs(tmp_path, undisturbed, 'long', LONG)

# a full disk

@contextmanager
def small_disk(folder, size):
    "A file system of `size` bytes at `folder`."
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True).returncode:
        pytest.skip('only root can mount a small file system; test_checkpoint.py limits the size of files instead')
    try: yield
    finally: subprocess.run(['umount', '-l', folder], check=True)

@pytest.mark.disk
@pytest.mark.skipif(sys.platform != 'linux', reason='mounts a file system')
@pytest.mark.parametrize('what, folder', [('save', 'models/student'), ('log', 'logs')])
def test_a_full_disk_costs_nothing_that_was_written(what, folder, spawn, root, undisturbed, shared_cache):
    with small_disk(root/folder, 4*2**20):
        finish(spawn(root, student(shared_cache), what, (6, root/folder)), root, code=1)
        error = (root/'child.log').read_text().strip().splitlines()[-1]
        assert 'Error: ' in error and 'cannot be written (No space left on device); make room on its disk' in error, error
        assert 'checkpoint_last.pt' in whole(root) and position(root) > 0
        (root/folder/'filler').unlink()
        finish(spawn(root, student(shared_cache)), root)
        assert_equal_runs(root, undisturbed[0])

PLACES = dict( # what writes: its folder, and a function of the root
    record=('results', lambda root: write_record(new_record('training', Config(run='example')))),
    ledger=('results', lambda root: append_ledger('example', 'greedy', 'demo', 'x', 'why')),
    checkpoint=('models/run', lambda root: save_checkpoint(dict(x=torch.zeros(10**5)), root/'models/run/checkpoint_last.pt')),
    language_model=('models/language_models', lambda root: estimate_arpa(['go on'], 2, root/'models/language_models/lm.arpa')),
    features=('cache/features', lambda root: load_corpus(*(getattr(settings('x', root/'cache'), part) for part in ('data', 'text', 'features')))),
    log_probabilities=('cache/logits', lambda root: store(root/'cache/logits/x.npy', np.zeros(10**5))),
    demo_corpus=('cache', lambda root: demo_corpus(root/'cache', 24)),
    log=('logs', lambda root: training.Trainer(settings('x', root/'cache')).fit()),
    figure=('thesis_figures', lambda root: save_figure(plt.figure(), 'loss', Results(None))))

@pytest.mark.disk
@pytest.mark.skipif(sys.platform != 'linux', reason='mounts a file system')
@pytest.mark.parametrize('state', ['full', 'read-only'])
@pytest.mark.parametrize('place', PLACES)
def test_a_place_that_cannot_be_written_is_named(place, state, shared_cache, tmp_path, monkeypatch):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    (folder, write), reason = PLACES[place], dict(zip(('full', 'read-only'), ('No space left on device|[^)]*flac[^)]*|System error.', 'Read-only file system')))[state]
    demo_corpus(shared_cache, 48)
    (tmp_path/'cache').mkdir()
    for corpus in shared_cache.glob('demo-48-*') if place != 'demo_corpus' else (): (tmp_path/'cache'/corpus.name).symlink_to(corpus)
    with small_disk(tmp_path/folder, 2**16):
        if state == 'full': fill(tmp_path/folder)
        else: subprocess.run(['mount', '-o', 'remount,ro', tmp_path/folder], check=True)
        with pytest.raises((OSError, RuntimeError)) as error: write(tmp_path)
        plt.close('all')
        found = re.search(rf'(\S+): cannot be written \(({reason})\); make room on its disk, change its permissions', str(error.value))
        assert found and found[1].startswith(str(tmp_path/folder)), error.value
        assert not [p for p in (tmp_path/folder).rglob('*') if p.suffix == '.tmp']

# at the same time

def test_two_processes_never_train_one_run(spawn, shared_cache, tmp_path, monkeypatch):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    config = settings('long', shared_cache, training=TRAINING | dict(epochs=LONG))
    second, first = Trainer(config), spawn(tmp_path, config)
    while not logged(tmp_path, 'long') and first.is_alive(): time.sleep(0.02)
    with pytest.raises(TrainingError, match='another process is training this run; wait for it, or give this one another name'): second.fit()
    first.kill(); first.join()
    with second.locked(): pass  # a dead process holds nothing

@pytest.mark.torture
def test_runs_that_start_together_make_one_cache_and_equal_weights(spawn, undisturbed, tmp_path_factory):
    "An empty cache, two writers: the demo corpus is spoken and its features are computed by both at once."
    cache = tmp_path_factory.mktemp('cache')
    roots = [with_teacher(tmp_path_factory.mktemp('together'), undisturbed) for _ in range(2)]
    for process, root in [(spawn(root, student(cache)), root) for root in roots]: finish(process, root)
    last = [comparable(load_checkpoint(r/'models/student/checkpoint_last.pt')) for r in (undisturbed[0], *roots)]
    for other in last[1:]: assert not differences({k: v for k, v in last[0].items() if k != 'config'}, {k: v for k, v in other.items() if k != 'config'})
    left = [p for p in cache.rglob('*') if p.suffix in ('.part', '.tmp')]
    assert not left and len(list(cache.glob('demo-*'))) == 1

@pytest.mark.torture
def test_decodings_at_once_are_all_kept_whoever_is_killed(spawn, root):
    "Three processes that decode under six names each, and a fourth that is killed while it writes the same record"
    names = [[f'p{k}_{n}' for n in range(6)] for k in range(4)]
    processes = [spawn(root, part, prepare=dying_at_the_rename if part is names[3] else None, target=decode) for part in names]
    for process, code in zip(processes, (0, 0, 0, -signal.SIGKILL)): finish(process, root, code)
    kept, readings = {d.decoder for d in read_record(root/'results/teacher.json').decodes}, read_ledger(root/'results/test_ledger.jsonl')
    assert kept >= {*sum(names[:3], [])} and not kept & {*names[3][2:]}
    assert Counter(what.split()[0] for what in readings.what) >= Counter(sum(names[:3], [])) and len(readings) == 18 + 3
    finish(spawn(root, names[3], target=decode), root)
    assert {d.decoder for d in read_record(root/'results/teacher.json').decodes} >= {*sum(names, [])}
    assert_none_left()

def dying_at_the_rename(): patched(os, 'replace', 3, die)
