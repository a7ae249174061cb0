"Corpora of real recordings, and what a notebook cannot show: other processes, other workers, damaged recordings."
import multiprocessing, os, re, shutil
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest, soundfile, torch
from conftest import DATA

from self_distill.data import feature_cache
from self_distill.data.batches import UtteranceDataset, collate, frames_needed, output_frames, too_short
from self_distill.core.config import DataConfig, FeatureConfig, TextConfig
from self_distill.data.corpora import fingerprint, load_corpus, shared_recordings
from self_distill.data.demo import demo_corpus
from self_distill.data.features import read_audio
from self_distill.data.feature_cache import content_hash
from self_distill.data.manifest import SPLITS, check_manifest, default_split
from self_distill.data.text import Tokenizer, normalize_text

AN4, PROMPTS = DATA/'an4', DATA/'prompts/manifest.csv'
needs_an4 = pytest.mark.skipif(not AN4.is_dir(), reason='no an4/ in data/ or $SELF_DISTILL_DATA')
needs_prompts = pytest.mark.skipif(not PROMPTS.is_file(), reason='no prompts/ in data/ or $SELF_DISTILL_DATA')
MFCC = FeatureConfig(kind='mfcc')

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return str(tmp_path_factory.mktemp('cache'))

def load_an4(cache, **changes):
    return load_corpus(DataConfig(corpus='an4', path=str(AN4), cache=cache, **changes), TextConfig(), MFCC)

@pytest.fixture(scope='module')
def an4(cache): return load_an4(cache)

@pytest.fixture(scope='module')
def demo(cache): return load_corpus(DataConfig(utterances=32, cache=cache), TextConfig(), FeatureConfig())

def voices_are_apart(splits): return len(set.union(*splits)) == sum(map(len, splits))

@needs_an4
def test_an4_official(an4):
    summary = an4.summary()
    assert summary.utterances.to_dict() == dict(train=831, dev=117, test=130)
    assert summary.speakers.to_dict() == dict(train=65, dev=9, test=10)
    assert summary.words['test'] == 773 and an4.skipped == []
    assert (an4.input_size, an4.frequency_axis, len(an4.tokenizer)) == (39, False, 29)
    assert voices_are_apart([set(an4.rows(s).speaker) for s in SPLITS])

@needs_an4
def test_an4_folds_test_every_speaker_once(cache, an4):
    tested, words = [], 0
    for fold in range(5):
        corpus = load_an4(cache, protocol='folds', fold=fold)
        speakers = [set(corpus.rows(s).speaker) for s in SPLITS]
        assert voices_are_apart(speakers) and sum(map(len, speakers)) == 84
        tested += corpus.rows('test').speaker.unique().tolist()
        words += corpus.summary().words['test']
    assert sorted(tested) == sorted(set(an4.manifest.speaker)) and words == 6215

@needs_an4
def test_an4_has_room_for_its_labels(an4):
    labels = [an4.tokenizer.encode(t) for t in an4.manifest.text]
    assert too_short(an4.manifest.frames, labels) == []
    spare = [output_frames(T) - frames_needed(l) for T, l in zip(an4.manifest.frames, labels)]
    assert min(spare) == 10 # the tightest: 43 frames for 33

@needs_an4
def test_an4_round_trip(an4):
    for text in an4.manifest.text:
        assert normalize_text(text) == text and an4.tokenizer.decode(an4.tokenizer.encode(text)) == text

@needs_prompts
def test_prompts_load_as_a_plain_manifest(cache):
    with pytest.warns(UserWarning, match='fewer than eight speakers'):
        data = DataConfig(corpus='manifest', path=str(PROMPTS), cache=cache, on_error='skip')
        corpus = load_corpus(data, TextConfig(), FeatureConfig(sample_rate=8000))
    assert corpus.summary().utterances.to_dict() == dict(train=412, dev=69, test=68)
    unclear = {'audio/confbridge-binaural-off': '3D', 'audio/confbridge-binaural-on': '3D', 'audio/demo-instruct': '28.8', 'audio/spy-h323': 'H.323'}
    assert {i: why.split("'")[1] for i, why in corpus.skipped} == unclear
    assert 20 < corpus.manifest.duration.sum()/60 < 28
    assert set(''.join(corpus.manifest.text)) <= set(" 'abcdefghijklmnopqrstuvwxyz")
    train = UtteranceDataset(corpus, 'train', corpus.tokenizer, FeatureConfig(sample_rate=8000))
    beeps = ['audio/confbridge-join', 'audio/confbridge-leave', 'audio/spy-iax2'] # their text is not spoken
    assert [i for i, _ in train.skipped] == beeps

def test_demo_is_the_same_made_again(demo, tmp_path):
    again = demo_corpus(tmp_path, utterances=32)
    for column in ('text', 'duration'): assert list(again[column]) == list(demo.manifest[column])
    for a, b in zip(demo.manifest.path, again.path): assert Path(a).read_bytes() == Path(b).read_bytes()
    assert len(list(tmp_path.iterdir())) == 1 # nothing half-made stays behind

def _read_all(cache): return [c.numpy() for c in map(cache, pd.DataFrame(dict(path=cache_paths)).itertuples())]

def test_many_processes_fill_one_cache(demo, tmp_path):
    global cache_paths
    cache_paths = list(demo.manifest.path[:8])
    reader = type(demo.read)(tmp_path/'shared', demo.read.settings)
    with multiprocessing.get_context('fork').Pool(4) as pool: results = pool.map(_read_all, [reader]*4)
    expected = [demo.read(row).numpy() for row in demo.manifest[:8].itertuples()]
    for result in results: assert all(np.array_equal(a, b) for a, b in zip(result, expected))
    files = [p for p in (tmp_path/'shared').rglob('*') if p.is_file()]
    assert len(files) == 8 and {p.suffix for p in files} == {'.npy'}

def test_corpus_statistics_normalise_the_training_split(demo):
    statistics = demo.statistics()
    settings = FeatureConfig(normalization='corpus')
    train = UtteranceDataset(demo, 'train', demo.tokenizer, settings, statistics=statistics)
    frames = torch.cat([train[i].clean for i in range(len(train))])
    assert frames.mean(0).abs().max() < 1e-3 and (frames.std(0) - 1).abs().max() < 1e-2

@pytest.mark.parametrize('keep', [True, False])
def test_an_array_may_have_another_frame_rate_than_its_duration(tmp_path, keep): # HuBERT: 50 frames a second
    for i in range(16): np.save(tmp_path/f'{i}.npy', np.full((100, 6), i, np.float32))
    rows = [dict(path=f'{i}.npy', text='go', split=['train', 'dev'][i % 2], duration=2.0) for i in range(16)]
    pd.DataFrame(rows).to_csv(tmp_path/'calls.csv', index=False)
    data = DataConfig(corpus='manifest', path=str(tmp_path/'calls.csv'), cache=str(tmp_path/'cache'), keep_features=keep)
    corpus = load_corpus(data, TextConfig(), FeatureConfig(kind='precomputed'))
    assert set(corpus.manifest.duration) == {2.0} and set(corpus.manifest.frames) == {100}

def test_a_word_that_training_lacks_stays_in_dev_and_test(tmp_path):
    for n in range(4): np.save(tmp_path/f'u{n}.npy', np.full((40, 6), n, dtype=np.float32))
    rows = ['path,text,split', 'u0.npy,sun rain,train', 'u1.npy,sun,dev', 'u2.npy,rain snow,dev', 'u3.npy,fog,test']
    (tmp_path/'m.csv').write_text('\n'.join(rows))
    data = dict(corpus='manifest', path=str(tmp_path/'m.csv'), cache=str(tmp_path/'c'))
    features = FeatureConfig(kind='precomputed')
    for on_error in ('raise', 'skip'):
        corpus = load_corpus(DataConfig(**data, on_error=on_error), TextConfig(tokenizer='word'), features)
        assert list(corpus.manifest.text) == ['sun rain', 'sun', 'rain snow', 'fog'] and corpus.skipped == []
        assert corpus.tokenizer.tokens[1:] == ('rain', 'sun')
    dev, test = (UtteranceDataset(corpus, split, corpus.tokenizer, features) for split in ('dev', 'test'))
    assert (dev.unwritable, [*map(list, dev.labels)], test.unwritable) == ({'u2'}, [[2], []], {'u3'})
    batch = collate([dev[i] for i in range(2)])
    assert batch.labels.tolist() == [[2], [0]] and batch.label_lengths.tolist() == [1, 0]
    assert batch.texts == ['sun', 'rain snow']
    with pytest.raises(ValueError, match="utterance 'u2': 'o'.*, 'w'"): # characters must be known everywhere
        load_corpus(DataConfig(**data), TextConfig(alphabet='sunrai'), features)

# what a hostile hand gives: nothing is used in silence

class Own:
    "A corpus in a folder, for one test to damage: `load` reads it with the settings that are given."
    def __init__(self, folder):
        self.folder, self.rows, self.columns = folder, [], ['path', 'text', 'split', 'speaker']
        for n, split in enumerate(['train', 'train', 'dev', 'test']):
            self.record(f'u{n}.wav', 0.1*np.random.default_rng(n).normal(size=8000))
            self.rows.append([f'u{n}.wav', 'yes', split, f's{n}'])
    def record(self, name, samples, rate=16000, subtype='FLOAT'):
        soundfile.write(self.folder/name, samples, rate, subtype=subtype)
    def load(self, text={}, features={}, **data):
        pd.DataFrame(self.rows, columns=self.columns).to_csv(self.folder/'m.csv', index=False)
        data = dict(corpus='manifest', path=str(self.folder/'m.csv'), cache=str(self.folder/'cache')) | data
        return load_corpus(DataConfig(**data), TextConfig(**text), FeatureConfig(**features))
    def column(self, name, values):
        self.columns.append(name)
        for row, value in zip(self.rows, values): row.append(value)

@pytest.fixture
def own(tmp_path): return Own(tmp_path)

def spike(own):
    wave = np.zeros(8000); wave[4000] = 1e30
    own.record('u1.wav', wave)
def hours(own): # ten hours in the header and, as a sparse file, on the disk
    own.record('u1.wav', np.zeros(10), subtype='PCM_U8')
    header, size = bytearray((own.folder/'u1.wav').read_bytes()[:44]), 36000*16000
    header[4:8], header[40:44] = (36 + size).to_bytes(4, 'little'), size.to_bytes(4, 'little')
    (own.folder/'u1.wav').write_bytes(header)
    with open(own.folder/'u1.wav', 'r+b') as file: file.truncate(44 + size)
def pipe(own):
    (own.folder/'u1.wav').unlink()
    os.mkfifo(own.folder/'u1.wav')
def device(own): own.rows[1][0] = '/dev/zero'

@pytest.mark.timeout(60)
@pytest.mark.parametrize('damage, reason', [
    (spike, 'u1.wav: its features are not finite.*convert it again'), (hours, 'u1.wav: lasts 36000 s.*60 s: cut it'),
    (lambda own: own.record('u1.wav', np.zeros(61*16000)), 'u1.wav: lasts 61 s'),
    (lambda own: own.column('duration', [0.5, 1.2, 0.5, 0.9]), r'u1.wav: lasts 0.5 s, and the manifest says 1.2 s; correct'),
    (pipe, 'u1.wav: is a folder, a pipe or a device'), (device, '/dev/zero: is a folder, a pipe or a device')])
def test_an_utterance_that_would_spoil_training_stops_or_is_listed(own, damage, reason):
    damage(own)
    with pytest.raises(ValueError, match=f'(?s)utterance .*{reason}'): own.load()
    [(_, why)] = own.load(on_error='skip').skipped
    assert re.search(reason, why)

@pytest.mark.timeout(60)
def test_a_pipe_for_a_table_is_refused(tmp_path):
    (tmp_path/'etc').mkdir()
    for path in (tmp_path/'m.csv', tmp_path/'etc/an4_train.transcription'): os.mkfifo(path)
    for corpus, path in (('manifest', tmp_path/'m.csv'), ('an4', tmp_path)):
        with pytest.raises(ValueError, match='is a folder, a pipe or a device; give a (text )?file'):
            load_corpus(DataConfig(corpus=corpus, path=str(path), cache=str(tmp_path)), TextConfig(), FeatureConfig())

@pytest.mark.parametrize('damage', [
    lambda x: x.astype('f8'), lambda x: x.astype('>f4'), lambda x: x[:, 1:], lambda x: x[0], lambda x: x[:0], lambda x: x*np.nan,
    lambda x: np.full(x.shape, 'word')])
def test_a_wrong_cache_file_is_computed_again(own, damage):
    corpus = own.load()
    row = next(corpus.manifest.itertuples())
    good, file = corpus.read(row), corpus.read.file(row.path)
    np.save(file, damage(np.load(file)))
    assert own.load().manifest.equals(corpus.manifest) and torch.equal(corpus.read(row), good)
    assert np.array_equal(np.load(file), good.numpy())

@pytest.mark.parametrize('text, settings', [('нажмите 1', {}), ('drücke 1', {}), ('κουμπί ٣', dict(case='upper'))])
def test_digits_are_spelled_in_the_language_of_the_corpus_or_not_at_all(own, text, settings):
    for row in own.rows: row[1] = text
    settings = dict(alphabet='train') | settings
    with pytest.raises(ValueError, match=f'digits of {text!r} would be spelled in English.*text.language=ru.*text.digits=keep'):
        own.load(settings)
    assert own.load(settings | dict(digits='keep')).manifest.text[0].casefold() == text.casefold()
    assert own.load(settings | dict(language='de')).manifest.text[0] != text
    own.rows[0][1] = own.rows[3][1] = 'café 1'
    for row in own.rows[1:3]: row[1] = 'one'
    assert 'café one' in set(own.load(settings | dict(language='en_GB')).manifest.text.str.lower())

def test_what_the_normalizer_changed_is_shown(own):
    for row, text in zip(own.rows, ['yes', 'Yes', 'no', 'Press 1!']): row[1] = text
    corpus = own.load()
    assert corpus.changes == [('Yes', 'yes'), ('Press 1!', 'press one')]
    assert corpus.text_report() == ("29 tokens: ␣ ' a b c d e f g h i j k l m n o p q r s t u v w x y z\n"
                                    "2 transcripts changed by the normalizer; 'Press 1!' → 'press one'; 'Yes' → 'yes'")

def test_changes_are_those_of_the_rows_that_remain(own):
    for row, text in zip(own.rows, ['yes', 'Yes', 'No', 'Gö']): row[1] = text
    own.rows[1][0] = 'missing.wav'
    assert own.load(on_error='skip').changes == [('No', 'no')]

def test_dev_and_test_are_drawn_from_what_has_a_transcript(own):
    own.columns, own.rows = ['path', 'text', 'speaker'], []
    for n in range(20):
        own.record(f'u{n}.wav', 0.1*np.random.default_rng(n).normal(size=8000))
        own.rows.append([f'u{n}.wav', 'yes' if n < 9 else '', f's{n % 18:02d}']) # s00 and s01 have one of each
    assert own.load().summary().utterances.to_dict() == dict(train=18, dev=1, test=1)
    own.rows[18][2] = 's07'
    with pytest.warns(UserWarning, match='m.csv: 1 utterances without a transcript are left out: their speakers are in dev or test') as warned:
        corpus = own.load()
    assert len(warned) == 1 and len(corpus.manifest) == 19 and list(corpus.rows('dev').speaker) == ['s07']
    own.columns.append('split')
    for n, row in enumerate(own.rows): row.append('dev' if n > 16 else 'train')
    with pytest.raises(ValueError, match="utterance 'u17': its transcript '' holds no word, and it is in dev, where every utterance needs one"): own.load()

def test_what_is_used_and_may_not_be_meant_is_noted(own):
    assert own.load().notes == []
    own.record('u1.wav', np.random.default_rng(9).normal(size=4000), rate=8000)
    own.column('lang', ['en']*4)
    own.rows[0][3] = own.rows[3][3] = ' '
    own.rows[0][1] = 'Yes [noise].'
    corpus = own.load()
    assert corpus.notes == ['1 transcripts hold marks ([noise]), whose words count as spoken: take out what nobody says',
                            'columns that are not used: lang', '2 utterances without a speaker: each counts as a speaker of its own',
                            '1 of 4 recordings have fewer than 16000 samples a second, so their upper mel bins are empty; '
                            'features.sample_rate=8000 suits them']
    assert list(corpus.manifest.speaker) == ['unknown u0', 's1', 's2', 'unknown u3']
    assert default_split(pd.DataFrame(dict(id=range(10), speaker=[*'abcdefgh', '', ''])))[-2:] == ['train', 'train']

def test_one_speaker_in_dev_is_noted(own):
    dev = next(n for n, row in enumerate(own.rows) if 'dev' in row)
    own.record('u9.wav', np.random.default_rng(10).normal(size=16000))
    own.rows.append([*own.rows[dev]])
    own.rows[-1][0] = 'u9.wav'
    assert any(note.startswith('dev has one speaker') for note in own.load().notes)

def test_rows_of_one_recording_without_times_are_noted(own):
    own.rows.insert(1, [*own.rows[0]])
    own.column('id', list('abcde'))
    [note] = own.load().notes
    assert note.startswith('1 recordings stand in several rows, each of them all of it: give start and duration')

@pytest.mark.parametrize('name, meant', [('spilt', 'split'), ('Split', 'split'), (' text', 'text'), ('durations', 'duration')])
def test_a_column_with_nearly_the_right_name_is_refused(own, name, meant):
    if meant in own.columns: own.columns[own.columns.index(meant)] = name
    else: own.column(name, [0.5]*4)
    with pytest.raises(ValueError, match=f"m.csv: its column '{name}' is unknown; rename it to '{meant}'"): own.load()

def test_milliseconds_are_not_taken_for_seconds(own):
    own.column('duration_ms', [500]*4)
    assert own.load().notes == ['columns that are not used: duration_ms']

def test_channels_of_opposite_phase_do_not_cancel(own):
    wave = 0.1*np.random.default_rng(5).normal(size=8000)
    for right, expected in ((-wave, wave), (-0.9*wave, wave), (0.5*wave, 0.75*wave), (0*wave, 0.5*wave)):
        own.record('two.wav', np.stack([wave, right], 1))
        assert np.allclose(read_audio(own.folder/'two.wav'), expected, atol=1e-6)

@pytest.mark.parametrize('make', [shutil.copy, os.link, os.symlink, lambda a, b: os.symlink(a.parent, b.parent/'again')])
def test_a_recording_in_two_splits_is_refused_by_content(own, make):
    own.record('u0.wav', 0.1*np.random.default_rng(0).normal(size=40000)) # longer than what content_hash reads
    make(own.folder/'u0.wav', own.folder/'copy.wav')
    copy = 'copy.wav' if (own.folder/'copy.wav').exists() else 'again/u0.wav'
    own.rows.append([copy, 'no', 'train', 's4'])
    assert len(own.load().manifest) == 5     # in one split: two readings
    own.rows[-1][2] = 'test'
    with pytest.raises(ValueError, match=rf'same content in more than one split: test {copy[:-4]} = train u0; keep each in one'): own.load()
    shared = shared_recordings(check_manifest(pd.DataFrame(own.rows, columns=own.columns).assign(
        id=[r[0] for r in own.rows], path=[str(own.folder/r[0]) for r in own.rows], duration=1), 'm.csv'))
    assert shared == [dict(test=[copy], train=['u0.wav'])]
    if make is shutil.copy: # equal size and ends, another middle
        with open(own.folder/copy, 'r+b') as file: file.seek(80000); file.write(bytes(400))
        assert content_hash(own.folder/copy) == content_hash(own.folder/'u0.wav') and len(own.load().manifest) == 5

def test_a_fingerprint_is_of_the_data_and_not_of_their_place(own, demo):
    one = fingerprint(own.load())
    assert set(one) == set(SPLITS) and all(len(h) == 64 for h in one.values())
    other = Own(own.folder/'elsewhere') if not (own.folder/'elsewhere').mkdir() else None
    for recording in own.folder.glob('*.wav'): shutil.copy(recording, other.folder) # a WAV of floats holds its hour
    other.rows.reverse()
    assert fingerprint(other.load()) == one
    def changed(change):
        change()
        new = fingerprint(other.load())
        return [s for s in SPLITS if new[s] != one[s]]
    assert changed(lambda: other.rows[0].__setitem__(1, 'no')) == ['test']
    assert changed(lambda: other.rows[1].__setitem__(3, 's9')) == ['dev', 'test']
    assert changed(lambda: other.record('u0.wav', np.ones(8000))) == list(SPLITS)
    assert fingerprint(demo) == fingerprint(replace(demo, manifest=demo.manifest.assign(path='nowhere.flac')))

# a thousand hours

@pytest.fixture
def sealed(monkeypatch):
    "From when it is called, a file that is opened for what is in it fails the test"
    def refuse(path, *rest): raise AssertionError(f'{path} was opened')
    def seal():
        for name in ('read_audio', 'audio_header', 'Recording', 'read_array'): monkeypatch.setattr(feature_cache, name, refuse)
        monkeypatch.setattr(feature_cache, 'content_hash', refuse)
    return seal

def test_a_second_start_opens_no_file(own, sealed):
    first = own.load()
    before = fingerprint(first)
    sealed()
    assert own.load().manifest.equals(first.manifest) and fingerprint(own.load()) == before
    own.record('u1.wav', 0.1*np.random.default_rng(7).normal(size=8000)) # changed: it must be read again
    with pytest.raises(AssertionError, match='u1.wav was opened'): own.load()

def test_without_kept_features_headers_are_read_first_and_features_checked_as_they_are_needed(own):
    exact = own.load(cache=str(own.folder/'other')).manifest
    spike(own)
    corpus = own.load(keep_features=False)
    assert corpus.manifest.frames.equals(exact.frames)
    with pytest.raises(ValueError, match='u1.wav: its features are not finite'): corpus.read(corpus.manifest.iloc[1])
    assert [i for i, _ in own.load(keep_features=False, on_error='skip').skipped] == ['u1'] # only before training can it be left out
    own.column('duration', [0.5, 1.2, 0.5, 0.5])
    with pytest.raises(ValueError, match='u1.wav: lasts 0.5 s, and the manifest says 1.2 s'): own.load(keep_features=False)

def test_features_need_not_be_kept(own):
    kept, unkept = own.load(), own.load(keep_features=False, cache=str(own.folder/'other'))
    assert torch.equal(*(c.read(c.manifest.iloc[0]) for c in (kept, unkept)))
    assert (own.folder/'cache/features').exists() and not (own.folder/'other/features').exists()
