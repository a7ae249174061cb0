"""How fast: `python tools/bench.py decode models/<run>/checkpoint_best.pt`, `python tools/bench.py scale`, `… step`.

`decode` measures the real-time factors of the network, of greedy decoding and of the beam search with each engine.
`scale` makes manifests of many rows over a few recordings, loads each in a fresh process, and prints seconds and peak memory.
`step` measures a training step: CTC alone, a teacher that is asked at every step, and one that was asked once.
"""
import argparse, json, os, resource, subprocess, sys, tempfile, time
from itertools import product
from pathlib import Path

import numpy as np, pandas as pd, soundfile

def write(out, made):
    "The numbers, and the machine that they were measured on, as JSON"
    from self_distill.environment import environment
    machine = {k: v if isinstance(v, dict) else v.model_dump() for k, v in environment('cpu').items()}
    Path(out).write_text(json.dumps(made | machine, indent=1) + '\n')

def decoders(opened, beam_width, stack):
    "The ways to read log-probabilities: name → a function from a list of them to texts; the beam searches in one process and in two"
    from self_distill.beam_search import BeamDecoder, pick_engine
    from self_distill.evaluate import Greedy
    from self_distill.language_model import language_model_for
    arpa, tokenizer = language_model_for(opened.corpus, opened.loaded.config), opened.loaded.tokenizer
    ways = {'greedy': stack.enter_context(Greedy().open(opened))[0]}
    for engine, workers in product(sorted({'pyctcdecode', pick_engine('auto')}, reverse=True), (1, 2)):
        decoder = BeamDecoder(tokenizer, arpa, beam_width=beam_width, engine=engine, workers=workers)
        ways[engine if workers == 1 else f'{engine}, {workers} processes'] = stack.enter_context(decoder).decode_batch
    return ways

def seconds_of(function, inputs):
    "Wall and CPU seconds of this process, and what came out"
    wall, cpu = time.perf_counter(), time.process_time()
    return [o for x in inputs for o in function(x)], time.perf_counter() - wall, time.process_time() - cpu

def decode(checkpoint, utterances, beam_width, rounds, out):
    "Real-time factors, one utterance at a time and all in one batch; the ways take turns, and the median of the rounds counts"
    from contextlib import ExitStack
    from self_distill.beam_search import FRAME_SECONDS
    from self_distill.evaluate import log_probs_of, open_for_evaluation
    from self_distill.features import normalize
    opened = open_for_evaluation(checkpoint, device='cpu')
    loaded, kind = opened.loaded, opened.loaded.config.features.normalization
    features = [normalize(opened.corpus.read(row), kind, loaded.payload.get('feature_statistics'))
                for row in opened.corpus.rows('dev').iloc[:utterances].itertuples()]
    log_probs = log_probs_of(loaded, features, 32)
    speech, rows, texts = FRAME_SECONDS * sum(map(len, log_probs)), [], {}
    with ExitStack() as stack:
        ways = {'network': (lambda batch: log_probs_of(loaded, batch, 32), features)}
        ways |= {name: (way, log_probs) for name, way in decoders(opened, beam_width, stack).items()}
        for _, (name, (way, inputs)), single in product(range(rounds), ways.items(), (True, False)):
            if single and 'processes' in name: continue
            found, wall, cpu = seconds_of(way, [[x] for x in inputs] if single else [inputs])
            rows.append(dict(way=name, input='one by one' if single else 'batch', wall=wall / speech, cpu=cpu / speech))
            if name != 'network': texts.setdefault(name.split(',')[0], found)
    table = pd.DataFrame(rows).groupby(['way', 'input'], sort=False).median()
    table.loc[table.index.get_level_values(0).str.contains('processes'), 'cpu'] = None # which this process does not see
    other = sum(a != b for a, b in zip(texts['pyctcdecode'], texts.get('ctc-beam-decoder', texts['pyctcdecode'])))
    print(f'{len(features)} utterances, {speech:.0f} s, beam width {beam_width}; seconds for a second of speech; '
          f'texts that differ between the engines: {other}\n{table.round(6).to_string()}')
    if out:
        made = dict(checkpoint=checkpoint, utterances=len(features), speech=speech, beam_width=beam_width, rounds=rounds,
                    other_texts=other, real_time_factors=json.loads(table.reset_index().to_json(orient='records')))
        write(out, made)

WORDS = 'go stop left right home away near far open closed red blue green seven eight nine light dark'.split()

def recordings(folder, count=11):
    "Noise of 2 to 20 s at 16 kHz, and one for dev: name → seconds"
    rng, seconds = np.random.default_rng(0), dict(zip([f'{k:02d}' for k in range(count)], np.linspace(2, 20, count).round(2)))
    for name, length in (seconds | {'dev': 3.333}).items(): soundfile.write(folder/f'{name}.flac', 0.1*rng.normal(size=round(length*16000)), 16000)
    return seconds

def write_manifest(folder, rows, files, durations):
    "A table of `rows` utterances whose paths are `files` hard links to the recordings; 64 more for dev"
    rng, seconds = np.random.default_rng(1), recordings(folder)
    names = list(seconds)
    for k in range(files): os.link(folder/f'{names[k % len(names)]}.flac', folder/f'u{k}.flac')
    used = [k % files for k in range(rows)]
    texts = [' '.join(rng.choice(WORDS, 1 + int(2*seconds[names[k % len(names)]]))) for k in used]
    table = pd.DataFrame(dict(id=[f'u{k}' for k in range(rows)], path=[f'u{k}.flac' for k in used], text=texts, split='train',
                              speaker=[f's{k % 997}' for k in range(rows)], duration=[seconds[names[k % len(names)]] for k in used]))
    dev = pd.DataFrame(dict(id=[f'd{k}' for k in range(64)], path='dev.flac', text='go home', split='dev', speaker='d', duration=3.333))
    table = pd.concat([table, dev])
    (table if durations else table.drop(columns='duration')).to_csv(folder/'m.csv', index=False)
    return table.duration.sum()/3600

def measure(folder, check_hours):
    "In a process of its own: seconds to the corpus, the data set, the fingerprint; MiB at the peak of each"
    from self_distill.batches import UtteranceDataset, epoch_batches
    from self_distill.config import AugmentConfig, DataConfig, FeatureConfig, TextConfig
    from self_distill.corpora import load_corpus, training_data
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024
    def clocks(): return time.perf_counter(), time.process_time()
    times, started = dict(imports_mib=peak()), clocks()
    def lap(name):
        nonlocal started
        seconds, cpu = (round(b - a, 2) for a, b in zip(started, clocks()))
        times.update({f'{name}_s': seconds, f'{name}_cpu_s': cpu, f'{name}_mib': peak()})
        started = clocks()
    data = DataConfig(corpus='manifest', path=str(folder/'m.csv'), cache=str(folder/'cache'), check_hours=check_hours)
    corpus = load_corpus(data, TextConfig(), FeatureConfig())
    lap('corpus')
    train = UtteranceDataset(corpus, 'train', corpus.tokenizer, FeatureConfig(), AugmentConfig())
    lap('dataset')
    train[epoch_batches(train.lengths, 24, 0, 1)[0][0]]
    lap('batches')
    training_data(corpus)
    lap('fingerprint')
    print(json.dumps(times))

def scale(sizes, files, durations, check_hours, out):
    "A row for each size: a first start, and a second one"
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            hours = write_manifest(Path(folder), size, files or size, durations)
            for start in ('first', 'second'):
                done = subprocess.run([sys.executable, __file__, 'measure', folder, str(check_hours)], stdout=subprocess.PIPE, check=True, text=True)
                rows.append(dict(rows=size, hours=round(hours), start=start) | json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    print(pd.DataFrame(rows).to_string(index=False))
    if out: Path(out).write_text(json.dumps(rows, indent=1) + '\n')

def trainers(config, settings):
    "The same model and data with CTC alone, with a teacher that is asked at every step, with one that was asked once"
    from self_distill.config import load_config
    from self_distill.trainer import Trainer
    def trainer(name, *more):
        return Trainer(load_config(Path(config).resolve(), ['training.gradient_norms_every=0', *settings, f'run={name}', *more]))
    plain = trainer('ctc')
    plain.save()
    teacher = f'teacher.checkpoint={plain.folder}/checkpoint_last.pt'
    runs = {'CTC': plain, 'teacher asked': trainer('asked', teacher), 'teacher read': trainer('read', teacher)}
    runs['teacher read'].store_answers()
    for run in runs.values(): run.model.train()
    return runs

def timed_step(run, window, round):
    "Seconds to load a window of batches, and to make a step on it"
    import torch
    from self_distill.trainer import loader
    run.train_set.set_epoch(round)
    times = [time.perf_counter()]
    batches = list(loader(run.train_set, window)); times.append(time.perf_counter())
    run.train_step(batches, 4.)
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return np.diff([*times, time.perf_counter()])

def measured_steps(runs, rounds, updates):
    "Seconds (2, variants, steps) of loading and of the step; the variants take turns on the same batches"
    from self_distill.batches import epoch_batches
    plain, seconds = runs['CTC'], []
    size, n = plain.config.training.batch_size, plain.config.training.gradient_accumulation_steps
    for round in range(rounds + 1): # the first one is a warm-up
        batches = [b for b in epoch_batches(plain.train_set.lengths, size, 0, round) if len(b) == size][:updates * n]
        for k in range(0, len(batches), n):
            turn = sorted(enumerate(runs), key=lambda x: (x[0] + round) % len(runs))
            spent = {name: timed_step(runs[name], batches[k:k + n], round) for _, name in turn}
            if round: seconds.append([spent[name] for name in runs])
    return np.array(seconds).transpose(2, 1, 0)

def step(config, settings, rounds, updates, out):
    "Milliseconds of loading and of a training step, and their ratios to CTC alone: medians and quartiles"
    from self_distill.model import count_parameters
    with tempfile.TemporaryDirectory() as folder:
        os.environ['SELF_DISTILL_ROOT'] = folder # what the runs leave goes there
        runs = trainers(config, settings)
        loading, steps = measured_steps(runs, rounds, updates)
    del os.environ['SELF_DISTILL_ROOT']
    table = pd.DataFrame({'loading, ms': np.median(loading, 1) * 1e3, 'step, ms': np.median(steps, 1) * 1e3}, list(runs))
    for name, values in (('step', steps / steps[0]), ('loading and step', (steps + loading) / (steps + loading)[0])):
        for q, part in ((0.5, ''), (0.25, ', 1st quartile'), (0.75, ', 3rd quartile')):
            table[f'{name} to CTC{part}'] = np.quantile(values, q, axis=1)
    plain, t = runs['CTC'], runs['CTC'].config.training
    print(f'{plain.corpus.name}, {count_parameters(plain.model):,} parameters, {steps.shape[1]} steps of '
          f'{t.gradient_accumulation_steps} × {t.batch_size} utterances\n{table.T.round(3).to_string()}')
    if out: write(out, dict(config=config, settings=settings, corpus=plain.corpus.name, parameters=count_parameters(plain.model),
                            steps=steps.shape[1], table=json.loads(table.to_json(orient='index'))))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    options = commands.add_parser('decode')
    options.add_argument('checkpoint')
    options.add_argument('--utterances', type=int, default=200, help='of dev, at most')
    options.add_argument('--beam-width', type=int, default=10)
    options.add_argument('--rounds', type=int, default=5)
    options.add_argument('--out', help='JSON file for the numbers')
    options = commands.add_parser('measure', help='one start of scale')
    options.add_argument('folder', type=Path)
    options.add_argument('check_hours', type=float)
    options = commands.add_parser('scale')
    options.add_argument('--sizes', type=int, nargs='+', default=[10_000, 100_000, 300_000])
    options.add_argument('--files', type=int, default=0, help='distinct paths; 0: one for each row')
    options.add_argument('--without-durations', dest='durations', action='store_false')
    options.add_argument('--check-hours', type=float, default=0, help='data.check_hours')
    options.add_argument('--out', help='JSON file for the numbers')
    options = commands.add_parser('step')
    options.add_argument('--config', default='configs/baseline.yaml')
    options.add_argument('--set', dest='settings', nargs='*', default=[], help='settings on top of it, such as data.path=/my/an4')
    options.add_argument('--rounds', type=int, default=8)
    options.add_argument('--updates', type=int, default=5, help='of each variant in a round')
    options.add_argument('--out', help='JSON file for the numbers')
    chosen = vars(parser.parse_args())
    dict(decode=decode, measure=measure, scale=scale, step=step)[chosen.pop('command')](**chosen)
