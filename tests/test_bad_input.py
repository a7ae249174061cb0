"Bad input of every kind: the mistakes of mistakes.py and more of each kind, random input, downloads."
import hashlib, http.server, io, json, os, re, sys, tarfile, threading
from pathlib import Path

import mistakes as P, numpy as np, pandas as pd, pytest, torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings, strategies as st

from self_distill.data import public_corpora
from self_distill.use import doctor
from self_distill.data.public_corpora import download, unpack
from self_distill.data.batches import Utterance, collate, epoch_batches, frame_batches, output_frames, too_short
from self_distill.core.config import ConfigError, DataConfig, FeatureConfig, TextConfig, build_config, config_dict
from self_distill.data.corpora import load_corpus
from self_distill.core.environment import pick_device
from self_distill.data.features import read_mfc
from self_distill.data.formats import read_table
from self_distill.decode.language_model import read_sentences, training_sentences
from self_distill.data.manifest import COLUMNS, SPLITS, check_manifest, default_split
from self_distill.core.records import read_record
from self_distill.data.text import Tokenizer, normalize_text
from self_distill.train.trainer import Trainer

G = P.GOOD

def written(path, content):
    "The path, after writing bytes or text to it"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path

def one_speaker_less(files):
    for n, line in ((P.LIST, 'clstk/s7/an-s7\n'), (P.TEXTS, '<s> GO ON </s> (an-s7)\n')): P.replaced(n, line, '')(files)

def extra_digits(folder):
    table = 'path,text,split\na.flac,один,train\nb.flac,один,dev\nc.flac,один,test\n'
    corpus = P.corpus(folder, table, text=TextConfig(alphabet='train'))
    return training_sentences(corpus, P.Config(), [written(folder/'more.txt', 'нажмите 1')])

def archive_numbers(): file = io.BytesIO(); np.savez(file, x=np.zeros((5, 20))); return file.getvalue()

# kind: mistake, a function of a folder that makes it, words of the answer
MORE = [
    ('manifest: no path in the config', lambda f: P.corpus(f, path=None), 'data.path'),
    ('manifest: empty', lambda f: P.corpus(f, ''), 'm.csv', 'holds no utterance'),
    ('manifest: a column twice', lambda f: P.corpus(f, G.replace('split', 'text', 1)), 'm.csv', 'each column once'),
    ('manifest: a JSON line without a path', lambda f: read_table(written(f/'m.jsonl', '{"path": "a.wav", "text": "x"}\n{"text": "y"}')), 'm.jsonl, utterance 2: no path'),
    ('manifest: a row without a path', lambda f: P.corpus(f, G.replace('b.flac', '')), 'm.csv, utterance 2: no path'),
    ('manifest: BOM and CRLF', lambda f: P.read(P.corpus(f, b'\xef\xbb\xbf' + G.replace('\n', '\r\n').encode())), 'read: 3'),
    ('manifest: a decimal comma', lambda f: P.corpus(f, 'path,text,split,start,duration\na.flac,yes,train,"0,1",0.2\n'), "m.csv, utterance 'a-0,1'", "start '0,1'", 'such as 1.335'),
    ('manifest: an empty dev transcript', lambda f: P.corpus(f, G.replace('b.flac,no', 'b.flac,')), "utterance 'b'", 'in dev, where every utterance needs one'),
    ('manifest: another ending', lambda f: P.corpus(f, path=str(written(f/'m.xlsx', b''))), 'm.xlsx: a table has the ending .csv'),
    ('manifest: a negative duration', lambda f: P.corpus(f, 'path,text,split,duration\na.flac,yes,train,-1\n'), "duration '-1'", 'seconds above 0'),
    ('manifest: the cache is a file', lambda f: written(f/'cache', '') and P.corpus(f), 'data.cache'),
    ('transcript: punctuation', lambda f: P.saying(f, '?! … —'), "utterance 'a'", 'holds no word'),
    ('transcript: a huge number', lambda f: P.saying(f, '9' * 400), "utterance 'a'", 'spell'),
    ('recording: missing, on_error skip', lambda f: P.read(P.corpus(f, G + 'nowhere.wav,yes,train\n', on_error='skip')), 'read: 3', 'nowhere.wav'),
    *((f'recording: {name} ends early', lambda f, x=(form, 0.6), name=name: P.recorded(f, P.stored(*x), name), "utterance 'a'", name)
      for form, name in (('FLAC', 'a.flac'), ('NIST', 'a.sph'), ('AIFF', 'a.aiff'), ('W64', 'a.w64'))),
    ('recording: no samples', lambda f: P.recorded(f, P.wav(b'')), "utterance 'a'", 'empty'),
    ('recording: of unknown length, from a pipe', lambda f: P.read(P.recorded(f, P.wav(announced=2**32 - 1))), 'read: 3'),
    ('recording: an hour announced', lambda f: P.recorded(f, P.wav(announced=3600 * 32000)), "utterance 'a'", 'again'),
    ('recording: 8 channels', lambda f: P.read(P.recorded(f, P.wav(bytes(16000 * 16), channels=8))), 'read: 3'),
    ('recording: 44100 Hz', lambda f: P.read(P.recorded(f, P.wav(rate=44100))), 'read: 3'),
    ('feature file: .mfc missing', lambda f: read_mfc(f/'a.mfc'), 'no such feature file'),
    ('feature file: .npy is text', lambda f: P.precomputed(f, b'hello'), "utterance 'a'", 'numpy.save'),
    ('feature file: .npy is an .npz', lambda f: P.precomputed(f, archive_numbers()), "utterance 'a'", 'numpy.save'),
    ('feature file: .npy with a damaged header', lambda f: P.precomputed(f, P.npy(np.zeros((9, 2))).replace(b'}', b' ', 1)), "utterance 'a'", 'numpy.save'),
    *((f'feature file: .npy of shape {x.shape} {x.dtype}', lambda f, x=x: P.precomputed(f, P.npy(x)), "utterance 'a'", '(frames, width)')
      for x in (np.zeros(50), np.array([['a', 'b']]), np.zeros((0, 20)))),
    ('feature file: log-mel of an .mfc', lambda f: written(f/'a.mfc', P.mfc()) and P.corpus(f, G.replace('a.flac', 'a.mfc')), 'features.kind'),
    ('AN4 folder: a file without a speaker', lambda f: P.sphinx(f, P.replaced(P.LIST, 'clstk/s3/an-s3', 'an-s3')), 'line 4', 'folder/speaker/id'),
    ('AN4 folder: too few speakers', lambda f: P.sphinx(f, one_speaker_less), 'no utterance in split dev'),
    ('config: a fold without folds', lambda f: P.corpus(f, fold=3), 'data.fold 3', 'data.protocol=folds'),
    ('config: empty', lambda f: P.config(f, ''), 'c.yaml', 'configs/demo.yaml'),
    ('config: infinity', lambda f: P.config(f, 'training: {gradient_clip: .inf}'), '`training.gradient_clip`'),
    ('config: a run outside its folder', lambda f: P.config(f, 'run: ../elsewhere'), 'c.yaml', '`run`'),
    ('config: an override of another type', lambda f: P.config(f, 'seed: 1', 'seed=one'), '`seed`', "'one'"),
    *([] if torch.backends.mps.is_available() else [('config: no Apple GPU', lambda f: pick_device('mps'), "device 'mps'", 'torch sees 0', 'choose auto or cpu')]),
    ('config: float16 on a CPU, at the door', lambda f: Trainer(build_config(dict(device='cpu', training=dict(precision='float16')))), 'training.precision', "choose 'float32'"),
    ('config: a device for a file', lambda f: P.load_config('/dev/zero'), '/dev/zero', 'a pipe or a device'),
    ('config: extends a pipe', lambda f: os.mkfifo(f/'d.yaml') or P.config(f, 'extends: d.yaml'), 'd.yaml', 'a pipe or a device'),
    ('plan: a pipe', lambda f: os.mkfifo(f/'p.yaml') or P.load_plan('p.yaml'), 'p.yaml', 'a pipe or a device'),
    ('plan: a beam of a million', lambda f: P.plan(f, 'runs: 2', 'decoders: {beam: {beam_width: 1000000}}'), 'beam_width', 'less than or equal to 100000'),
    ('plan: a billion runs', lambda f: P.plan(f, 'runs: 2', 'runs: 1000000000'), '`groups.main.runs`', 'less than or equal to 1000'),
    ('language model: a pipe', lambda f: os.mkfifo(f/'x.arpa') or P.decoder(f/'x.arpa'), 'x.arpa', 'a pipe or a device'),
    ('language model: a folder', lambda f: P.decoder(f), 'is a folder, a pipe or a device'),
    ('language model: digits of an added text in English', extra_digits, 'more.txt', "'нажмите 1' would be spelled in English"),
    ('record: a ledger that is a pipe', lambda f: os.mkfifo(f/'l.jsonl') or P.read_ledger(f/'l.jsonl'), 'l.jsonl', 'a pipe or a device'),
    ('language model: more text in Latin-1', lambda f: read_sentences(written(f/'more.txt', b'caf\xe9')), 'more.txt', 'UTF-8'),
    ('language model: another vocabulary', lambda f: P.decoder(None).decode(np.zeros((7, 20))), '(7, 20)', '29'),
    ('record: no such file', lambda f: read_record(f/'other.json'), 'other.json', 'no such record'),
    ('command line: unknown option', lambda f: P.command(f, 'train', '--confg', 'c.yaml'), 'exit code 2', 'No such option', '--config'),
]
CASES = {f'{kind}: {what}': (make, words) for kind, rows in P.MISTAKES.items() for what, make, *words in rows} | {name: (make, words) for name, make, *words in MORE}
RAW = UnicodeError, RecursionError, json.JSONDecodeError, NotImplementedError # ValueErrors and RuntimeErrors without a message for a person

@pytest.mark.timeout(60)
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', CASES)
def test_a_mistake_gets_a_clear_answer(name):
    make, words = CASES[name]
    text, error = P.answer(make)
    if error is None: assert text.startswith(('read: ', 'a warning: ', 'exit code ')), f'accepted without a word: {text}'
    else: assert isinstance(error, (ValueError, RuntimeError, OSError)) and not isinstance(error, RAW), f'{type(error).__name__}: {text}'
    missing = [w for w in words if w not in text]
    assert words and not missing, f'{missing} not in: {text}'

# random input

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

def clear(function, *kinds):
    "Call `function`; only `kinds` of error, with a message, may come"
    try: return function()
    except kinds as e:
        assert not isinstance(e, RAW) and len(str(e)) > 10
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
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 99))
def test_batches_hold_every_utterance_once(lengths, batch_size, seed, epoch):
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths))) and all(0 < len(b) <= batch_size for b in batches)
    assert batches == epoch_batches(lengths, batch_size, seed, epoch)

@few
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 99))
def test_batches_of_frames_hold_every_utterance_once_and_about_so_many_frames(lengths, frames, seed, epoch):
    batches = frame_batches(lengths, frames, seed, epoch)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b)*max(lengths[i] for i in b) <= 1.09*frames or len(b) == 1 for b in batches)
    assert len(batches) == len(frame_batches(lengths, frames, seed, epoch + 1))

@few
@given(st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(1, 3), max_size=12)), min_size=1, max_size=6))
def test_what_is_not_too_short_has_a_finite_loss(utterances):
    lengths, labels = [T for T, _ in utterances], [l for _, l in utterances]
    batch = collate([Utterance(str(i), x := torch.zeros(T, 2), x, l, '') for i, (T, l) in enumerate(utterances)])
    frames = torch.tensor([output_frames(T) for T in lengths])
    logits = torch.zeros(max(frames), len(utterances), 4).log_softmax(-1)
    losses = torch.nn.functional.ctc_loss(logits, batch.labels, frames, batch.label_lengths, reduction='none')
    assert [i for i, x in enumerate(losses) if not torch.isfinite(x)] == too_short(lengths, labels)

@st.composite
def manifests(draw):
    "A table without a mistake, or with one; and that mistake"
    splits = draw(st.permutations([*SPLITS, *draw(st.lists(st.sampled_from(SPLITS), max_size=6))]))
    table = pd.DataFrame([dict(id=f'u{i}', path=f'{i}.wav', text=draw(st.text(max_size=5)), split=s, speaker=draw(st.sampled_from('st')),
                               duration=draw(st.floats())) for i, s in enumerate(splits)])
    mistake, (a, b) = draw(st.sampled_from([None, 'column', 'id', 'name', 'path', 'empty'])), [splits.index(s) for s in draw(st.permutations(SPLITS))[:2]]
    if mistake == 'column': table = table.drop(columns=draw(st.sampled_from(COLUMNS)))
    if mistake == 'id': table.loc[a, 'id'] = table.id[b]
    if mistake == 'name': table.loc[a, 'split'] = 'Test'
    if mistake == 'path': table.loc[a, 'path'] = draw(st.sampled_from(['', './', 'x/../'])) + table.path[b]
    if mistake == 'empty': table = table[table.split != 'dev']
    return table, mistake

@few
@given(manifests())
def test_a_manifest_is_consistent_or_refused(manifest):
    table, mistake = manifest
    good = clear(lambda: check_manifest(table, 'm.csv'), ValueError)
    assert (good is None) == (mistake is not None), mistake
    if good is None: return
    assert len(good) == len(table) and good.id.is_unique and set(good.split) == {'train', 'dev', 'test'}
    assert all(len(set(group)) == 1 for _, group in good.split.groupby(good.path.map(os.path.normpath)))

@few
@given(st.lists(st.sampled_from([f's{i}' for i in range(20)]), min_size=8, max_size=40))
@pytest.mark.filterwarnings('ignore:fewer than eight')
def test_default_splits_share_no_speaker(speakers):
    table = pd.DataFrame(dict(id=[f'u{i}' for i in range(len(speakers))], speaker=speakers))
    table['split'] = default_split(table)
    if table.speaker.nunique() >= 8: assert (table.groupby('speaker').split.nunique() == 1).all()
    assert set(table.split) == {'train', 'dev', 'test'}

def mutated(good):
    "Random bytes, and good ones with some bytes changed, cut out or doubled"
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

@pytest.fixture(scope='module')
def scratch(tmp_path_factory): return tmp_path_factory.mktemp('fuzz')

@fuzzed
@given(mutated(P.mfc(2)))
def test_fuzzed_mfc(scratch, data):
    x = clear(lambda: P.cepstra(scratch, data), ValueError)
    assert x is None or x.shape[1] == 13 and torch.isfinite(x).all() and len(data) == 4 + 4*x.numel()

@fuzzed
@given(mutated('id,path,text,split\na,"x,y.wav","said ""so""",train\r\nb,z.wav,größe,dev\n'.encode()))
def test_fuzzed_manifest(scratch, data):
    table = clear(lambda: read_table(written(scratch/'m.csv', data)), ValueError)
    assert table is None or {'path', 'text'} <= set(table) and table.path.str.len().min() > 0

@fuzzed
@given(mutated((ROOT/'configs/demo.yaml').read_bytes()))
def test_fuzzed_config(scratch, data):
    config = clear(lambda: P.config(scratch, data), ConfigError)
    assert config is None or build_config(config_dict(config)) == config

LIMITED = ('threads features.sample_rate features.n_mels data.utterances augmentation.time_masks augmentation.frequency_masks model.num_layers '
           'model.hidden_size model.conv_channels training.epochs training.batch_size training.workers training.gradient_accumulation_steps')

def test_numbers_that_no_machine_can_hold_are_refused():
    for key in LIMITED.split():
        values = 10**9
        for part in reversed(key.split('.')): values = {part: values}
        with pytest.raises(ConfigError, match=f'`{key}` = 1000000000: Input should be'): build_config(values)

KEYS = ['training', 'training.epochs', 'seed', 'run', 'temperature.values', 'feature_matching.teacher_layers', 'monitoring.milestones', 'text.alphabet']
yaml_values = st.recursive(st.none() | st.booleans() | st.integers(-10**20, 10**20) | st.floats() | st.text(max_size=8),
                           lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=6)
@few
@given(st.sampled_from(KEYS), yaml_values)
def test_any_value_for_a_key_is_taken_or_refused_by_name(key, value):
    for part in reversed(key.split('.')): value = {part: value}
    try: build_config(value)
    except ConfigError as e: assert key.split('.')[0] in str(e)

# downloads

class Server(http.server.BaseHTTPRequestHandler):
    "Serves `content`; `broken` bytes into an answer it hangs up."
    content, broken, asked = b'', None, []
    def log_message(self, *_): pass
    def do_GET(self):
        if self.path != '/toy.tar.gz': return self.send_error(404)
        self.asked.append(0)
        self.send_response(200)
        self.send_header('Content-Length', len(self.content))
        self.end_headers()
        self.wfile.write(self.content[:self.broken])

@pytest.fixture
def server():
    handler = type('Toy', (Server,), dict(asked=[]))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as service:
        threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True).start()
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
    for part, speakers in dict(train=[f's{i}' for i in range(8)], test=['t0']).items():
        yield f'an4/etc/an4_{part}.fileids', ''.join(f'clstk/{s}/an-{s}\n' for s in speakers).encode()
        yield f'an4/etc/an4_{part}.transcription', ''.join(f'<s> GO ON </s> (an-{s})\n' for s in speakers).encode()
        for n, s in enumerate(speakers): yield f'an4/wav/clstk/{s}/an-{s}.sph', P.stored('NIST', 1, seed=[len(part), n])

def sha256(data): return hashlib.sha256(data).hexdigest()

def test_an4_is_downloaded_once_checked_and_read(server, tmp_path, monkeypatch):
    server.content = tarball(sphinx())
    monkeypatch.setattr(public_corpora, 'AN4_URL', server.url); monkeypatch.setattr(public_corpora, 'AN4_SHA256', sha256(server.content))
    for _ in range(2):
        corpus = load_corpus(DataConfig(corpus='an4', cache=str(tmp_path)), TextConfig(), FeatureConfig())
        assert corpus.summary().utterances.to_dict() == dict(train=7, dev=1, test=1) and server.asked == [0]
        assert corpus.frequency_axis and corpus.input_size == 80
    assert not [p for p in tmp_path.iterdir() if 'part' in p.name or p.name.startswith('.an4.')]

def test_mboshi_is_downloaded_once_checked_and_read(server, tmp_path, monkeypatch):
    names = [f'train/{"abc"[n % 3]}_2015_{n}' for n in range(20)] + ['dev/a_2015_20', 'dev/b_2015_21']
    files = [(f'mboshi-83c5b42/{public_corpora.NAME}/{name}{suffix}', content) for n, name in enumerate(names) for suffix, content in
             (('.wav', P.stored('WAV', 1, seed=[5, n])), ('.mb.cleaned', f'wó twεrε {"yá "*n}\n'.encode()), ('.fr', b'une phrase'))]
    server.content = tarball([*files, (f'mboshi-83c5b42/{public_corpora.NAME}/all/x.wav', b'not wanted')])
    monkeypatch.setattr(public_corpora, 'MBOSHI_URL', server.url)
    def load(): return load_corpus(DataConfig(corpus='mboshi', cache=str(tmp_path)), TextConfig(alphabet='train'), FeatureConfig())
    with pytest.raises(ValueError, match='mboshi.tar.gz: cannot be unpacked .*are not those of http.*delete the archive'): load()
    assert not (tmp_path/'mboshi').exists()
    monkeypatch.setattr(public_corpora, 'MBOSHI_CONTENT', content_of_files(files))
    for _ in range(2): assert load().summary().utterances.to_dict() == dict(train=18, dev=2, test=2)
    assert server.asked == [0] and not list(tmp_path.rglob('*.fr')) and not list(tmp_path.rglob('x.wav'))

def content_of_files(files):
    "What `content_of` must say of the archive's files"
    lines = [f'{"/".join(name.split("/")[2:])} {sha256(content)}\n' for name, content in sorted(files) if not name.endswith('.fr')]
    return sha256(''.join(lines).encode())

def test_a_download_that_breaks_off_leaves_nothing(server, tmp_path):
    server.content, server.broken, path = os.urandom(100000), 30000, tmp_path/'x'
    with pytest.raises(OSError, match='the download broke off, or brought another file .*Run again; without a network'): download(server.url, path, sha256(server.content))
    server.broken = None
    assert not path.exists() and download(server.url, path, sha256(server.content)).read_bytes() == server.content

def test_another_file_than_the_one_that_is_meant(server, tmp_path):
    server.content = b'something else'
    with pytest.raises(OSError, match='brought another file .*nothing was unpacked.*source you trust'): download(server.url, tmp_path/'x', sha256(b'good'))
    assert [p.name for p in tmp_path.iterdir()] in ([], ['x.lock'])
    (tmp_path/'x').write_bytes(b'something else entirely')
    with pytest.raises(ValueError, match='is not the file that is meant .*nothing was unpacked.*source you trust'): download(server.url, tmp_path/'x', sha256(b'good'))

def test_no_network_and_no_such_page(server, tmp_path):
    with pytest.raises(OSError, match='404.*put it at'): download(server.url.replace('toy', 'other'), tmp_path/'x', '0')
    with pytest.raises(OSError, match='broke off, .*put it at'): download('http://127.0.0.1:9/x', tmp_path/'x', '0')
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
    (tmp_path/'deep').mkdir()
    with pytest.raises(ValueError, match='a.tar.gz: cannot be unpacked into .*source you trust'): unpack(tmp_path/'a.tar.gz', tmp_path/'deep/an4')
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
    assert doctor.doctor() and 'everything that is needed is there' in (text := capsys.readouterr().out)
    assert not re.search(rf'{re.escape(str(tmp_path))}|{re.escape(str(Path.home()))}\b/', text)
    monkeypatch.setattr(doctor.importlib.metadata, 'requires', lambda _: ['torch>=99', 'no-such-package', 'numpy<2', 'kenlm==99', 'pytest>=99; extra == "dev"'])
    monkeypatch.setattr(doctor.shutil, 'which', lambda _: None)
    monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda _: type('Usage', (), dict(free=2**20)))
    monkeypatch.setitem(sys.modules, 'kenlm', None)
    assert not doctor.doctor()
    text = capsys.readouterr().out
    for line in [r'missing  packages +torch>=99 \(2\.11\..*; no-such-package \(not installed\)\. Run `make install`',
                 r'absent   C\+\+ compiler .*apt-get install g\+\+', r'absent   KenLM +kenlm is not installed: .*C\+\+ compiler',
                 r'missing  disk .*make room', r'2 needed things are missing']:
        assert re.search(line, text), f'{line} not in\n{text}'

def test_the_doctor_names_a_folder_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    (tmp_path/'logs').write_text('a file')
    assert not doctor.doctor() and re.search('missing  disk +.*logs: cannot be written', capsys.readouterr().out)
