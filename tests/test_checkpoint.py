"""Checkpoints that are damaged, hostile, foreign or moved, each fault really made."""
import os, pickle, pickletools, random, resource, subprocess, sys, zipfile
from collections import Counter
from pathlib import Path

import pytest, torch

from self_distill.train.checkpoint import CheckpointError, content_hash, copy_checkpoint, load_checkpoint, load_model, remove_unfinished, save_checkpoint
from self_distill.core.config import Config, ModelConfig, config_dict
from self_distill.core.environment import computes_bfloat16
from self_distill.core.files import WriteError
from self_distill.train.model import build_model
from self_distill.data.text import Tokenizer

def payload(seed=0, tokenizer=Tokenizer.english()):
    torch.manual_seed(seed)
    config = Config(model=ModelConfig(num_layers=1, hidden_size=8, conv_channels=8))
    model = build_model(config.model, 40, len(tokenizer))
    return dict(model=model.state_dict(), model_settings=model.settings, tokenizer=tokenizer.to_dict(), config=config_dict(config), epoch=3, best_val_wer=48.87)

@pytest.fixture
def saved(tmp_path):
    path = tmp_path/'checkpoint_best.pt'
    save_checkpoint(payload(), path)
    return path

# nothing is executed

class Call:
    "A pickle that calls `function(*arguments)` when it is loaded."
    def __init__(self, function, *arguments): self.call = function, arguments
    def __reduce__(self): return self.call

def hostile(folder):
    "Payloads that would leave a file behind if anything in them ran."
    mark = str(folder/'executed')
    return dict(system=Call(os.system, f'touch {mark}'), eval=Call(eval, f'open({mark!r}, "w")'), exec=Call(exec, f'open({mark!r}, "w")'),
                open=Call(open, mark, 'w'), popen=Call(subprocess.Popen, ['touch', mark]), torch_load=Call(torch.load, mark),
                getattr=Call(getattr, Path(mark), 'touch'), path=Path(mark))

@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('name', hostile(Path('.')))
@pytest.mark.parametrize('place', ['whole file', 'beside the weights', 'in the training state', 'old format of torch', 'bare pickle'])
def test_a_hostile_pickle_is_refused_and_nothing_in_it_runs(name, place, tmp_path):
    bad, path = hostile(tmp_path)[name], tmp_path/'bad.pt'
    good = payload() | dict(format=1, sha256='0'*64)
    content = {'whole file': bad, 'beside the weights': good | dict(extra=bad), 'in the training state': good | dict(training=dict(epoch=bad))}.get(place, good | dict(extra=bad))
    if place == 'bare pickle': path.write_bytes(pickle.dumps(dict(extra=bad)))
    else: torch.save(content, path, _use_new_zipfile_serialization=place != 'old format of torch')
    with pytest.raises(CheckpointError, match=r'bad\.pt: (refused\. It asks for code to be run|damaged or not a checkpoint)') as error: load_checkpoint(path)
    if place in ('whole file', 'beside the weights', 'in the training state'): assert 'refused' in str(error.value)
    with pytest.raises(CheckpointError): load_model(path)
    assert not (tmp_path/'executed').exists()

def test_the_guides_own_check_needs_no_code(saved):
    assert torch.load(saved, map_location='cpu')['best_val_wer'] == 48.87
    with zipfile.ZipFile(saved) as archive:
        name = next(n for n in archive.namelist() if n.endswith('data.pkl'))
        names = {argument for op, argument, _ in pickletools.genops(archive.read(name)) if op.name == 'GLOBAL'}
    assert names <= {'collections OrderedDict', 'torch._utils _rebuild_tensor_v2', 'torch FloatStorage', 'torch LongStorage', 'torch ByteStorage'}

@pytest.mark.parametrize('value', [Path('x'), {1, 2}, object(), print, b'bytes', 1j])
def test_only_plain_values_are_written(value, tmp_path):
    with pytest.raises(CheckpointError, match='tensors, numbers, words, lists and dictionaries'): save_checkpoint(payload() | dict(extra=value), tmp_path/'x.pt')
    assert not list(tmp_path.iterdir())

# damage

def same(a, b): return content_hash(a) == content_hash(b)

def test_a_truncated_file_is_refused_wherever_it_ends(saved):
    whole = saved.read_bytes()
    for size in sorted({0, 1, 2, 4, 30, 100, len(whole) - 1, len(whole) - 22, *random.Random(0).sample(range(len(whole)), 60)}):
        saved.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match='checkpoint_best.pt: damaged or not a checkpoint'): load_checkpoint(saved)

def test_flipped_bits_are_noticed_or_without_effect(saved):
    whole, before, outcome, chance = saved.read_bytes(), load_checkpoint(saved), Counter(), random.Random(1)
    for position in chance.sample(range(len(whole)), 300):
        damaged = bytearray(whole); damaged[position] ^= 1 << chance.randrange(8)
        saved.write_bytes(damaged)
        try: after = load_checkpoint(saved)
        except CheckpointError as e: outcome[str(e).split(': ')[1].split(' ')[0]] += 1; assert 'refused' not in str(e), (position, e)
        else: outcome['without effect'] += 1; assert same(before, after), position
    assert outcome['its'] + outcome['damaged'] > 100, outcome

def test_bytes_appended_or_a_hole_in_the_middle(saved):
    whole, before = saved.read_bytes(), load_checkpoint(saved)
    for damaged in (whole + bytes(100), bytes(100) + whole, whole[:3000] + bytes(len(whole) - 6000) + whole[-3000:], whole[:len(whole)//2] + whole[len(whole)//2 + 64:]):
        saved.write_bytes(damaged)
        try: assert same(load_checkpoint(saved), before)
        except CheckpointError: pass

# foreign files

def altered(path, change, rehash=True):
    "The checkpoint with its content changed, and its hash made to agree."
    content = torch.load(path)
    change(content)
    if rehash: content['sha256'] = content_hash(content)
    torch.save(content, path)

@pytest.mark.parametrize('change, message', [
    (lambda c: c.update(format=0), 'checkpoint format 0, this version reads 1; use the version of self_distill that wrote it'),
    (lambda c: c.update(format=2), 'checkpoint format 2, this version reads 1'),
    (lambda c: c.update(format='one'), 'checkpoint format one'),
    (lambda c: c.update(format=torch.ones(3)), 'checkpoint format'),
    (lambda c: c.pop('tokenizer'), 'not a checkpoint of this project: tokenizer missing'),
    (lambda c: [c.pop(k) for k in list(c) if k != 'model'], 'not a checkpoint of this project: format, model_settings'),
    (lambda c: c['tokenizer']['tokens'].pop(), 'its parts do not fit together .*29 outputs, the tokenizer 28 tokens'),
    (lambda c: c.update(tokenizer=['a']), "its parts do not fit together .*'kind' and 'tokens'"),
    (lambda c: c['model_settings'].update(hidden_size=16), 'its parts do not fit together .*size mismatch|its parts do not fit together .*Error'),
    (lambda c: c.update(model_settings=5), 'its parts do not fit together'),
    (lambda c: c['model_settings'].update(layers=5), 'its parts do not fit together'),
    (lambda c: c['model'].popitem(), 'its parts do not fit together'),
    (lambda c: c.update(model={'w': torch.ones(2)}), 'its parts do not fit together'),
    (lambda c: c['config'].update(seed='one'), 'its parts do not fit together .*`seed` = .one.'),
    (lambda c: c.update(config=None), 'its parts do not fit together'),
], ids=['format 0', 'format 2', 'format in words', 'format as a tensor', 'no tokenizer', 'weights alone', 'a token fewer', 'tokenizer a list', 'another width', 'settings a number', 'unknown setting',
        'a tensor fewer', 'other tensors', 'a wrong setting', 'no config'])
def test_a_foreign_or_mixed_up_file_is_named_for_what_it_is(change, message, saved):
    altered(saved, change)
    with pytest.raises(CheckpointError, match=rf'(?s)checkpoint_best\.pt: .*{message}'): load_model(saved)

@pytest.mark.parametrize('content', [torch.ones(3), [1, 2], 5, {}, None, {'state_dict': {'w': torch.ones(2)}}], ids=str)
def test_other_things_that_torch_saves(content, saved):
    torch.save(content, saved)
    with pytest.raises(CheckpointError, match='not a checkpoint of this project: .*missing'): load_checkpoint(saved)

def test_a_list_that_holds_itself(saved):
    loop = []; loop.append(loop)
    altered(saved, lambda c: c.update(extra=loop), rehash=False)
    with pytest.raises(CheckpointError, match='not a checkpoint of this project'): load_checkpoint(saved)

@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'hello', os.urandom(5000), b'\x80\x02.', b'{"format": 1}'], ids=len)
def test_other_files(content, saved):
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match='checkpoint_best.pt: damaged or not a checkpoint'): load_checkpoint(saved)

@pytest.mark.filterwarnings('ignore')
def test_a_script_of_torch_is_no_checkpoint(saved):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), saved)
    with pytest.raises(CheckpointError, match='checkpoint_best.pt'): load_checkpoint(saved)

def test_a_missing_file_tells_what_is_there(saved):
    with pytest.raises(CheckpointError, match='no such checkpoint; its folder holds checkpoint_best.pt'): load_checkpoint(saved.with_name('checkpoint_bset.pt'))
    with pytest.raises(CheckpointError, match='no such checkpoint; train the run that makes it first'): load_checkpoint(saved.parent/'nowhere/x.pt')
    with pytest.raises(CheckpointError, match='is a folder, a pipe or a device; give a file, such as checkpoint_best.pt'): load_checkpoint(saved.parent)

# moving

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_stored_in_another_precision(dtype, saved):
    x, lengths = torch.randn(2, 60, 40), torch.tensor([60, 40])
    before = load_model(saved).model(x, lengths).logits
    altered(saved, lambda c: c.update(model={k: v.to(dtype) if v.is_floating_point() else v for k, v in c['model'].items()}))
    model = load_model(saved).model
    assert all(p.dtype == torch.float32 for p in model.parameters()) and torch.allclose(model(x, lengths).logits, before, atol=0.05)

@pytest.mark.skipif(not computes_bfloat16(), reason='no bfloat16 here')
def test_a_loaded_model_runs_in_half_precision(saved):
    x, lengths = torch.randn(2, 60, 40), torch.tensor([60, 40])
    model = load_model(saved).model
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): half = model(x, lengths).logits
    assert torch.allclose(half.float(), model(x, lengths).logits, atol=0.05)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_a_checkpoint_is_the_same_wherever_its_tensors_go(saved):
    meta = load_checkpoint(saved, 'cuda')
    assert same(meta, load_checkpoint(saved, 'cpu'))
    save_checkpoint(meta, saved.with_name('again.pt'))
    assert load_checkpoint(saved.with_name('again.pt'))['sha256'] == meta['sha256']

# writing

@pytest.mark.parametrize('failing', ['replace', 'fsync'])
def test_a_failed_write_leaves_the_old_checkpoint(failing, saved, monkeypatch):
    before = saved.read_bytes()
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(WriteError, match='checkpoint_best.pt: cannot be written .No space left on device.; make room'): save_checkpoint(payload(1), saved)
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == [saved.name]

@pytest.mark.skipif(sys.platform == 'win32', reason='limits the size of files')
@pytest.mark.parametrize('share', [0.05, 0.5, 0.98])
def test_a_file_that_may_not_grow_leaves_the_old_checkpoint(share, saved):
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share*len(before)), limits[1]))
    try:
        with pytest.raises(WriteError, match='checkpoint_best.pt: cannot be written .File too large.; make room'): save_checkpoint(payload(1), saved)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == [saved.name]

def test_a_second_name_costs_no_space_and_outlives_the_first(saved):
    best = saved.with_name('best.pt')
    copy_checkpoint(saved, best)
    assert os.path.samefile(saved, best)
    copy_checkpoint(saved, best)  # again, as a resumed run does
    assert sorted(p.name for p in saved.parent.iterdir()) == ['best.pt', saved.name]
    save_checkpoint(payload(1), saved)
    assert same(load_checkpoint(best), payload() | dict(format=1))

def test_a_second_name_where_links_are_impossible(saved, monkeypatch):
    def no_link(*_): raise OSError('no links here')
    monkeypatch.setattr(os, 'link', no_link)
    copy_checkpoint(saved, saved.with_name('best.pt'))
    assert load_checkpoint(saved.with_name('best.pt'))['sha256'] == load_checkpoint(saved)['sha256']

def test_what_a_killed_process_was_writing_is_cleared_away(saved):
    for name in ('.checkpoint_last.pt.77.tmp', '.checkpoint_best.pt.1.tmp'): (saved.parent/name).write_bytes(b'half')
    (saved.parent/'.lock').touch(); (saved.parent/'notes.tmp').touch()
    remove_unfinished(saved.parent)
    assert sorted(p.name for p in saved.parent.iterdir()) == ['.lock', 'checkpoint_best.pt', 'notes.tmp']
