"Records with invented numbers for every run of a plan, for tests of what is drawn from records"
import hashlib, itertools

import numpy as np, pandas as pd
from scipy.special import log_softmax

from self_distill.core.environment import Device, Git
from self_distill.study.experiments import figure_arrays
from self_distill.core.files import atomic_write
from self_distill.core.metrics import PARTS, errors_of
from self_distill.evaluate.session import LogProbs
from self_distill.study.plan import load_plan
from self_distill.core.records import Record, Search, Teacher, make_array, make_decode, new_record, record_text, utterances_of
from self_distill.train.schedule import temperature_at
from self_distill.decode.search import BEAM_WIDTHS, LM_WEIGHTS, SETTINGS, WORD_BONUSES
from self_distill.data.text import Tokenizer

WORDS = 'one two three four five go stop yes no erase enter rubout help start repeat'.split()
ERROR = dict(baseline=0.16, student=0.12, control=0.155, compute=0.15) # of words
BEAM = dict(zip(SETTINGS, (0.5, 0.0, 10)))
UPDATES, TOKENS, WEIGHTS = 35, Tokenizer.english().tokens, '0' * 64
SAME = dict(started='2026-01-01T00:00:00+00:00', git=Git(revision='0' * 40, dirty=False), versions={},
            device=Device(type='cpu', name='invented', threads=1)) # whatever machine and revision this is

def generator(*names): return np.random.default_rng(int(hashlib.sha256(' '.join(map(str, names)).encode()).hexdigest()[:8], 16))

def split_of(corpus, split, fold, speakers=20, each=3):
    "Utterances of a split: the same for every run of a fold"
    rng, first = generator(corpus, split, fold), 100 * (fold or 0)
    return utterances_of(pd.DataFrame([
        dict(id=f'{split}{fold or 0}-{s:02d}-{k}', speaker=f'{split}{first + s:03d}', duration=1.5, text=' '.join(rng.choice(WORDS, 5)))
        for s in range(speakers) for k in range(each)]))

def misheard(utterances, error, rng):
    "Texts with about this share of words wrong: substituted, deleted or inserted"
    def hear(word):
        r = rng.random()
        return [] if r < error / 4 else [word, rng.choice(WORDS)] if r < error / 3 else [rng.choice(WORDS)] if r < error else [word]
    return [' '.join(w for word in u.reference.split() for w in hear(word)) for u in utterances]

def searched(utterances, error, rng):
    "A search on dev"
    rows, words = [], sum(len(u.reference.split()) for u in utterances)
    for lm_weight, bonus, width in itertools.product(LM_WEIGHTS[::4], WORD_BONUSES[:2], BEAM_WIDTHS[:2]):
        rate = error * (0.8 + (lm_weight - 0.6) ** 2 + bonus / 30 - width / 1000)
        counts = dict(zip(PARTS, [*rng.binomial(words, rate * np.array([0.6, 0.2, 0.2])).tolist(), words]))
        rows.append(dict(zip(SETTINGS, (lm_weight, bonus, width))) | counts | dict(cer=5.0, seconds=0.01))
    grid = pd.DataFrame(rows).assign(wer=lambda t: 100 * errors_of(t) / t.reference)
    return Search(decoder='beam', checkpoint='best', weights_sha256=WEIGHTS, language_model_sha256=WEIGHTS, **BEAM,
                  grid={k: v.tolist() for k, v in grid.items()})

def posteriors(text, rng):
    "Log-probabilities that spell a text, one peak for each letter among blanks"
    labels = [k for letter in text for k in (0, TOKENS.index(letter), 0)]
    return log_softmax(rng.normal(0, 1, (len(labels), len(TOKENS))) + 8 * np.eye(len(TOKENS))[labels], axis=-1).astype('float32')

def epochs_of(run, error, rng):
    "Curves that fall"
    c, w, rows = run.config, run.config.loss_weights, []
    weights = dict(hard_ctc_loss=w.beta, distillation_loss=w.alpha, feature_matching_loss=w.gamma) if run.teacher else dict(hard_ctc_loss=1.0)
    for e in range(1, c.training.epochs + 1):
        left = np.exp(-5 * e / c.training.epochs) + rng.normal(0, 0.004)
        terms = dict(hard_ctc_loss=0.02 + left, distillation_loss=0.2 + 8 * left, feature_matching_loss=0.3 + left)
        losses = {f'train/{k}': terms[k] for k in weights} | {f'train/{k}_weighted': weight * terms[k] for k, weight in weights.items()}
        rows.append(losses | {'train/loss': sum(weights[k] * terms[k] for k in weights)} | dict(
            epoch=e, update=UPDATES * e, temperature=temperature_at(e, c.training.epochs, c.temperature), loss=0.3, cer=40.0,
            wer=100 * (error + (1 - error) * max(0, left)), learning_rate=1e-3, seconds=30.0 + rng.random()))
    return rows

def invented(run) -> Record:
    "A record of a run, the same each time"
    c, rng = run.config, generator(run.name)
    error = ERROR.get(run.row, 0.13) + rng.normal(0, 0.005)
    spoken = {s: split_of(c.data.corpus, s, c.data.fold if c.data.protocol == 'folds' else None) for s in ('dev', 'test')}
    decoders = {'greedy': (1, {})} | {
        d.name: (0.65 if d.extra_text else 0.75, BEAM | dict(language_model_order=d.order, extra_text=list(d.extra_text)))
        for d in run.decoders if d.name in ('beam', 'beam_text')}
    means = ['ensemble_015_020_025', 'average'] if run.ensemble else []
    decodes = [make_decode(split, name, u, misheard(u, error * factor, rng), settings, checkpoint, WEIGHTS) for split, u in spoken.items()
               for name, (factor, settings) in decoders.items() for checkpoint in ('best', *(means if name == 'greedy' else ()))]
    arrays = figure_arrays(LogProbs('dev', spoken['dev'], [posteriors(u.reference, rng) for u in spoken['dev']]), TOKENS)
    made = new_record('training', c, parameters=15_200_000 if c.model.num_layers == 5 else 7_350_000, epochs=epochs_of(run, error, rng),
                      teacher=run.teacher and Teacher(run=run.teacher, weights_sha256=WEIGHTS), utterances=spoken, decodes=decodes,
                      searches=[searched(spoken['dev'], error, rng)], arrays=arrays, peak_memory={'process': 1500.0},
                      times={'training': 31.0 * c.training.epochs, 'updates': UPDATES * c.training.epochs})
    return made.model_copy(update=SAME)

def training_cost() -> Record:
    "The benchmark of 31_step_time"
    ratios = {'distillation to CTC, float32': 1.3, 'distillation to CTC, bfloat16': 1.35, 'forward pass to CTC step': 0.3,
              'greedy to CTC step': 0.001, 'beam search to CTC step': 0.05}
    rounds = np.array(list(ratios.values()))[:, None] * [0.99, 1, 1.02]
    return Record(kind='benchmark', run='training_cost', config=dict(ratios=list(ratios), rounds=3), config_hash='0', corpus='an4',
                  protocol='none', seed=0, parameters=7_350_000, arrays=dict(ratios=make_array(rounds)), **SAME)

TEXTS = {} # name of a run → its record's text, which is the same each time

def text_of(run):
    if run.name not in TEXTS: TEXTS[run.name] = record_text(invented(run))
    return TEXTS[run.name]

def write_records(plan, folder, keep=lambda run: True):
    "A record for every run of a plan that `keep` keeps, and that of the benchmark"
    texts = {run.name: text_of(run) for run in load_plan(plan).values() if keep(run)} | dict(training_cost=record_text(training_cost()))
    for name, text in texts.items():
        with atomic_write(folder/f'{name}.json') as file: file.write(text)
