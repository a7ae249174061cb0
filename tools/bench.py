"""How fast: `python tools/bench.py decode models/<run>/checkpoint_best.pt`.

`decode` measures the real-time factors of the network, of greedy decoding and of the beam search with each engine.
"""
import argparse, json, time
from itertools import product
from pathlib import Path

import pandas as pd

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
    from self_distill.environment import environment
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
        machine = {k: v if isinstance(v, dict) else v.model_dump() for k, v in environment('cpu').items()}
        Path(out).write_text(json.dumps(made | machine, indent=1) + '\n')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    options = commands.add_parser('decode')
    options.add_argument('checkpoint')
    options.add_argument('--utterances', type=int, default=200, help='of dev, at most')
    options.add_argument('--beam-width', type=int, default=10)
    options.add_argument('--rounds', type=int, default=5)
    options.add_argument('--out', help='JSON file for the numbers')
    chosen = vars(parser.parse_args())
    dict(decode=decode)[chosen.pop('command')](**chosen)
