"Mistakes in each kind of input: what is wrong, a function of an empty folder that makes it, and words of the answer."
import io, json, os, re, signal, struct, tarfile, tempfile, warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np, soundfile, torch

from self_distill.core.config import Config, DataConfig, FeatureConfig, ModelConfig, TextConfig, build_config, config_dict, load_config
from self_distill.core.environment import pick_device
from self_distill.core.records import (Utterance, add_decode, append_ledger, make_decode, new_record, read_ledger,
                                  read_record, write_record)
from self_distill.data.public_corpora import download, unpack
from self_distill.data.batches import UtteranceDataset
from self_distill.data.corpora import load_corpus
from self_distill.data.features import read_mfc
from self_distill.data.text import Tokenizer
from self_distill.decode.beam_search import BeamDecoder
from self_distill.decode.language_model import estimate_arpa, read_sentences
from self_distill.evaluate.evaluate import Beam, evaluate, score
from self_distill.evaluate.session import compute_log_probs, open_session
from self_distill.study.plan import load_plan
from self_distill.train.checkpoint import content_hash, load_model, save_checkpoint
from self_distill.train.model import build_model
from self_distill.train.trainer import Trainer
from self_distill.train.training import train
from self_distill.train.training_log import TrainingLog

MISTAKES = {} # kind of input → list of (description, function of a folder, *words of the answer)

def answer(make):
    "The message that a mistake gets, and the error that was raised, if any"
    folder, error = Path(tempfile.mkdtemp()), None
    with mock.patch.dict(os.environ, SELF_DISTILL_ROOT=str(folder)), redirect_stdout(io.StringIO()):
        try: text = make(folder)
        except Exception as e: text, error = str(e), e
    text = re.sub(r'\s+', ' ', str(text).replace(str(folder), '…'))
    return re.sub(r'(.)\1{50,}', r'\1\1\1…', text), error

GOOD = 'path,text,split\na.flac,yes,train\nb.flac,no,dev\nc.flac,stop,test\n'

def write_noise(path, seed=0): soundfile.write(path, 0.1 * np.random.default_rng(seed).normal(size=12000), 16000)

def corpus(folder, table=GOOD, features=FeatureConfig(), text=TextConfig(), **data):
    "Load a corpus of three recordings whose manifest is `table`"
    for n, name in enumerate('abc'):
        if not (folder/f'{name}.flac').exists(): write_noise(folder/f'{name}.flac', n)
    if table is not None: (folder/'m.csv').write_bytes(table if isinstance(table, bytes) else table.encode())
    settings = dict(corpus='manifest', path=str(folder/'m.csv'), cache=str(folder/'cache')) | data
    return load_corpus(DataConfig(**settings), text, features)

def read(corpus):
    "What is printed where a mistake is tolerated"
    return f'read: {len(corpus.manifest)} utterances; skipped: {corpus.skipped or "none"}; {" ".join(corpus.notes)}'

def warned(make):
    "The warnings of a call"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        make()
    return 'a warning: ' + '; '.join(str(w.message) for w in caught)

twice = 'id,path,text,split\n1,a.flac,yes,train\n2,b.flac,no,dev\n3,a.flac,stop,test\n'
two_speakers = 'path,text,split,speaker\na.flac,yes,train,anna\nb.flac,no,dev,ben\nc.flac,no,test,anna\n'
nobody = 'path,text,split,speaker,lang\na.flac,yes,train,,en\nb.flac,no,dev,ben,en\nc.flac,no,test,,en\n'
MISTAKES['manifest'] = [
    ('no such file', lambda f: corpus(f, None), 'm.csv', 'no such folder or file'),
    ('a column is missing', lambda f: corpus(f, GOOD.replace('text', 'transcript')), 'm.csv', 'path and text'),
    ('Latin-1 in place of UTF-8', lambda f: corpus(f, GOOD.replace('yes', 'café').encode('latin-1')), 'm.csv', 'UTF-8'),
    ('a comma without quotes', lambda f: corpus(f, GOOD.replace('yes', 'yes, sir')), 'm.csv, row 2', 'double quotes'),
    ('a split by another name', lambda f: corpus(f, GOOD.replace('dev', 'eval')), 'splits eval', 'train, dev, test'),
    ('the column `spilt`', lambda f: corpus(f, GOOD.replace('split', 'spilt')), "'spilt' is unknown", "'split'"),
    ('empty speaker cells, a column `lang`', lambda f: read(corpus(f, nobody)), 'not used: lang', '2 utterances'),
    ('a recording in two splits', lambda f: corpus(f, twice), 'in more than one split', 'a.flac'),
    ('a copy in another split', lambda f: write_noise(f/'c.flac', 0) or corpus(f), 'same content', 'train a'),
    ('a speaker in two splits', lambda f: warned(lambda: corpus(f, two_speakers)), 'a warning', 'anna', 'more than'),
    ('a pipe in place of the table', lambda f: os.mkfifo(f/'m.csv') or corpus(f, None), 'm.csv', 'a pipe or a device')]

def saying(folder, text, settings=TextConfig(), **data):
    "The corpus with a transcript of its own for the first of two training recordings"
    write_noise(folder/'a2.flac', 9)
    quoted = '"' + text.replace('"', '""') + '"'
    return corpus(folder, GOOD.replace('yes', quoted) + 'a2.flac,no,train\n', text=settings, **data)

def too_long(folder):
    loaded = corpus(folder, GOOD.replace('yes', 'yes ' * 40))
    return UtteranceDataset(loaded, 'train', loaded.tokenizer, FeatureConfig())

MISTAKES['transcript'] = [
    ('a letter outside the vocabulary', lambda f: saying(f, 'café'), "'é'", 'LETTER E WITH ACUTE', 'text.alphabet'),
    ('the same, with on_error: skip', lambda f: read(saying(f, 'café', on_error='skip')), 'read: 3', "'é'"),
    ('Russian and a digit, language: en', lambda f: saying(f, 'нажмите 1', TextConfig(alphabet='train')), 'in English'),
    ('a text that the normalizer changes', lambda f: f'read: {saying(f, "Press 1!").text_report()}', "'press one'"),
    ('every transcript too long for its recording', too_long, 'long enough for its labels')]

def wav(samples=None, channels=1, rate=16000, bits=16, announced=None):
    "A WAV file made by hand, so that its header can be wrong"
    data = (3000 * np.random.default_rng(0).normal(size=16000)).astype('<i2').tobytes() if samples is None else samples
    align, announced = max(1, channels * bits // 8), len(data) if announced is None else announced
    form = struct.pack('<IHHIIHH', 16, 3 if bits == 32 else 1, channels, rate, rate * align % 2**32, align, bits)
    sizes = struct.pack('<I', (36 + announced) % 2**32), struct.pack('<I', announced)
    return b'RIFF' + sizes[0] + b'WAVEfmt ' + form + b'data' + sizes[1] + data

def stored(form, share, seed=0):
    "The first `share` of a file that soundfile wrote"
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.random.default_rng(seed).normal(size=16000), 16000, format=form, subtype='PCM_16')
    return file.getvalue()[:int(share * len(file.getvalue()))]

def recorded(folder, content, name='a.wav', **settings):
    (folder/name).write_bytes(content)
    return corpus(folder, GOOD.replace('a.flac', name), **settings)

nan, spike = (np.full(8000, x, '<f4').tobytes() for x in (np.nan, 1e30))
both = (3000 * np.random.default_rng(0).normal(size=(16000, 1)) * [1, -1]).astype('<i2').tobytes()
minute = 'path,text,split,duration\na.flac,yes,train,60\nb.flac,no,dev,.75\nc.flac,stop,test,.75\n'

MISTAKES['recording'] = [
    ('no such file', lambda f: corpus(f, GOOD.replace('a.flac', 'x.wav')), "utterance 'x'", 'no such file', 'on_error'),
    ('a text file in its place', lambda f: recorded(f, b'hello' * 1000), "utterance 'a'", 'not readable as audio'),
    ('a WAV file that ends early', lambda f: recorded(f, stored('WAV', 0.5)), "utterance 'a'", 'a.wav', 'again'),
    ('samples that are not finite', lambda f: recorded(f, wav(nan, bits=32)), "utterance 'a'", 'not finite'),
    ('samples of 1e30', lambda f: recorded(f, wav(spike, bits=32)), "utterance 'a'", 'features are not finite'),
    ('ten milliseconds of speech', lambda f: recorded(f, wav(bytes(320))), "utterance 'a'", 'shorter than one window'),
    ('61 seconds', lambda f: recorded(f, wav(bytes(61 * 32000))), "utterance 'a'", 'lasts 61 s', 'cut it'),
    ('another duration in the manifest', lambda f: corpus(f, minute), "utterance 'a'", 'lasts 0.8 s', 'says 60.0 s'),
    ('a sample rate of 44101 Hz', lambda f: recorded(f, wav(rate=44101)), "utterance 'a'", '44101 Hz', 'resample'),
    ('8000 Hz, read as 16000', lambda f: read(recorded(f, wav(rate=8000))), 'read: 3', 'features.sample_rate=8000'),
    ('two channels of opposite phase: one is taken', lambda f: read(recorded(f, wav(both, channels=2))), 'read: 3')]

def mfc(rows=50, count=None, order='>', values=None, seed=0):
    "A file of 13 cepstra a frame"
    values = np.random.default_rng(seed).normal(size=(rows, 13)) if values is None else np.asarray(values)
    return struct.pack(order + 'i', values.size if count is None else count) + values.astype(order + 'f4').tobytes()

def cepstra(folder, content):
    (folder/'a.mfc').write_bytes(content)
    return read_mfc(folder/'a.mfc')

def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()

def precomputed(folder, content):
    "A corpus of precomputed features, 20 wide, whose first file is `content`"
    for n, name in enumerate('bc'): (folder/f'{name}.npy').write_bytes(npy(np.full((50, 20), n, np.float32)))
    (folder/'a.npy').write_bytes(content)
    return corpus(folder, GOOD.replace('.flac', '.npy'), FeatureConfig(kind='precomputed'))

def damaged_cache(folder):
    corpus(folder)
    for path in (folder/'cache').rglob('*.npy'): path.write_bytes(npy(np.full((50, 80), np.nan, np.float32)))
    return read(corpus(folder))

pickled = npy(np.array([{}, []], object), allow_pickle=True)
MISTAKES['feature file'] = [
    ('.mfc: cut short', lambda f: cepstra(f, mfc()[:1000]), 'a.mfc', 'announces 650 values', 'copy it again'),
    ('.mfc: little-endian', lambda f: cepstra(f, mfc(order='<')), 'a.mfc', 'swap its bytes'),
    ('.npy: a pickle, which could run code', lambda f: precomputed(f, pickled), "utterance 'a'", 'a.npy'),
    ('.npy: NaN', lambda f: precomputed(f, npy(np.full((5, 20), np.nan))), "utterance 'a'", 'not finite'),
    ('.npy: frames of another width', lambda f: precomputed(f, npy(np.zeros((50, 19)))), 'm.csv', 'different widths'),
    ('recordings', lambda f: corpus(f, features=FeatureConfig(kind='precomputed')), "utterance 'a'", 'features.kind'),
    ('a damaged cache: computed again', damaged_cache, 'read: 3')]

TEXTS, LIST = 'etc/an4_train.transcription', 'etc/an4_train.fileids'
def sphinx(folder, change=lambda files: None, **data):
    "A corpus in SphinxTrain's layout with nine speakers; `change` makes the mistake"
    files, split = {}, dict(train=[f's{i}' for i in range(8)], test=['t0'])
    for part, speakers in split.items():
        files[f'etc/an4_{part}.fileids'] = ''.join(f'clstk/{s}/an-{s}\n' for s in speakers)
        files[f'etc/an4_{part}.transcription'] = ''.join(f'<s> GO ON </s> (an-{s})\n' for s in speakers)
        files |= {f'feat/clstk/{s}/an-{s}.mfc': mfc(seed=[len(part), n]) for n, s in enumerate(speakers)}
    change(files)
    for name, content in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    settings = dict(corpus='an4', path=str(folder), cache=str(folder/'cache')) | data
    return load_corpus(DataConfig(**settings), TextConfig(), FeatureConfig(kind='mfcc'))

def without(name): return lambda files: files.pop(name)
def replaced(name, old, new): return lambda files: files.update({name: files[name].replace(old, new)})
def heard_before(files):
    for name in files:
        if 'test.' in name: files[name] = files[name].replace('t0', 's0').replace('an-s0', 'bn-s0')

MISTAKES['AN4 folder'] = [
    ('no such folder', lambda f: sphinx(f, path=str(f/'nowhere')), 'nowhere', 'data.path'),
    ('a feature file is missing', lambda f: sphinx(f, without('feat/clstk/s3/an-s3.mfc')), "'an-s3'", 'no such file'),
    ('a transcript is missing', lambda f: sphinx(f, replaced(TEXTS, '<s> GO ON </s> (an-s3)\n', '')), 'line 4'),
    ('a speaker in both lists', lambda f: sphinx(f, heard_before), 's0', 'must be unheard')]

def config(folder, text, *overrides):
    (folder/'c.yaml').write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(folder/'c.yaml', overrides)

runs_code = 'run: !!python/object/apply:os.system ["echo"]'
MISTAKES['config'] = [
    ('no such file', lambda f: (f/'c.yaml').touch() or load_config(f/'d.yaml'), 'd.yaml', 'did you mean c.yaml'),
    ('not YAML', lambda f: config(f, 'training:\n\tepochs: 3\n'), 'c.yaml', 'not valid YAML'),
    ('a tag that would run code', lambda f: config(f, runs_code), 'c.yaml', 'could not determine a constructor'),
    ('an unknown key', lambda f: config(f, 'training: {epoch: 3}'), 'c.yaml', '`training.epoch`', '`training.epochs`'),
    ('a number out of range', lambda f: config(f, 'training: {epochs: 0}'), '`training.epochs` = 0', 'greater than'),
    ('a number that would stop the machine', lambda f: config(f, 'threads: 1000000'), '`threads`', 'equal to 1024'),
    ('loss weights of 0', lambda f: config(f, 'loss_weights: {alpha: 0, beta: 0, gamma: 0}'), 'nothing would be'),
    ('a file that extends itself', lambda f: config(f, 'extends: c.yaml'), 'c.yaml', 'extends itself'),
    ('an override without a value', lambda f: config(f, 'seed: 1', 'seed'), "override 'seed'", 'key=value'),
    ('a pipe', lambda f: os.mkfifo(f/'d.yaml') or load_config(f/'d.yaml'), 'd.yaml', 'a pipe or a device', 'YAML'),
    ('a device that computes nothing', lambda f: pick_device('meta'), "device 'meta'", 'choose auto, cpu'),
    ('a GPU that is not there', lambda f: pick_device('cuda:99'), "device 'cuda:99'", 'choose auto or cpu'),
    ('float16 on a CPU', lambda f: pick_device('cpu', 'float16'), 'training.precision', "choose 'float32'")]

def checkpoint(folder, change=lambda content: None):
    "A small checkpoint, saved and then changed"
    settings, tokenizer = Config(model=ModelConfig(num_layers=1, hidden_size=8, conv_channels=8)), Tokenizer.english()
    model, path = build_model(settings.model, 80, len(tokenizer)), folder/'checkpoint_best.pt'
    save_checkpoint(dict(model=model.state_dict(), model_settings=model.settings, tokenizer=tokenizer.to_dict(),
                         config=config_dict(settings), epoch=3, best_val_wer=48.87), path)
    content = torch.load(path)
    change(content)
    torch.save(content, path)
    return path

class RunsCode:
    def __reduce__(self): return os.system, ('echo code from a checkpoint was run',)

def nan_weights(content):
    content['model']['head.bias'][:] = np.nan
    content['sha256'] = content_hash(content)

def cut(path): path.write_bytes(path.read_bytes()[:9000]); return path
def only_weights(content):
    for key in set(content) - {'model'}: del content[key]

MISTAKES['checkpoint'] = [
    ('no such file', lambda f: load_model(checkpoint(f).with_name('best.pt')), 'its folder holds checkpoint_best.pt'),
    ('cut short', lambda f: load_model(cut(checkpoint(f))), 'checkpoint_best.pt', 'damaged'),
    ('code in the pickle', lambda f: load_model(checkpoint(f, lambda c: c.update(x=RunsCode()))), 'refused'),
    ('NaN weights under a right hash', lambda f: load_model(checkpoint(f, nan_weights)), 'hold NaN', 'head.bias'),
    ("another project's", lambda f: load_model(checkpoint(f, only_weights)), 'not a checkpoint of this project'),
    ('a pipe', lambda f: os.mkfifo(f/'x.pt') or load_model(f/'x.pt'), 'x.pt', 'a pipe or a device')]

HEARD = 'path,text,split\nc.flac,stop,train\nb.flac,no,dev\na.flac,yes,test\n' # the training utterance is tested

def tiny(folder, table=GOOD, run='first', training={}, **sections):
    "A run of one epoch on the three recordings, which another call may go on with"
    corpus(folder, table)
    small = dict(model=dict(num_layers=1, hidden_size=8, conv_channels=8), data=dict(corpus='manifest', path='m.csv'),
                 feature_matching=dict(teacher_layers=[0], student_layers=[0]), training=dict(epochs=1) | training)
    return Trainer(build_config(dict(run=run, device='cpu', threads=1) | small | sections))

def first(folder):
    tiny(folder).fit()
    return 'models/first/checkpoint_best.pt'

MISTAKES['leak'] = [
    ('a transcript changes between two sittings', lambda f: first(f) and tiny(f, GOOD.replace('yes', 'no')).fit(),
     'manifest has changed since this run began', 'train and dev utterances'),
    ('a teacher that was trained on a test utterance',
     lambda f: tiny(f, HEARD, 'student', teacher=dict(checkpoint=first(f))), 'has heard 1 test utterances'),
    ('a test set with a training utterance', lambda f: first(f) and corpus(f, HEARD) and evaluate(
        'models/first/checkpoint_best.pt', 'test', device='cpu'), 'first has heard 1 test', 'allow_leaks')]

def arpa(folder, change=lambda text: text):
    path = estimate_arpa(['go on', 'stop now', 'go now please'], 2, folder/'lm.arpa')
    text = change(path.read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

def decoder(path, **settings): return BeamDecoder(Tokenizer.english(), path, **settings)
def upper(text): return re.sub(r'\b(go|on|stop|now|please)\b', lambda m: m[1].upper(), text)

MISTAKES['language model'] = [
    ('no such file', lambda f: decoder(f/'nowhere.arpa'), 'nowhere.arpa', 'no such language model', 'self-distill'),
    ('cut short', lambda f: decoder(arpa(f, lambda t: t[:len(t) // 2])), 'lm.arpa', 'damaged'),
    ('in upper case', lambda f: decoder(arpa(f, upper)), 'lm.arpa', 'case'),
    ('logits in place of log-probabilities', lambda f: decoder(None).decode(np.ones((7, 29))), 'log_softmax'),
    ('a beam of a million', lambda f: decoder(None, beam_width=10**6), 'beam_width 1e+06', 'between 1 and 100,000'),
    ('a pipe as extra text', lambda f: os.mkfifo(f/'x.txt') or read_sentences(f/'x.txt'), 'x.txt', 'a pipe')]

SPOKEN = [Utterance(id=f'u{k}', speaker='s', duration=1.5, reference='go on') for k in range(3)]
def record(folder, change=lambda text: text):
    "A record whose file was changed by hand"
    decode = make_decode('dev', 'greedy', SPOKEN, ['go on', 'go', 'on'])
    path = write_record(add_decode(new_record('training', Config(run='example')), decode, SPOKEN), folder)
    path.write_text(change(path.read_text()))
    return read_record(path)

def damaged_ledger(folder):
    append_ledger('a', 'greedy', 'demo', 'x', 'a good reason', path=folder/'ledger.jsonl')
    with open(folder/'ledger.jsonl', 'a') as file: file.write('{"run"\n')
    return read_ledger(folder/'ledger.jsonl')

def torn_ledger(folder):
    for why in ('a line that a kill cuts', 'a reason with \u2028 in it'):
        append_ledger('a', 'greedy', 'demo', 'x', why, path=folder/'l.jsonl')
        if 'kill' in why: (folder/'l.jsonl').write_bytes((folder/'l.jsonl').read_bytes()[:-20])
    return f'read: {read_ledger(folder/"l.jsonl").why.tolist()}'

def at_once(folder):
    opened = [open_session(first(folder), device='cpu') for _ in range(2)] # both have read the record by now
    for k, one in enumerate(opened): score(one, compute_log_probs(one.loaded, one.corpus, 'dev'), f'beam{k}', ['no'], {})
    return f'read: {[d.decoder for d in read_record("results/first.json").decodes]}'

def named_greedy(folder):
    return evaluate(first(folder), decoders=[Beam(name='greedy')], device='cpu', show=False)

MISTAKES['record'] = [
    ('cut short', lambda f: record(f, lambda t: t[:len(t) // 2]), 'example.json', 'restore it with git'),
    ('an unknown key', lambda f: record(f, lambda t: t.replace('"seed"', '"wer_best": 1, "seed"')), 'wer_best'),
    ('a beam search that calls itself greedy', named_greedy, "decoder name 'greedy'", 'such as beam_wide'),
    ('a pipe', lambda f: os.mkfifo(f/'x.json') or read_record(f/'x.json'), 'x.json', 'a pipe or a device'),
    ('two decodings at once: both are kept', at_once, "read: ['beam0', 'beam1']"),
    ('a damaged line in the ledger', damaged_ledger, 'ledger.jsonl, line 2', 'restore the ledger with git'),
    ('a torn last line, then U+2028 in a reason: mended', torn_ledger, "read: ['a reason with")]

PLAN = """title: a plan
config: c.yaml
groups:
  main: {title: one, prefix: p, runs: 2, rows: {student: {seed: 100, teacher: baseline}, baseline: {}}}
"""
def plan(folder, old='', new='', *overrides):
    "A plan with some of its text replaced"
    (folder/'c.yaml').write_text('training: {epochs: 10}')
    (folder/'plan.yaml').write_text(PLAN.replace(old, new))
    return load_plan('plan.yaml', overrides)

MISTAKES['plan'] = [
    ('an override of the seed', lambda f: plan(f, '', '', 'seed=3'), '`seed` is set by the plan', 'use the keys'),
    ('an ensemble of epoch 999', lambda f: plan(f, 'runs: 2', 'runs: 2, ensemble: [5, 999]'), 'epoch 999'),
    ('a weight of NaN', lambda f: plan(f, 'runs: 2', 'decoders: {beam: {lm_weight: .nan}}'), 'lm_weight', 'finite'),
    ('no reason to read the test set', lambda f: plan(f, 'runs: 2', 'frozen: ""'), '`groups.main.frozen`'),
    ('no rows', lambda f: plan(f, 'rows: {student: {seed: 100, teacher: baseline}, baseline: {}}', 'rows: {}'), 'rows')]

def full_log(folder):
    (folder/'logs').mkdir()
    (folder/'logs/training.log').symlink_to('/dev/full') # Linux's disk that is always full
    TrainingLog('first').say('Started')

def no_results(folder):
    trainer = tiny(folder)
    (folder/'results').write_text('a file in the place of a folder')
    return train(trainer.config)

def damaged_numbers(folder):
    log = TrainingLog('first')
    log.lines.write_text('{"update": 1}\nrubbish\n{"update": 2}\n{"upd')
    log.rewind(2)
    log.close()
    return f'read: {len(log.lines.read_text().splitlines())} lines; {log.text.read_text()[20:]}'

def stopped(folder):
    trainer = tiny(folder, training=dict(epochs=50))
    count = trainer._count
    trainer._count = lambda *update: (count(*update), os.kill(os.getpid(), signal.SIGTERM))[0]
    trainer.fit()

MISTAKES['disk'] = [
    ('a full disk', full_log, 'training.log: cannot be written (No space left', 'make room'),
    ('a file where results/ should be, before training', no_results, 'results: cannot be written (File exists)'),
    ('damaged lines in metrics.jsonl', damaged_numbers, 'read: 2 lines', 'Left out: 2 damaged lines'),
    ('SIGTERM or Ctrl-C in training', stopped, 'Stopped by SIGTERM after update 1 of 50', 'the same command resumes')]

def command(folder, *words):
    "The exit code of `self-distill`, and what it prints to its error stream"
    from self_distill.use.cli import main
    stream, code = io.StringIO(), 0
    with redirect_stderr(stream), redirect_stdout(io.StringIO()):
        try: main([str(w) for w in words])
        except SystemExit as e: code = e.code
    text = re.sub(r'\x1b\[[\d;]*m|[│╭╮╰╯─]+', ' ', stream.getvalue())
    return f'exit code {code}: {text.strip()}'

MISTAKES['command line'] = [
    ('no such command', lambda f: command(f, 'trian'), 'exit code 2', 'No such command', 'trian'),
    ('an option is missing', lambda f: command(f, 'train'), 'exit code 2', '--config'),
    ('no such checkpoint', lambda f: command(f, 'evaluate', '--checkpoint', f/'x.pt'), 'exit code 1', 'no such')]

def archived(folder, *names):
    "An archive with empty members of these names, unpacked"
    with tarfile.open(folder/'a.tar', 'w') as tar:
        for name in names: tar.addfile(tarfile.TarInfo(name))
    return unpack(folder/'a.tar', folder/'an4')

def fetched(folder, content=None):
    "A download from a port where no server listens, or of a file that is there already"
    if content: (folder/'an4.tar.gz').write_text(content)
    return download('http://127.0.0.1:9/an4.tar.gz', folder/'an4.tar.gz', '0' * 64)

MISTAKES['download'] = [
    ('no network', fetched, 'http://127.0.0.1:9/an4.tar.gz', 'put it at', 'an4.tar.gz'),
    ('another file than AN4', lambda f: fetched(f, 'hello'), 'an4.tar.gz', 'not the file that is meant', 'unpacked'),
    ('an archive that writes outside its folder', lambda f: archived(f, 'an4/ok', '../escaped'), 'outside')]
