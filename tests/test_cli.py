"The command line as a person meets it: what is printed, what is written, exit codes, and one clear line for each mistake."
import io, json, os, re, shutil, subprocess, sys

import numpy as np, pandas as pd, pytest, torch
from conftest import ROOT, environment
from self_distill.data.demo import picture_config, picture_values, write_pictures
from ruamel.yaml import YAML

from self_distill.train.checkpoint import load_checkpoint, load_model
from self_distill.use.cli import _plan_with, main, named_systems
from self_distill.core.config import config_hash
from self_distill.core.records import read_ledger, find_decode, read_record
from self_distill.decode.language_model import estimate_arpa
from self_distill.evaluate.session import log_probs_of
from self_distill.study.plan import load_plan
from self_distill.train.pseudo_labels import labels_path
from self_distill.train.training import train

BEST, OTHER = 'models/pictures/checkpoint_best.pt', 'models/other/checkpoint_best.pt'

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A root with two trained seeds of a tiny run, and one trained on capital letters."
    folder, before = tmp_path_factory.mktemp('cli'), os.environ.get('SELF_DISTILL_ROOT')
    os.environ['SELF_DISTILL_ROOT'] = str(folder)
    (folder/'capitals').mkdir()
    write_pictures(folder)
    write_pictures(folder/'capitals', upper=True)
    for config in (picture_config(), picture_config('other', seed=1),
                   picture_config('capitals', data=dict(path='capitals/pictures.csv'), text=dict(case='upper'), training=dict(epochs=1))): train(config)
    YAML().dump(picture_values(), folder/'pictures.yaml')
    yield folder
    os.environ.pop('SELF_DISTILL_ROOT') if before is None else os.environ.__setitem__('SELF_DISTILL_ROOT', before)

@pytest.fixture
def say(root, capsys):
    "Run a command in this process: exit code, what it printed, what it complained of."
    def run(*words):
        code = 0
        try: main([str(w) for w in words])
        except SystemExit as e: code = e.code or 0
        return code, *capsys.readouterr()
    return run

@pytest.fixture
def refuses(say):
    "A command that must fail with one line."
    def run(*words):
        code, out, err = say(*words)
        lines = err.strip().splitlines()
        assert code == 1 and len(lines) == 1 and lines[0].startswith('self-distill: '), (code, out, err)
        return lines[0]
    return run

def number(name, text): return float(re.search(rf'^{re.escape(name)}: ([-\d.]+)%$', text, re.M)[1])

# what commands do

def test_evaluate(say, root):
    code, out, err = say('evaluate', '--checkpoint', BEST)
    assert code == 0 and number('Dev WER (greedy)', out) == pytest.approx(load_checkpoint(BEST)['best_val_wer'], abs=0.01)

def test_the_guides_beam_command(say, root):
    before = len(read_ledger())
    code, out, err = say('evaluate-beam', '--checkpoint', BEST, '--split', 'test', '--lm_weight', '0.9', '--beam_width', '10', '--why', 'the test of tests')
    assert code == 0, err
    greedy, beam, gain = (number(n, out) for n in ('Test WER (greedy)', 'Test WER (beam)', 'Improvement'))
    assert gain == pytest.approx(greedy - beam, abs=0.011) and beam < greedy
    assert list(read_ledger().why[before:]) == ['the test of tests'] * 2
    assert {(d.split, d.decoder) for d in read_record('results/pictures.json').decodes} >= {('test', 'greedy'), ('test', 'beam')}

def test_search_and_then_its_settings(say, root):
    code, out, err = say('search', '--checkpoint', OTHER, '--lm_weights', '0.2,0.6', '--word_bonuses', '0.5', '--beam_widths', '4,8')
    assert code == 0 and 'Chosen on dev of 4 points' in out and len(read_record('results/other.json').searches) == 1
    assert 'word_bonus 0.5' in say('evaluate-beam', '--checkpoint', OTHER)[1]
    assert 'word_bonus 1,' in say('evaluate-beam', '--checkpoint', OTHER, '--word_bonus', 1)[1]

def test_several_checkpoints_are_an_ensemble(say, root):
    members = [w for e in (4, 5, 6) for w in ('--checkpoint', f'models/pictures/checkpoint_epoch_{e:03d}.pt')]
    assert say('evaluate', *members)[0] == 0
    assert say('evaluate-beam', *members)[0] == 0
    assert say('search', *members, '--lm_weights', '0.5', '--word_bonuses', '1', '--beam_widths', '5')[0] == 0
    record = read_record('results/pictures.json')
    assert {d.decoder for d in record.decodes if d.checkpoint == 'ensemble_004_005_006'} == {'greedy', 'beam'}
    assert record.searches[-1].checkpoint == 'ensemble_004_005_006'

def test_ensemble_by_epochs_and_by_dev_wer(say, root):
    code, out, err = say('ensemble', '--run', 'pictures', '--epochs', '4,5,6')
    assert code == 0 and 'mean of probabilities' in out and 'mean of weights' in out and (root/'models/pictures/checkpoint_average.pt').exists()
    code, out, err = say('ensemble', '--run', 'pictures', '--best', 2)
    assert code == 0 and out.count('member') == 2
    code, out, err = say('ensemble', '--checkpoint', BEST, '--checkpoint', OTHER)
    assert code == 0 and 'ensemble_of_other_pictures/ensemble_other_best_pictures_best' in out and 'mean of weights' not in out

def test_figures_of_runs_with_other_settings(root):
    plan, settings = 'configs/experiments/an4_few.yaml', ['training.precision=float32', 'training.epochs=7']
    drawn, trained = load_plan(_plan_with(settings, plan, 'runs/figures/plan.yaml')), load_plan(plan, settings)
    assert {n: config_hash(run.config) for n, run in drawn.items()} == {n: config_hash(run.config) for n, run in trained.items()}
    assert {run.config.training.epochs for run in drawn.values()} == {7}

def test_lm(say, root):
    (root/'more.txt').write_text('The Sea is late!\n')
    code, out, err = say('lm', '--config', 'pictures.yaml', '--order', 2, '--text', 'more.txt')
    assert code == 0, err
    assert all(words in out for words in ('dev perplexity', 'unknown dev words', 'dev sentences in the text', 'test sentences in the text', '.arpa are written'))
    assert re.search(r'^sentences +81 +81$', out, re.M)                               # 80 of the training split, one of the file
    arpa = out.partition('Next: self-distill search --checkpoint … --language_model ')[2].strip()
    assert arpa.endswith('.arpa') and (root/arpa).is_file()

def test_compare(say, root):
    for run in ('pictures', 'other'):
        say('evaluate', '--checkpoint', f'models/{run}/checkpoint_best.pt', '--split', 'test')
    code, out, err = say('compare', 'pictures', 'other', '--decoder', 'greedy')
    assert code == 0 and 'against pictures' in out and 'other' in out      # one recipe, but named apart: two rows
    say('evaluate', '--checkpoint', 'models/pictures/checkpoint_epoch_001.pt', '--split', 'test')
    code, out, err = say('compare', 'pictures@epoch_001', 'pictures', '--decoder', 'greedy')
    assert code == 0 and 'against pictures epoch_001' in out and re.search(r'p [=<] [\d.]+', out)
    assert [s.checkpoint for s in named_systems(['pictures@epoch_001', 'results/pictures.json'])] == ['epoch_001', 'best']
    code, out, err = say('compare')
    assert code == 0 and 'Test set' in out

def test_report(say, root):
    code, out, err = say('report', 'pictures', 'other', '--utterances', 5)
    assert code == 0 and '20 utterances, 0 with sound, 5 with a spectrogram, 5 with posteriors' in out, err
    assert (root/'runs/report/pictures_other_dev.html').read_text().startswith('<!doctype html>')
    code, out, err = say('report', 'pictures', 'data.path=pictures.csv', '--output', 'mine.html', '--utterances', 0)
    assert code == 0 and 'with sound, 0 with a spectrogram' in out and (root/'mine.html').exists()

def test_a_copy_of_the_corpus_elsewhere(say, root, tmp_path):
    for path in root.glob('*.npy'): shutil.copy(path, tmp_path)
    shutil.copy(root/'pictures.csv', tmp_path)
    here, there = (say('evaluate', '--checkpoint', BEST, *more) for more in ((), (f'data.path={tmp_path/"pictures.csv"}',)))
    assert here == there

def test_train_in_this_process(say, root):
    code, out, err = say('train', '--no-notebook', '--config', 'pictures.yaml', 'run=third', 'training.epochs=1')
    assert code == 0 and (root/'results/third.json').exists()
    assert re.search(r'^third: best dev WER [\d.]+ % at epoch 1 of 1', out, re.M)
    assert 'Next: self-distill evaluate-beam --checkpoint models/third/checkpoint_best.pt' in out

def test_transcribe_stored_features(say, root):
    "A model of precomputed features reads files of them, whole, and hears what evaluation hears."
    dev = pd.read_csv(root/'pictures.csv').query("split == 'dev'")
    heard = find_decode(read_record('results/pictures.json'), 'dev', 'greedy').hypotheses
    code, out, err = say('transcribe', *dev.path, '--checkpoint', BEST, '--format', 'json')
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [t['text'] for t in told] == heard
    assert all(w['start'] < w['end'] <= t['seconds'] + 0.04 and 0 <= w['confidence'] <= 1 for t in told for w in t['words'])
    beam = say('transcribe', *dev.path, '--checkpoint', BEST, '--beam', '--format', 'ctm')[1]
    assert {len(line.split()) for line in beam.splitlines()} == {6} and len(beam.splitlines()) >= 90
    out = say('transcribe', *dev.path, '--checkpoint', BEST, '--format', 'tsv')[1]
    table = pd.read_csv(io.StringIO(out), sep='\t')
    assert all(out.splitlines())
    assert list(table) == ['path', 'start', 'end', 'text'] and list(table.groupby('path', sort=False).text.agg(' '.join)) == [*filter(None, heard)]
    assert (0 <= table.start).all() and (table.start < table.end).all() and table.path.map(os.path.isabs).all()

def test_transcribe_a_folder_into_files(say, root):
    (root/'some/deep').mkdir(parents=True)
    for k in (4, 10): shutil.copy(root/f'{k}.npy', root/'some/deep')
    code, out, err = say('transcribe', root/'some', '--checkpoint', BEST, '--format', 'srt', '--folder', root/'subtitles')
    assert code == 0 and sorted(p.name for p in (root/'subtitles/deep').iterdir()) == ['10.srt', '4.srt']
    (root/'some/deep/4.txt').write_text('by hand')
    code, out, err = say('transcribe', root/'some', '--checkpoint', BEST, '--folder', root/'some')
    assert code == 0 and f"1 of 2 transcripts are in {root/'some'} already and stay as they are" in err
    assert (root/'some/deep/4.txt').read_text() == 'by hand' and out.split() == [str(root/'some/deep/10.txt')]
    assert re.match(r'1\n00:00:0\d,\d{3} --> 00:00:0\d,\d{3}\n\w', (root/'subtitles/deep/4.srt').read_text())

def test_export(say, root, refuses, monkeypatch):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed (pip install -e .[export])')
    assert say('export', BEST, root/'pictures.onnx')[0] == 0
    loaded, x = load_model(BEST), np.load(root/'4.npy')[None]
    session = onnxruntime.InferenceSession(root/'pictures.onnx')
    log_probs, _ = session.run(None, dict(features=x, lengths=np.array([x.shape[1]])))
    assert np.abs(log_probs[0] - log_probs_of(loaded, [torch.from_numpy(x[0])], 1)[0]).max() < 1e-4
    assert session.get_modelmeta().custom_metadata_map['run'] == 'pictures'
    monkeypatch.setitem(sys.modules, 'onnx', None)
    assert 'pip install onnx' in refuses('export', BEST, root/'again.onnx')

# mistakes

@pytest.mark.parametrize('words, told', [
    (('evaluate', '--checkpoint', 'models/nobody/checkpoint_best.pt'), 'no such checkpoint'),
    (('evaluate', '--checkpoint', 'models/pictures/checkpoint_epoch_070.pt'), 'its folder holds'),
    (('evaluate', '--checkpoint', 'models/pictures'), 'is a folder'),
    (('evaluate', '--checkpoint', 'pictures.csv'), 'not a checkpoint'),
    (('evaluate', '--checkpoint', BEST, '--split', 'tset'), 'choose train, dev, test'),
    (('evaluate', '--checkpoint', BEST, '--device', 'gpu'), 'choose auto'),
    (('evaluate', '--checkpoint', BEST, 'model.num_layers=2'), 'only data.… and run=… can be set'),
    (('evaluate', '--checkpoint', BEST, 'data.pth=x'), 'nearest valid key is `data.path`'),
    (('evaluate', '--checkpoint', BEST, 'data.path=nowhere.csv'), 'no such folder or file'),
    (('evaluate', '--checkpoint', BEST, '--checkpoint', BEST), 'given twice'),
    (('evaluate', '--checkpoint', BEST, '--checkpoint', 'models/capitals/checkpoint_best.pt'), 'write other tokens'),
    (('evaluate', '--checkpoint', BEST, 'data.path=letters.csv'), "'z'"),
    (('evaluate-beam', '--checkpoint', BEST, '--language_model', 'missing.arpa'), 'no such language model'),
    (('evaluate-beam', '--checkpoint', BEST, '--language_model', 'pictures.csv'), 'no language model'),
    (('evaluate-beam', '--checkpoint', BEST, '--language_model', 'capitals.arpa'), 'are of another case'),
    (('evaluate-beam', '--checkpoint', BEST, '--language_model', 'greek.arpa'), 'does not fit the tokenizer'),
    (('evaluate-beam', '--checkpoint', BEST, '--lm_weight', '-1'), 'lm_weight -1'),
    (('evaluate-beam', '--checkpoint', BEST, '--engine', 'magic'), 'choose one of'),
    (('search', '--checkpoint', BEST, '--lm_weights', '0.5;1'), 'commas between'),
    (('search', '--checkpoint', BEST, '--language_model', 'capitals.arpa'), 'are of another case'),
    (('transcribe', 'letters.csv', '--checkpoint', BEST), "features of kind 'precomputed'"),
    (('transcribe', '4.npy', '--checkpoint', BEST, '--format', 'doc'), 'choose text'),
    (('transcribe', '4.npy', '--checkpoint', BEST, '--beam_width', '50'), 'add --beam'),
    (('transcribe', '4.npy', '5.npy', '--checkpoint', BEST, '--format', 'srt'), 'name a --folder'),
    (('transcribe', '4.npy', 'models/../4.npy', '--checkpoint', BEST, '--folder', 'out'), 'two recordings'),
    (('transcribe', '4.npy', '--checkpoint', BEST, '--language_model', 'missing.arpa'), 'no such language model'),
    (('export', BEST, 'a.tflite'), 'ends in .onnx'),
    (('lm', '--config', 'pictures.yml'), 'no such config file'),
    (('lm', '--config', 'pictures.yaml', '--text', 'missing.txt'), 'missing.txt'),
    (('ensemble', '--run', 'pictures'), 'no such checkpoint'),
    (('ensemble', '--run', 'pictures', '--best', '90'), '6 numbered checkpoints, 90 asked for'),
    (('ensemble', '--run', 'pictures', '--checkpoint', BEST), 'name the members'),
    (('ensemble', '--checkpoint', BEST, '--checkpoint', BEST, '--best', '2'), 'name the members'),
    (('ensemble', '--checkpoint', BEST, '--checkpoint', BEST, '--epochs', '4,5'), 'name the members'),
    (('ensemble', '--run', 'pictures', '--epochs', '4,5', '--best', '3'), '2 numbered checkpoints, 3 asked for'),
    (('ensemble', '--checkpoint', BEST), 'at least two'),
    (('compare', 'nobody'), 'no such record'),
    (('compare', 'pictures@epoch_099'), 'epoch_099'),
    (('compare', 'pictures', '--split', 'train'), 'no decoder has read train'),
    (('report', 'nobody'), 'no such record'),
    (('figures', 'losses'), 'no artifact is called losses'),
    (('experiments', 'configs/experiments/demo.yaml', '--group', 'mian'), "no group 'mian'"),
    (('report', 'pictures', '--split', 'train'), 'no decoder has read train'),
    (('report', 'pictures', 'data.path=nowhere.csv'), 'nowhere.csv'),
    (('report', 'data.path=pictures.csv'), 'name a run'),
    (('train', '--config', 'pictures.yaml', '--no-notebook', 'training.epoch=1'), 'nearest valid key is `training.epochs`'),
], ids=lambda o: ' '.join(o[:1] + o[-2:]) if isinstance(o, tuple) else '')
def test_mistakes(words, told, refuses, root):
    table = pd.read_csv(root/'pictures.csv')
    table.assign(text=['zoo' if s == 'dev' else t for s, t in zip(table.split, table.text)]).to_csv(root/'letters.csv', index=False)
    if not (root/'greek.arpa').exists():
        estimate_arpa(['THE SEA IS SAD'], 2, root/'capitals.arpa')
        estimate_arpa(['η θάλασσα', 'το άστρο'], 2, root/'greek.arpa')
    ledger = len(read_ledger())
    assert told in refuses(*words)
    assert len(read_ledger()) == ledger

def test_other_weights_are_not_decoded_into_the_record_of_a_training(refuses, root):
    shutil.copytree(root/'models/pictures', root/'models/again')
    shutil.copy(root/'models/pictures/checkpoint_epoch_001.pt', root/'models/again/checkpoint_best.pt')
    before = (root/'results/pictures.json').read_bytes()
    said = refuses('evaluate-beam', '--checkpoint', 'models/again/checkpoint_best.pt')
    assert 'pictures.json: is of another run than' in said and 'its weights are others' in said and 'move the record away' in said
    assert (root/'results/pictures.json').read_bytes() == before

# as a process, from another folder

SMALL_GRID = 'import self_distill.evaluate.evaluate as e; e.GRID = dict(lm_weights=(0.5,), word_bonuses=(1.5,), beam_widths=(5,))'

def process(root, *words, first=''): # `first`: Python to run before
    command = [sys.executable, '-c', f'{first}\nfrom self_distill.use.cli import main; main()', *words]
    return subprocess.run(command, cwd=root/'models', env=environment(ROOT, SELF_DISTILL_ROOT=str(root)), capture_output=True, text=True, timeout=500)

def test_a_process_from_another_folder(root):
    for best in (BEST, BEST.removeprefix('models/')): # at the root, and in models/, where the user stands
        done = process(root, 'evaluate', '--checkpoint', best)
        assert done.returncode == 0 and 'Dev WER (greedy)' in done.stdout and not done.stderr, done.stderr
    done = process(root, 'evaluate-beam', '--checkpoint', BEST, '--language_model', 'missing.arpa')
    assert done.returncode == 1 and done.stderr.startswith('self-distill: ') and len(done.stderr.splitlines()) == 1

def test_a_teacher_writes_and_its_student_reads(say, root, refuses):
    assert 'every training utterance has a transcript' in refuses('pseudo-label', '--checkpoint', OTHER)
    few = 'data.transcribed=0.5'
    code, out, err = say('pseudo-label', '--checkpoint', OTHER, few)
    assert code == 0 and '40 transcripts are written (lm_weight' in out, err
    taught = 'run=labelled', few, f'teacher.checkpoint={OTHER}', 'teacher.pseudo_labels=true', 'training.epochs=1'
    code, out, err = say('train', '--no-notebook', '--config', 'pictures.yaml', *taught)
    assert code == 0 and '40 of 80 training transcripts are written by the teacher' in out, err
    assert 'self-distill pseudo-label --checkpoint models/pictures' in refuses('train', '--no-notebook', '--config', 'pictures.yaml', *taught, 'run=none', f'teacher.checkpoint={BEST}')
    code, out, err = say('evaluate', '--checkpoint', 'models/labelled/checkpoint_best.pt', 'data.corpus=manifest', 'data.path=pictures.csv')
    assert code == 0 and not list((root/'results').glob('labelled_on_*')), err       # the corpus it was trained on, not another
    labels = labels_path(OTHER)
    known = json.loads(labels.read_text())
    labels.write_text(json.dumps(known | dict(texts=dict.fromkeys(known['texts'], 'the sea'))))
    assert 'manifest has changed since this run began' in refuses('train', '--no-notebook', '--config', 'pictures.yaml', *taught)

def test_demo_in_small_twice(tmp_path, shared_cache):
    shutil.copytree(ROOT/'configs', tmp_path/'configs')
    (tmp_path/'models').mkdir()
    small = ['data.utterances=48', f'data.cache={shared_cache}', 'model.num_layers=2', 'model.hidden_size=16', 'model.conv_channels=16', 'threads=1',
             'training.epochs=1', 'feature_matching.teacher_layers=[0, 1]', 'feature_matching.student_layers=[0, 1]']
    first = process(tmp_path, 'demo', *small, first=SMALL_GRID)
    assert first.returncode == 0, first.stderr
    for words in ('Teacher loaded', 'Test WER (beam)', 'Improvement', 'Model', 'demo_student', 'runs/demo/results', 'synthetic speech'): assert words in first.stdout, words
    assert re.search(r'p [=<] [\d.]+', first.stdout)
    assert not (tmp_path/'results').exists()                                          # git stays clean
    ledger = (tmp_path/'runs/demo/results/test_ledger.jsonl').read_text()
    assert len(ledger.splitlines()) == 4                                              # two models, greedy and beam
    no_figures = 'import self_distill.study.figures as f; f.make_figures = lambda **_: None'
    second = process(tmp_path, 'demo', *small, first=f'{SMALL_GRID}; {no_figures}')
    assert second.returncode == 0 and (tmp_path/'runs/demo/results/test_ledger.jsonl').read_text() == ledger
    compared = [done.stdout.partition('5 of 6')[2].partition('6 of 6')[0] for done in (first, second)]
    assert 'demo_student' in compared[0] and compared[0] == compared[1]
