"Every form in which a corpus may come: made small, trained for an epoch, and evaluated by a model that has never seen it."
import gzip, json, shutil, subprocess, sys
from pathlib import Path

import numpy as np, pytest, soundfile
from conftest import environment

from self_distill.data import public_corpora
from self_distill.core.config import DataConfig, FeatureConfig, TextConfig, build_config
from self_distill.data.corpora import load_corpus
from self_distill.evaluate.evaluate import evaluate
from self_distill.data.formats import recognize
from self_distill.data.manifest import SPLITS
from self_distill.core.records import RecordError, read_record
from self_distill.train.training import train

TEXTS = dict(train=['go on', 'stop', 'go', 'on on'], dev=['stop go'], test=['on'])
SAID = {f'{s}-{k}': text for s, texts in TEXTS.items() for k, text in enumerate(texts)} # id -> text
NUMBER = {u: n for n, u in enumerate(SAID)}

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
SPEAKERS = {'common voice': str, 'kaldi': lambda u: f'spk{NUMBER[u]}', 'lhotse': lambda u: f'spk{NUMBER[u]}', 'librispeech': split,
            'glosses': lambda u: 'Signer01'} # of an utterance; elsewhere no one is named

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
def test_a_corpus_of_this_form_is_read(form, root):
    make, name, more = FORMS[form]
    path = make(root)
    if name: assert recognize(path) == name
    config = settings(path.relative_to(root), **more)
    corpus = load_corpus(config.data, config.text, config.features)
    assert sorted(corpus.manifest.text) == sorted(SAID.values())
    assert {s: sorted(corpus.rows(s).text) for s in SPLITS} == {s: sorted(t) for s, t in TEXTS.items()}
    if form != 'glosses': assert (corpus.manifest.duration - 0.75).abs().max() < 0.05
    for row in corpus.manifest.itertuples():
        u = next(u for u, t in SAID.items() if t == row.text and split(u) == row.split)
        assert row.speaker == SPEAKERS.get(form, lambda u: 'unknown')(u) and (form == 'nemo' or row.id == u)
        if form not in ('glosses', 'common voice'): # the right part of the right recording
            assert np.allclose(soundfile.read(row.path)[0], wave(u), atol=2e-4)
    if form == 'glosses': # words, and arrays in place of sound
        record = train(config)
        assert [d.split for d in record.decodes] == ['dev'] and np.isfinite(record.epochs[0]['train/loss'])

def changed(folder, rows):
    "A CSV file of the recordings of `own_csv`: (id, split)"
    write(folder/'other.csv', ['id,path,text,split', *(f'{u},audio/{u}.wav,{SAID[u]},{s}' for u, s in rows)])
    return folder/'other.csv'

@pytest.mark.filterwarnings('ignore:.*speakers')
def test_a_model_is_evaluated_on_a_corpus_it_has_never_seen(root):
    config = settings(own_csv(root)/'own.csv')
    train(config)
    best, another = 'models/form/checkpoint_best.pt', ['data.corpus=manifest', f'data.path={root}/other.csv']
    def names(): return sorted(p.stem for p in (root/'root/results').glob('*.json'))
    evaluate(best, 'test', overrides=['data.corpus=manifest', f'data.path={root}'], why='test', show=False)
    assert names() == ['form'] # the corpus that it was trained on, by whatever path
    for u, seed in (('train-0', 50), ('test-0', 51)):
        soundfile.write(root/f'audio/new-{u}.wav', 0.1*np.random.default_rng(seed).normal(size=12000), 16000)
        SAID[f'new-{u}'] = 'stop'
    try:
        changed(root, [('new-train-0', 'test'), ('new-test-0', 'test')])
        evaluate(best, 'test', overrides=another, why='test', show=False)
        [other] = [n for n in names() if n != 'form']
        assert other == 'form_on_other' and len(read_record(f'results/{other}.json').utterances['test']) == 2
        evaluate(best, 'test', overrides=another, why='test', show=False) # again: the same record
        changed(root, [('new-train-0', 'test')])
        with pytest.raises(RecordError, match='which are not the 1 that manifest has now.*run='): evaluate(best, 'test', overrides=another)
        another += ['run=calls'] # other contents under the same name
        evaluate(best, 'test', overrides=another, why='test', show=False)
        assert names() == ['calls', 'form', 'form_on_other']
        with pytest.raises(ValueError, match="manifest: split 'dev' holds no utterance"): evaluate(best, 'dev', overrides=another)
        changed(root, [('new-train-0', 'test'), ('train-1', 'test')])
        another[-1] = 'run=more'
        with pytest.raises(ValueError, match=r'has heard 1 test utterances \(train-1\) of manifest'): evaluate(best, 'test', overrides=another)
        write(root/'other.csv', ['path,text,split', 'audio/new-train-0.wav,größe,test'])
        with pytest.raises(ValueError, match=r"'audio/new-train-0': 'ß'.*'ö'.*outside the vocabulary"): evaluate(best, 'test', overrides=another)
        changed(root, [('new-train-0', 'test')])
        with pytest.raises(ValueError, match="split 'train' holds no utterance"): train(settings(root/'other.csv', run='test_only'))
    finally:
        for u in ('new-train-0', 'new-test-0'): del SAID[u]

def test_where_the_user_stands_is_known_to_a_process_started_elsewhere(root):
    (root/'here').mkdir()
    code = ('import os, sys; os.chdir("/"); from self_distill.data.corpora import find_corpus, data_path; from self_distill.core.config import DataConfig;'
            'print(find_corpus("recordings:mine").__name__, data_path(DataConfig(path="own.csv"), "a file"))')
    own_module(root/'here')
    done = subprocess.run([sys.executable, '-c', code], env=environment(Path(public_corpora.__file__).parent.parent, SELF_DISTILL_FROM=str(root/'here')), capture_output=True, text=True)
    assert done.stdout.split() == ['mine', str(root/'here/own.csv')], done.stderr

def kaldi_command(folder): kaldi(folder); write(folder/'data/dev/wav.scp', ['tape-dev sph2pipe -f wav x.sph |']); return folder/'data'
def kaldi_twice(folder): kaldi(folder); write(folder/'data/dev/text', [f'{u} {t}' for u in ids('dev') for t in ('go', 'no')]); return folder/'data'
def kaldi_without_audio(folder): kaldi(folder); write(folder/'data/dev/text', [*(f'{u} go' for u in ids('dev')), 'lost go']); return folder/'data'
def glosses_twice(folder): glosses(folder); shutil.copytree(folder/'features', folder/'hands'); return folder
def glosses_unnamed(folder): glosses(folder); write(folder/'annotations/manual/dev.corpus.csv', ['signer|orth', 'Signer01|A']); return folder
def glosses_cut(folder): glosses(folder); write(folder/'annotations/manual/train.corpus.csv', ['id|folder|signer|annotation', 'train-0|x']); return folder
def lhotse_damaged(folder): (folder/'cuts_train.jsonl.gz').write_bytes(gzip.compress(b'{}\n' * 999)[:-12]); return folder
def two_tables(folder): own_csv(folder, name='a.csv'); own_csv(folder, name='b.csv'); return folder
def lhotse_padded(folder): write(folder/'cuts.jsonl', [json.dumps(dict(id='p', type='MixedCut', tracks=[]))]); return folder
def part_outside(folder):
    audio(folder, 'train-0')
    write(folder/'m.csv', ['path,text,split,start,duration', 'train-0.wav,go,train,0.5,0.5'])
    return folder
def nothing(folder): (folder/'empty').mkdir(); return folder/'empty'

def test_kaldi_without_a_line_in_text_is_untranscribed(root):
    kaldi(root)
    write(root/'data/train/text', ['train-0 go'])
    train = load_corpus(DataConfig(corpus='manifest', path='data'), TextConfig(), FeatureConfig()).rows('train')
    assert len(train) > 1 and dict(zip(train.id, train.text)) == dict.fromkeys(train.id, '') | {'train-0': 'go'}

@pytest.mark.parametrize('make, words', [
    (kaldi_command, "wav.scp: 'sph2pipe .*is a command; write its audio"),
    (kaldi_twice, "text, line 2: 'dev-0' is given twice"), (kaldi_without_audio, 'no recording of 1 ids of text .lost.*fix_data_dir'), (glosses_twice, 'the same features twice, .*features.*hands'), (glosses_unnamed, 'dev.corpus.csv: needs the columns id and annotation'), (glosses_cut, 'train.corpus.csv, row 2: 2 values for 4 columns'),
    (lhotse_damaged, 'cuts_train.jsonl.gz: not readable as text'), (two_tables, 'holds the tables a.csv, b.csv; name one'),
    (lhotse_padded, "cut 'p' is not a part of one file.*save_audios"), (part_outside, 'lasts 0.75 s, and 0.50 to 1.00 s are asked for'),
    (nothing, 'no corpus of a known form. Known are table: .*Kaldi: .*LibriSpeech: '), (lambda f: f/'nowhere', 'nowhere.*nowhere: no such folder or file; data.path must be')])
def test_what_is_no_corpus_is_told_so(make, words, root):
    with pytest.raises(ValueError, match=words):
        load_corpus(DataConfig(corpus='manifest', path=str(make(root).relative_to(root))), TextConfig(), FeatureConfig())

def test_only_a_part_that_cannot_be_had_is_left_out(root):
    write(kaldi(root)/'train/segments', [f'{u} tape-train {0.75*k} {0.75*(k + 1) + (u == "train-3")}' for k, u in enumerate(ids('train'))])
    corpus = load_corpus(DataConfig(corpus='manifest', path=str(root/'data'), on_error='skip'), TextConfig(), FeatureConfig())
    [(name, why)] = corpus.skipped
    assert name == 'train-3' and why.endswith('train.flac: lasts 3.00 s, and 2.25 to 4.00 s are asked for')
    assert sorted(corpus.manifest.id) == sorted(set(SAID) - {name})

def test_a_line_ends_at_its_end_alone(root):
    write(kaldi(root)/'dev/text', ['dev-0 go\u2028no\x0bgo'])
    table = load_corpus(DataConfig(corpus='manifest', path=str(root/'data')), TextConfig(), FeatureConfig()).manifest
    assert list(table.text[table.split == 'dev']) == ['go no go'] and len(table) == len(SAID)
