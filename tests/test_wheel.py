"The wheel by itself: it holds the package, and transcribes in a folder that is no repository."
import json, subprocess, sys, zipfile

import numpy as np, pytest, soundfile, torch
from conftest import environment

from self_distill.train.checkpoint import save_checkpoint
from self_distill.core.config import Config, config_dict
from self_distill.train.model import BiLSTMCTC
from self_distill.data.text import Tokenizer

def invented_checkpoint(path):
    "A checkpoint with random weights, for log-mel features."
    torch.manual_seed(0)
    model, tokenizer = BiLSTMCTC(80, 29, 1, 8, 8), Tokenizer.english()
    save_checkpoint(dict(model=model.state_dict(), model_settings=model.settings, tokenizer=tokenizer.to_dict(), config=config_dict(Config()),
                         epoch=1, best_val_wer=100.0), path)

@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "What pip would install, unpacked into a folder, and another folder to stand in."
    from conftest import copy_repository
    source, site, here = (tmp_path_factory.mktemp(name) for name in ('source', 'site', 'here'))
    copy_repository(source)
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', str(site), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(site.glob('*.whl'))) as wheel: wheel.extractall(site)
    return site, here

def test_the_wheel_transcribes_outside_of_a_repository(installed):
    site, here = installed
    assert (site/'self_distill/use/report.html').exists() # the template of `report`
    invented_checkpoint(here/'model.pt')
    soundfile.write(here/'a.ogg', 0.1*np.random.default_rng(0).normal(size=(44100, 2)), 44100)
    code = "import sys, self_distill.use.cli as c; print(c.__file__, file=sys.stderr); c.main(sys.argv[1:])"
    command = [sys.executable, '-c', code, 'transcribe', 'a.ogg', '--checkpoint', 'model.pt', '--format', 'json', '--pause', '0']
    done = subprocess.run(command, cwd=here, env=environment(site), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stderr                     # the wheel's package, not this repository's
    told = json.loads(done.stdout)
    assert told['file'].endswith('a.ogg') and told['seconds'] == 1.0
    assert sorted(p.name for p in here.iterdir()) == ['a.ogg', 'model.pt'] # nothing is left behind
