"One training in several processes: the numbers of a single one"
import json, os, signal, subprocess, sys
from types import SimpleNamespace

import numpy as np, pytest, torch
from conftest import ROOT, environment
from test_torture import TRAINING, settings

from self_distill.train import trainer
from self_distill.train.checkpoint import load_checkpoint
from self_distill.core.config import build_config, config_dict
from self_distill.core.records import read_record
from self_distill.train.training import train

WORKER = '''
import json, sys
from self_distill.core.config import build_config
from self_distill.train.training import train
train(build_config(json.loads(sys.argv[1])))
'''

def config_of(cache, **more):
    "A student of a moving teacher; without dropout, which differs between processes"
    return settings('run', cache, model=dict(num_layers=1, hidden_size=16, conv_channels=16, dropout=0.0),
                    training=TRAINING | dict(epochs=2, batch_size=5), teacher=dict(moving=True), **more)

def in_two_processes(root, config):
    (root/'worker.py').write_text(WORKER)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', 'worker.py', json.dumps(config_dict(config))]
    done = subprocess.run(command, cwd=root, env=environment(ROOT, SELF_DISTILL_ROOT=str(root)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

def numbers_of(folder, update):
    "What the log has of an update"
    rows = map(json.loads, (folder/'logs/run/metrics.jsonl').read_text().splitlines())
    return next(r for r in rows if r['update'] == update and 'train/loss_components/hard_ctc_loss' in r)

def stop_after(updates, monkeypatch):
    "Send this process SIGTERM in its n-th update"
    step, count = trainer.Trainer.train_step, iter(range(1, 10**6))
    def stopping(self, *arguments):
        if next(count) == updates: os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)
    monkeypatch.setattr(trainer.Trainer, 'train_step', stopping)

def test_two_processes_go_on_with_the_numbers_of_one(shared_cache, tmp_path, monkeypatch):
    config, whole, shared = config_of(shared_cache), tmp_path/'whole', tmp_path/'shared'
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(whole))
    alone = train(config)
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(shared))
    with monkeypatch.context() as patch, pytest.raises(trainer.TrainingStopped):
        stop_after(2, patch)
        train(config)  # two updates alone, the others together
    said = in_two_processes(shared, config)
    together = read_record(shared/'results/run.json')
    assert said.count('Resumed run') == said.count('Epoch 2/2') == 1  # process 0 speaks
    for update, close in ((3, 1e-5), (8, 1e-2)):  # the first one together, and the last: Adam enlarges what is rounded
        ours, theirs = (numbers_of(folder, update) for folder in (shared, whole))
        assert ours.keys() == theirs.keys() and len(ours) > 6
        for name in ours: assert np.isclose(ours[name], theirs[name], rtol=close, atol=1e-7), name
    assert [e['wer'] for e in together.epochs] == [e['wer'] for e in alone.epochs]
    assert np.allclose([e['loss'] for e in together.epochs], [e['loss'] for e in alone.epochs], rtol=1e-3)
    ours, theirs = (load_checkpoint(folder/'models/run/checkpoint_last.pt')['training']['model'] for folder in (shared, whole))
    for name in theirs: torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)
    assert [d.hypotheses for d in together.decodes] == [d.hypotheses for d in alone.decodes]

def test_a_process_without_the_checkpoint_of_the_others_is_refused(monkeypatch):
    one_of_two = SimpleNamespace(update=3, device='cpu', folder='models/run')
    monkeypatch.setattr(trainer, 'processes', lambda: 2)
    monkeypatch.setattr(trainer, 'totals', lambda mine, device: [mine[0] + 3])
    trainer.Trainer._check_alike(one_of_two)
    monkeypatch.setattr(trainer, 'totals', lambda mine, device: [mine[0] + 0])
    with pytest.raises(trainer.TrainingError, match='not all processes'): trainer.Trainer._check_alike(one_of_two)
