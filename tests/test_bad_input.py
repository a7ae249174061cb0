"""Bad input of every kind, each fault really made: the page's faults one by one, chance finds of hypothesis, bytes at random, downloads."""
import hashlib, http.server, io, json, os, re, sys, tarfile, threading
from pathlib import Path

import nbformat, numpy as np, pytest, torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings, strategies as st

from self_distill import corpora, doctor
from self_distill.batches import collate, epoch_batches, frames_needed, output_frames, too_short, Utterance
from self_distill.config import ConfigError, DataConfig, FeatureConfig, TextConfig, build_config, config_dict, load_config
from self_distill.corpora import COLUMNS, SPLITS, check_manifest, default_split, download, load_corpus, read_table, unpack
from self_distill.features import read_mfc
from self_distill.text import Tokenizer, normalize_text

# the page: nbs/34_bad_input.ipynb

def page():
    "What the page's code defines, its tables left out."
    names = {}
    for cell in nbformat.read(ROOT/'nbs/34_bad_input.ipynb', as_version=4).cells:
        if cell.cell_type == 'code': exec(re.sub(r'(?m)^table\(\w+\)$', '', cell.source), names)
    return names

PAGE = page()
RAW = (UnicodeError, RecursionError, json.JSONDecodeError, NotImplementedError)  # of the right kind by inheritance, and yet no message for a person

@pytest.mark.timeout(60)
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', PAGE['FAULTS'])
def test_a_fault_gets_a_clear_answer(name):
    _, _, words, make = PAGE['FAULTS'][name]
    said, error = PAGE['answer'](make)
    if error is None: assert said.startswith(('read: ', 'a warning: ', 'self-distill: ', 'exit code ')), f'accepted in silence: {said}'
    else: assert isinstance(error, (ValueError, RuntimeError, OSError)) and not isinstance(error, RAW), f'{type(error).__name__}: {said}'
    missing = [w for w in words if w not in said]
    assert words and not missing, f'{missing} not in: {said}'

# chance finds

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

def clear(function, *kinds):
    "Call `function`; only `kinds` of error, with a message, may come."
    try: return function()
    except kinds as e:
        assert type(e) is not UnicodeDecodeError and not isinstance(e, (RecursionError, json.JSONDecodeError)) and len(str(e)) > 10
        return None

@few
@given(st.text(max_size=60), st.sampled_from(['lower', 'upper', 'keep']), st.sampled_from(['spell', 'keep']), st.sampled_from(['en', 'de', 'tr', 'ru']))
def test_normalized_text_stays_what_it_is(text, case, digits, language):
    once = clear(lambda: normalize_text(text, case, digits, language), ValueError)
    if once is None: return
    assert once == ' '.join(once.split()) and normalize_text(once, case, digits, language) == once
    if once:
        tokenizer = Tokenizer.from_texts([once])
        assert tokenizer.decode(tokenizer.encode(once)) == once and 0 not in tokenizer.encode(once)

@few
@given(st.text(max_size=40))
def test_a_tokenizer_encodes_or_names_the_symbol(text):
    labels = clear(lambda: Tokenizer.english().encode(text), ValueError)
    assert labels is None or Tokenizer.english().decode(labels) == text

@few
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 99))
def test_batches_hold_every_utterance_once(lengths, batch_size, seed, epoch):
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths))) and all(0 < len(b) <= batch_size for b in batches)
    assert batches == epoch_batches(lengths, batch_size, seed, epoch)

@few
@given(st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(1, 3), max_size=12)), min_size=1, max_size=6))
def test_what_is_not_too_short_has_a_finite_loss(utterances):
    lengths, labels = [T for T, _ in utterances], [l for _, l in utterances]
    batch = collate([Utterance(str(i), x := torch.zeros(T, 2), x, l, '') for i, (T, l) in enumerate(utterances)])
    frames = torch.tensor([output_frames(T) for T in lengths])
    logits = torch.zeros(max(frames), len(utterances), 4).log_softmax(-1)
    losses = torch.nn.functional.ctc_loss(logits, batch.labels, frames, batch.label_lengths, reduction='none')
    assert [i for i, x in enumerate(losses) if not torch.isfinite(x)] == too_short(lengths, labels)
    assert batch.lengths.tolist() == lengths

@st.composite
def manifests(draw):
    "A table that is right, or with one fault; and that fault."
    splits = draw(st.permutations([*SPLITS, *draw(st.lists(st.sampled_from(SPLITS), max_size=6))]))
    table = corpora.pd.DataFrame([dict(id=f'u{i}', path=f'{i}.wav', text=draw(st.text(max_size=5)), split=s, speaker=draw(st.sampled_from('st')), duration=draw(st.floats())) for i, s in enumerate(splits)])
    fault, (a, b) = draw(st.sampled_from([None, 'column', 'id', 'name', 'path', 'empty'])), [splits.index(s) for s in draw(st.permutations(SPLITS))[:2]]
    if fault == 'column': table = table.drop(columns=draw(st.sampled_from(COLUMNS)))
    if fault == 'id': table.loc[a, 'id'] = table.id[b]
    if fault == 'name': table.loc[a, 'split'] = 'Test'
    if fault == 'path': table.loc[a, 'path'] = draw(st.sampled_from(['', './', 'x/../'])) + table.path[b]
    if fault == 'empty': table = table[table.split != splits[a]]
    return table, fault

@few
@given(manifests())
def test_a_manifest_is_consistent_or_refused(manifest):
    table, fault = manifest
    good = clear(lambda: check_manifest(table, 'm.csv'), ValueError)
    assert (good is None) == (fault is not None), fault
    if good is None: return
    assert len(good) == len(table) and good.id.is_unique and set(good.split) == {'train', 'dev', 'test'}
    assert all(len(set(group)) == 1 for _, group in good.split.groupby(good.path.map(os.path.normpath)))

@few
@given(st.lists(st.sampled_from([f's{i}' for i in range(20)]), min_size=8, max_size=40))
@pytest.mark.filterwarnings('ignore:fewer than eight')
def test_default_splits_share_no_speaker(speakers):
    table = corpora.pd.DataFrame(dict(id=[f'u{i}' for i in range(len(speakers))], speaker=speakers))
    table['split'] = default_split(table)
    if table.speaker.nunique() >= 8: assert (table.groupby('speaker').split.nunique() == 1).all()
    assert set(table.split) == {'train', 'dev', 'test'}

# bytes at random

def mutated(good):
    "Random bytes, and good ones with some bytes changed, cut out or doubled."
    def change(edits):
        data = bytearray(good)
        for kind, where, value in edits:
            at = where % (len(data) + 1)
            if kind == 0 and at < len(data): data[at] = value
            elif kind == 1: del data[at:at + value]
            else: data[at:at] = data[at:at + value]
        return bytes(data)
    edit = st.tuples(st.integers(0, 2), st.integers(0, 10**6), st.integers(0, 255))
    return st.one_of(st.binary(max_size=200), st.lists(edit, min_size=1, max_size=4).map(change))

fuzzed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
CEPSTRA = np.array(26, '>i4').tobytes() + np.arange(26, dtype='>f4').tobytes()
MANIFEST = 'id,path,text,split\na,"x,y.wav","said ""so""",train\r\nb,z.wav,größe,dev\n'.encode()
CONFIG = (ROOT/'configs/demo.yaml').read_bytes()

@pytest.fixture(scope='module')
def scratch(tmp_path_factory): return tmp_path_factory.mktemp('fuzz')

@fuzzed
@given(mutated(CEPSTRA))
def test_fuzzed_mfc(scratch, data):
    (scratch/'x.mfc').write_bytes(data)
    x = clear(lambda: read_mfc(scratch/'x.mfc'), ValueError)
    assert x is None or x.shape[1] == 13 and torch.isfinite(x).all() and len(data) == 4 + 4*x.numel()

@fuzzed
@given(mutated(MANIFEST))
def test_fuzzed_manifest(scratch, data):
    (scratch/'m.csv').write_bytes(data)
    table = clear(lambda: read_table(scratch/'m.csv'), ValueError)
    assert table is None or {'path', 'text'} <= set(table) and table.path.str.len().min() > 0

@fuzzed
@given(mutated(CONFIG))
def test_fuzzed_config(scratch, data):
    (scratch/'c.yaml').write_bytes(data)
    config = clear(lambda: load_config(scratch/'c.yaml'), ConfigError)
    assert config is None or build_config(config_dict(config)) == config

yaml_values = st.recursive(st.none() | st.booleans() | st.integers(-10**20, 10**20) | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=6)
@few
@given(st.sampled_from(['training', 'training.epochs', 'seed', 'run', 'temperature.values', 'feature_matching.teacher_layers', 'monitoring.milestones', 'data.path', 'text.alphabet']), yaml_values)
def test_any_value_for_a_key_is_taken_or_refused_by_name(key, value):
    values = {}
    *sections, name = key.split('.')
    inner = values
    for s in sections: inner = inner.setdefault(s, {})
    inner[name] = value
    try: build_config(values)
    except ConfigError as e: assert key.split('.')[0] in str(e)

# downloads

class Server(http.server.BaseHTTPRequestHandler):
    "Serves `content` with ranges; `broken` bytes into an answer it hangs up."
    content, broken, asked = b'', None, []
    def log_message(self, *_): pass
    def do_GET(self):
        if self.path != '/toy.tar.gz': return self.send_error(404)
        start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        self.asked.append(start)
        if start >= len(self.content): return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', len(self.content) - start)
        self.end_headers()
        self.wfile.write(self.content[start:][:self.broken])

@pytest.fixture
def server():
    handler = type('Toy', (Server,), dict(asked=[]))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        handler.url = f'http://127.0.0.1:{service.server_port}/toy.tar.gz'
        yield handler
        service.shutdown()

def tarball(files=(), members=()):
    "A gzipped tar file of (name, content) and of members as they are."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as tar:
        for name, content in files:
            info = tarfile.TarInfo(name); info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for member in members: tar.addfile(member)
    return out.getvalue()

def sphinx():
    "Nine speakers' AN4, as the archive holds it."
    wave = PAGE['stored']('NIST', 1)
    for part, speakers in dict(train=[f's{i}' for i in range(8)], test=['t0']).items():
        yield f'an4/etc/an4_{part}.fileids', ''.join(f'clstk/{s}/an-{s}\n' for s in speakers).encode()
        yield f'an4/etc/an4_{part}.transcription', ''.join(f'<s> GO ON </s> (an-{s})\n' for s in speakers).encode()
        for s in speakers: yield f'an4/wav/clstk/{s}/an-{s}.sph', wave

def sha256(data): return hashlib.sha256(data).hexdigest()

def test_an4_is_downloaded_once_checked_and_read(server, tmp_path, monkeypatch):
    server.content = tarball(sphinx())
    monkeypatch.setattr(corpora, 'AN4_URL', server.url); monkeypatch.setattr(corpora, 'AN4_SHA256', sha256(server.content))
    for _ in range(2):
        corpus = load_corpus(DataConfig(corpus='an4', cache=str(tmp_path)), TextConfig(), FeatureConfig())
        assert corpus.summary().utterances.to_dict() == dict(train=7, dev=1, test=1) and server.asked == [0]
    assert not [p for p in tmp_path.iterdir() if 'part' in p.name or p.name.startswith('.an4.')]

def test_a_download_goes_on_where_it_broke_off(server, tmp_path):
    server.content, server.broken, path = os.urandom(100000), 30000, tmp_path/'x'
    for have in (30000, 60000, 90000):
        with pytest.raises(OSError, match=r'toy\.tar\.gz: the download broke off \(.*bytes came.*Run again to go on; without a network, fetch it elsewhere and put it at .*x'): download(server.url, path, sha256(server.content))
        assert (tmp_path/'x.part').stat().st_size == have and not path.exists()
    download(server.url, path, sha256(server.content))
    assert path.read_bytes() == server.content and server.asked == [0, 30000, 60000, 90000]

def test_a_part_that_was_whole_already(server, tmp_path):
    server.content = os.urandom(1000)
    (tmp_path/'x.part').write_bytes(server.content)
    assert download(server.url, tmp_path/'x', sha256(server.content)).read_bytes() == server.content

@pytest.mark.parametrize('where', ['x', 'x.part', 'server'])
def test_another_file_than_the_one_that_is_meant(where, server, tmp_path):
    server.content = b'something else'
    if where != 'server': (tmp_path/where).write_bytes(b'something else entirely')
    with pytest.raises(ValueError, match='is not the file that is meant .*nothing was unpacked.*source you trust'): download(server.url, tmp_path/'x', sha256(b'good'))
    assert not (tmp_path/'x.part').exists()

def test_no_network_and_no_such_page(server, tmp_path, monkeypatch):
    with pytest.raises(OSError, match='404.*put it at'): download(server.url.replace('toy', 'other'), tmp_path/'x', '0')
    with pytest.raises(OSError, match='broke off .*put it at'): download('http://127.0.0.1:9/x', tmp_path/'x', '0')
    monkeypatch.setenv('SELF_DISTILL_OFFLINE', '1')
    with pytest.raises(OSError, match='SELF_DISTILL_OFFLINE.*Fetch it elsewhere and put it at this place'): download(server.url, tmp_path/'x', '0')
    (tmp_path/'x').write_bytes(b'by hand')
    assert download(server.url, tmp_path/'x', sha256(b'by hand')) == tmp_path/'x' and not server.asked

def member(name, kind=tarfile.REGTYPE, link=''):
    info = tarfile.TarInfo(name); info.type, info.linkname = kind, link
    return info

@pytest.mark.parametrize('members', [
    [member('../escaped')], [member('an4/../../escaped')], [member('an4/link', tarfile.SYMTYPE, '../../escaped')], [member('an4/link', tarfile.SYMTYPE, '/etc')],
    [member('link', tarfile.SYMTYPE, '..'), member('link/escaped')], [member('an4/hard', tarfile.LNKTYPE, '/etc/passwd')], [member('an4/hard', tarfile.LNKTYPE, '../escaped')],
    [member('an4/device', tarfile.CHRTYPE)], [member('an4/pipe', tarfile.FIFOTYPE)]], ids=lambda ms: ' '.join(f'{m.name}→{m.linkname}' if m.linkname else m.name for m in ms))
def test_an_archive_cannot_reach_outside(members, tmp_path):
    (tmp_path/'a.tar.gz').write_bytes(tarball([('an4/etc/ok', b'ok')], members))
    with pytest.raises(ValueError, match='a.tar.gz: cannot be unpacked into .*source you trust'): unpack(tmp_path/'a.tar.gz', tmp_path/'deep/an4') if (tmp_path/'deep').mkdir() else unpack(tmp_path/'a.tar.gz', tmp_path/'deep/an4')
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['a.tar.gz', 'deep']

def test_an_absolute_path_stays_inside(tmp_path):
    (tmp_path/'a.tar').write_bytes(tarball([(f'{tmp_path}/escaped', b'x')]))
    (tmp_path/'deep').mkdir()
    unpack(tmp_path/'a.tar', tmp_path/'deep/an4')
    assert not (tmp_path/'escaped').exists() and (tmp_path/'deep/an4'/str(tmp_path).lstrip('/')/'escaped').exists()

@pytest.mark.parametrize('data', [b'', b'hello', tarball([('a', bytes(range(256))*40)])[:150]], ids=['empty', 'text', 'cut short'])
def test_a_damaged_archive(data, tmp_path):
    (tmp_path/'a.tar.gz').write_bytes(data)
    with pytest.raises(ValueError, match='a.tar.gz: cannot be unpacked'): unpack(tmp_path/'a.tar.gz', tmp_path/'an4')
    assert [p.name for p in tmp_path.iterdir()] == ['a.tar.gz']

# doctor

def test_the_doctor_finds_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    assert doctor.doctor() and 'everything that is needed is there' in (said := capsys.readouterr().out)
    assert not re.search(rf'{re.escape(str(tmp_path))}|{re.escape(str(Path.home()))}\b/', said)
    monkeypatch.setattr(doctor.importlib.metadata, 'requires', lambda _: ['torch>=99', 'no-such-package', 'numpy<2', 'pytest>=99; extra == "dev"'])
    monkeypatch.setattr(doctor.shutil, 'which', lambda _: None)
    monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda _: type('Usage', (), dict(free=2**20)))
    monkeypatch.setitem(sys.modules, 'espeakng_loader', None)
    monkeypatch.setitem(sys.modules, 'kenlm', None)
    assert not doctor.doctor()
    said = capsys.readouterr().out
    for line in [r'missing  packages +torch>=99 \(2\.11\..*; no-such-package \(not installed\)\. Run `make install`', r'absent   C\+\+ compiler .*apt-get install g\+\+', r'absent   eSpeak NG .*pip install espeakng-loader',
                 r'missing  KenLM +kenlm is not installed: .*C\+\+ compiler', r'missing  disk .*make room', r'3 needed things are missing']: assert re.search(line, said), f'{line} not in\n{said}'

def test_the_doctor_says_which_folder_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    (tmp_path/'logs').write_text('a file')
    finding = next(f for f in doctor.examine() if f.subject == 'disk')
    assert finding.state == 'missing' and finding.said.startswith('logs/ cannot be written')
