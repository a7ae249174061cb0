"Records of runs that never were: every run of a queue, with invented numbers, for tests of what is drawn from records."
import hashlib
from itertools import product

import numpy as np, pandas as pd
from scipy.special import log_softmax

from self_distill.evaluate import Logits
from self_distill.experiments import figure_arrays, load_queue
from self_distill.metrics import count_errors
from self_distill.records import Device, Git, Record, make_array, make_decode, new_record, utterances_of, write_record
from self_distill.schedule import temperature_at
from self_distill.search import ALPHAS, BEAM_WIDTHS, BETAS
from self_distill.text import Tokenizer

WORDS = 'one two three four five go stop yes no erase enter rubout help start repeat'.split()
ERROR = dict(baseline=0.16, student=0.12, control=0.155, compute=0.15) # of words
VALUES = dict(lm_weight=0.5, word_bonus=0.0, beam_width=10) # of the beam search
MORE_TEXT = dict(language_model_order=5, extra_text=['configs/experiments/an4_text.txt'])
UPDATES, TOKENS = 35, Tokenizer.english().tokens

def generator(*names):
    "A random generator that depends on the names alone."
    return np.random.default_rng(int(hashlib.sha256(' '.join(map(str, names)).encode()).hexdigest()[:8], 16))

def split_of(corpus, split, fold, speakers=20, each=3):
    "Utterances of a split: the same for every run of a fold."
    rng, first = generator(corpus, split, fold), 100 * (fold or 0)
    rows = [dict(id=f'{split}{fold or 0}-{s:02d}-{k}', speaker=f'{split}{first + s:03d}', duration=1.5,
                 text=' '.join(rng.choice(WORDS, 5))) for s in range(speakers) for k in range(each)]
    return utterances_of(pd.DataFrame(rows))

def misheard(utterances, error, rng):
    "Texts with about so many words wrong: substituted, deleted or inserted."
    def hear(word):
        r = rng.random()
        if r < error / 4: return []
        if r < error / 3: return [word, rng.choice(WORDS)]
        return [rng.choice(WORDS) if r < error else word]
    return [' '.join(w for word in u.reference.split() for w in hear(word)) for u in utterances]

def search_grid(utterances, error, rng):
    "A search on dev, as `keep_search` stores it."
    rows = []
    for alpha, beta, width in product(ALPHAS, BETAS, BEAM_WIDTHS):
        worse = 0.8 + (alpha - 0.6) ** 2 + beta / 30 - width / 1000
        words = count_errors([u.reference for u in utterances], misheard(utterances, error * worse, rng))
        sums = words[['substitutions', 'deletions', 'insertions', 'reference']].sum()
        wer = 100 * sums.iloc[:3].sum() / sums.iloc[3]
        rows.append(dict(alpha=alpha, beta=beta, beam_width=width, wer=wer, **sums, cer=5.0, seconds=0.01))
    return {f'search/best/{k}': make_array(v.to_numpy()) for k, v in pd.DataFrame(rows).items()}

def posteriors(text, rng):
    "Log-probabilities that spell a text, one spike for each letter among blanks."
    labels = [k for letter in text for k in (0, TOKENS.index(letter), 0)]
    noise = rng.normal(0, 1, (len(labels), len(TOKENS)))
    return log_softmax(noise + 8 * np.eye(len(TOKENS))[labels], axis=-1).astype('float32')

def epochs_of(x, error, rng):
    "Curves that fall."
    c, rows = x.config, []
    for e in range(1, c.training.epochs + 1):
        left = np.exp(-5 * e / c.training.epochs) + rng.normal(0, 0.004)
        terms, weights = dict(hard_ctc_loss=0.02 + left), dict(hard_ctc_loss=1.0)
        if x.teacher:
            terms |= dict(distillation_loss=0.2 + 8 * left, feature_matching_loss=0.3 + left)
            w = c.loss_weights
            weights = dict(distillation_loss=w.alpha, hard_ctc_loss=w.beta, feature_matching_loss=w.gamma)
        weighted = {k: weights[k] * v for k, v in terms.items()}
        rows.append(dict(epoch=e, update=UPDATES * e, temperature=temperature_at(e, c.training.epochs, c.temperature),
                         wer=100 * (error + (1 - error) * max(0, left)), cer=40.0, loss=0.3,
                         learning_rate=1e-3, seconds=30.0 + rng.random(),
                         **{f'train/{k}': v for k, v in terms.items()},
                         **{f'train/{k}_weighted': v for k, v in weighted.items()},
                         **{'train/loss': sum(weighted.values())}))
    return rows

def decodings(x):
    "(decoder, share of the errors that it leaves, settings, checkpoint) of each decoding."
    yield 'greedy', 1, {}, 'best'
    if x.ensemble: yield from (('greedy', 1, {}, weights) for weights in ('ensemble_015_020_025', 'average'))
    yield 'beam', 0.75, VALUES, 'best'
    if 'beam_text' in x.decoders: yield 'beam_text', 0.65, VALUES | MORE_TEXT, 'best'

def times_of(x):
    "Seconds, and updates."
    epochs = x.config.training.epochs
    return dict(training=31.0 * epochs, updates=UPDATES * epochs, decode_greedy_test=0.1, decode_beam_test=4.0)

def invented(x, sha='0' * 64) -> Record:
    "A record of an experiment, the same each time."
    data = x.config.data
    rng, fold = generator(x.name), data.fold if data.protocol == 'folds' else None
    error = ERROR.get(x.row, 0.13) + rng.normal(0, 0.005)
    spoken = {s: split_of(data.corpus, s, fold) for s in ('dev', 'test')}
    decodes = [make_decode(split, decoder, u, misheard(u, error * factor, rng), settings, checkpoint, sha)
               for split, u in spoken.items() for decoder, factor, settings, checkpoint in decodings(x)]
    logits = Logits('dev', 'best', sha, spoken['dev'], [posteriors(u.reference, rng) for u in spoken['dev']])
    made = new_record('training', x.config, parameters=15_200_000 if x.config.model.num_layers == 5 else 7_350_000,
                      teacher=x.teacher and dict(run=x.teacher, checkpoint_sha256=sha),
                      epochs=epochs_of(x, error, rng), utterances=spoken, decodes=decodes,
                      peak_memory={'process': 1500.0}, times=times_of(x),
                      arrays=figure_arrays(logits, TOKENS) | search_grid(spoken['dev'], error, rng))
    same = dict(started='2026-01-01T00:00:00+00:00', git=Git(revision='0' * 40, dirty=False), versions={},
                device=Device(type='cpu', name='invented', threads=1))
    return made.model_copy(update=same) # whatever machine and revision this is

def write_records(queue, folder, keep=lambda x: True):
    "A record for every run of a queue that `keep` keeps."
    for x in load_queue(queue).values():
        if keep(x): write_record(invented(x), folder)
