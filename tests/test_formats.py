"Every form in which a corpus may come: made small, trained for an epoch, and evaluated by a model that has never seen it."
import gzip, json, os, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest, soundfile
from conftest import environment, tool

from self_distill import an4, mboshi
from self_distill.config import DataConfig, FeatureConfig, TextConfig, build_config
from self_distill.corpora import SPLITS, load_corpus
from self_distill.evaluate import evaluate
from self_distill.formats import recognize
from self_distill.records import read_record
from self_distill.training import train

TEXTS = dict(train=['go on', 'stop', 'go', 'on on'], dev=['stop go'], test=['on'])
SAID = {f'{s}-{k}': text for s, texts in TEXTS.items() for k, text in enumerate(texts)} # id -> text
NUMBER = {u: n for n, u in enumerate(SAID)}
REAL = Path(__file__).resolve().parents[2]/'shared/data/mboshi'/mboshi.NAME

def split(u): return u.split('-')[0]
def ids(s): return [u for u in SAID if split(u) == s]
def wave(u): return (0.2*np.random.default_rng(NUMBER[u]).normal(size=12000)).clip(-1, 1) # 0.75 s

def audio(folder, u, suffix='.wav'):
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder/f'{u}{suffix}', wave(u), 16000)

def write(path, lines, opened=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path, 'wt', encoding='utf-8') as file: file.writelines(f'{line}\n' for line in lines)

# each makes a corpus in a folder; what `data.path` shall be, and other settings

def own_csv(folder, separator=',', name='own.csv'):
    for u in SAID: audio(folder/'audio', u)
    write(folder/name, [separator.join(['id', 'path', 'text', 'split']), *(separator.join([u, f'audio/{u}.wav', t, split(u)]) for u, t in SAID.items())])
    return folder

def nemo(folder):
    long = np.concatenate([wave(u) for u in SAID]) # dev and test are parts of one recording
    soundfile.write(folder/'all.wav', long, 16000, subtype='PCM_16')
    for s, name in dict(train='train_manifest.json', dev='validation_manifest.json', test='test_manifest.json').items():
        for u in ids(s): audio(folder, u)
        where = lambda u: dict(audio_filepath=f'{u}.wav') if s == 'train' else dict(audio_filepath='all.wav', offset=0.75*NUMBER[u])
        write(folder/name, [json.dumps(where(u) | dict(text=SAID[u], duration=0.75)) for u in ids(s)])
    return folder

def common_voice(folder):
    for s in SPLITS:
        for u in ids(s): audio(folder/'clips', u, '.mp3')
        write(folder/f'{s}.tsv', ['client_id\tpath\tsentence\tup_votes', *(f'{u}\t{u}.mp3\t"{SAID[u].title()}!\t2' for u in ids(s))])
    write(folder/'validated.tsv', ['client_id\tpath\tsentence\tup_votes', 'x\tnowhere.mp3\tno\t2'])
    return folder

def kaldi(folder):
    for s in SPLITS:
        soundfile.write(folder/f'{s}.flac', np.concatenate([wave(u) for u in ids(s)]), 16000)
        write(folder/f'data/{s}/wav.scp', [f'tape-{s} flac -c -d -s ../../{s}.flac |' if s == 'dev' else f'tape-{s} ../../{s}.flac'])
        write(folder/f'data/{s}/segments', [f'{u} tape-{s} {0.75*k:.2f} {0.75*(k + 1):.2f}' for k, u in enumerate(ids(s))])
        write(folder/f'data/{s}/text', [f'{u} {SAID[u]}' for u in ids(s)])
        write(folder/f'data/{s}/utt2spk', [f'{u} spk{NUMBER[u]}' for u in ids(s)])
    return folder/'data'

def librispeech(folder):
    for s, name in dict(train='train-clean-5', dev='dev-clean', test='test-clean').items():
        for u in ids(s): audio(folder/f'LibriSpeech/{name}/{s}/7', u, '.flac')
        write(folder/f'LibriSpeech/{name}/{s}/7/{s}-7.trans.txt', [f'{u} {SAID[u].upper()}' for u in ids(s)])
    return folder/'LibriSpeech'

def lhotse(folder):
    soundfile.write(folder/'all.wav', np.concatenate([wave(u) for u in SAID]), 16000)
    recording = dict(id='all', sources=[dict(type='file', channels=[0], source=str(folder/'all.wav'))], sampling_rate=16000)
    for s in SPLITS: write(folder/f'cuts_{s}.jsonl.gz', [json.dumps(dict(
        id=f'cut-{u}', start=0.75*NUMBER[u], duration=0.75, channel=0, type='MonoCut', recording=recording, supervisions=[
            dict(id=u, recording_id='all', start=0.0, duration=0.75, channel=0, text=SAID[u], speaker=f'spk{NUMBER[u]}')])) for u in ids(s)], gzip.open)
    return folder

def huggingface(folder):
    na = pytest.importorskip('nanoarrow')
    from nanoarrow import ipc
    def words(kind, values): # of bytes
        return kind, na.c_array_from_buffers(kind, len(values), [None, np.cumsum([0, *map(len, values)]).astype('int32'), b''.join(values)])
    def struct(**columns):
        kind = na.struct({name: schema for name, (schema, _) in columns.items()})
        return kind, na.c_array_from_buffers(kind, len(columns['path' if 'path' in columns else 'text'][1]), [None], children=[a for _, a in columns.values()])
    for s, name in dict(train='train', dev='validation', test='test').items():
        for u in ids(s): audio(folder, u)
        strings = lambda values: words(na.string(), [v.encode() for v in values])
        sound = struct(bytes=words(na.binary(), [(folder/f'{u}.wav').read_bytes() for u in ids(s)]), path=strings(f'{u}.wav' for u in ids(s)))
        write(folder/name/'state.json', [json.dumps(dict(_data_files=[dict(filename='data-00000-of-00001.arrow')]))])
        with ipc.StreamWriter.from_path(folder/name/'data-00000-of-00001.arrow') as out:
            out.write_array(struct(audio=sound, text=strings(SAID[u] for u in ids(s)), id=strings(ids(s)))[1])
    return folder

def glosses(folder):
    for s in SPLITS:
        write(folder/f'annotations/manual/{s}.corpus.csv', ['id|folder|signer|annotation', *(f'{u}|{u}/1/*.png|Signer01|{SAID[u].upper()}' for u in ids(s))])
        for u in ids(s): (folder/f'features/{s}').mkdir(parents=True, exist_ok=True); np.save(folder/f'features/{s}/{u}.npy', wave(u)[:1600].reshape(80, 20))
    return folder

def own_module(folder):
    own_csv(folder)
    write(folder/'recordings.py', ['import pandas as pd', 'def mine(data, features):',
                                   '    table = pd.read_csv(f"{data.path}/own.csv")', '    return table.assign(path=data.path + "/" + table.path)'])
    return folder

GLOSSES = dict(features=dict(kind='precomputed'), text=dict(tokenizer='word'))
FORMS = {'csv': (own_csv, 'tables', {}), 'semicolon': (lambda f: own_csv(f, ';')/'own.csv', 'table', {}), 'tsv': (lambda f: own_csv(f, '\t', 'own.tsv'), 'tables', {}),
         'nemo': (nemo, 'tables', {}), 'common voice': (common_voice, 'tables', {}), 'kaldi': (kaldi, 'Kaldi', {}), 'librispeech': (librispeech, 'LibriSpeech', {}),
         'lhotse': (lhotse, 'tables', {}), 'hugging face': (huggingface, 'Hugging Face', {}), 'glosses': (glosses, 'glosses', GLOSSES),
         'own module': (own_module, None, dict(data=dict(corpus='recordings:mine')))}

def settings(path, **more):
    values = dict(run='form', threads=1, device='cpu', model=dict(num_layers=1, hidden_size=8, conv_channels=8, dropout=0.0),
                  training=dict(epochs=1, batch_size=4, gradient_accumulation_steps=1, gradient_norms_every=0, optimizer=dict(learning_rate=1e-3)))
    return build_config(values | more | dict(data=dict(corpus='manifest', path=str(path)) | more.get('data', {})))

@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path/'root'))
    monkeypatch.syspath_prepend(tmp_path) # put back afterwards, with what a corpus of one's own appends
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.mark.filterwarnings('ignore:.*speakers')
@pytest.mark.parametrize('form', FORMS)
def test_a_corpus_of_this_form_trains_for_an_epoch(form, root):
    make, name, more = FORMS[form]
    path = make(root)
    if name: assert recognize(path) == name
    config = settings(path.relative_to(root), **more)
    corpus = load_corpus(config.data, config.text, config.features)
    found = corpus.manifest.set_index(corpus.manifest.id.str.removesuffix('-0.75'))
    assert sorted(corpus.manifest.text) == sorted(SAID.values())
    assert {s: sorted(corpus.rows(s).text) for s in SPLITS} == {s: sorted(t) for s, t in TEXTS.items()}
    if form != 'glosses': assert (found.duration - 0.75).abs().max() < 0.05
    if form not in ('glosses', 'common voice'): # the right part of the right recording
        for row in corpus.manifest.itertuples():
            u = next(u for u, t in SAID.items() if t == row.text and split(u) == row.split)
            assert np.allclose(soundfile.read(row.path)[0], wave(u), atol=2e-4)
    record = train(config)
    assert [d.split for d in record.decodes] == ['dev'] and np.isfinite(record.epochs[0]['train/loss'])
