"What the lessons of 09_metrics, 09a_significance and 24_compare cannot teach in seconds: oracles on random texts, and calibration."
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from self_distill.evaluate.compare import System, by_speaker, compare
from self_distill.core.config import Config
from self_distill.core.metrics import count_errors, error_rate, errors_of
from self_distill.core.records import RecordError, Utterance, add_decode, make_decode, new_record
from self_distill.evaluate.significance import (_average, _difference, _noise, _p_value, _resample, _spread, bootstrap_interval,
                                       paired_bootstrap, run_noise)

TEXTS = st.lists(st.sampled_from(['a', 'b', 'ä', 'no', 'yes']), max_size=7).map(' '.join)


def distance(a, b):
    "Levenshtein distance by the textbook recursion."
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1): previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TEXTS.filter(bool), TEXTS), min_size=1, max_size=5))
def test_counts_equal_edit_distance(pairs):
    references, hypotheses = zip(*pairs)
    for unit, split in (('word', str.split), ('character', list)):
        counts = count_errors(references, hypotheses, unit=unit)
        assert errors_of(counts).tolist() == [distance(split(r), split(h)) for r, h in pairs]
        assert (counts.reference - counts.deletions + counts.insertions).tolist() == [len(split(h)) for h in hypotheses]
        assert error_rate(counts) == pytest.approx(100 * errors_of(counts).sum() / sum(len(split(r)) for r in references))


def table(errors, words, run=0):
    "One row per speaker."
    n = len(errors)
    return pd.DataFrame(dict(id=range(n), speaker=range(n), run=run, substitutions=errors, deletions=0, insertions=0, reference=words))


def test_standard_error_is_the_ratio_estimators():
    rng = np.random.default_rng(0)
    words = rng.integers(20, 60, 84)
    errors = rng.binomial(words, rng.uniform(0.1, 0.4, 84))
    rate = errors.sum() / words.sum()
    residual = errors - rate * words
    expected = 100 * np.sqrt(84 / 83 * (residual ** 2).sum()) / words.sum()
    interval = bootstrap_interval(table(errors, words))
    assert interval.standard_error == pytest.approx(expected, rel=0.05)
    assert interval.low < interval.rate < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.989 * expected, rel=0.06)


def test_order_of_rows_and_runs_does_not_matter():
    rng = np.random.default_rng(1)
    runs = pd.concat([table(rng.binomial(30, 0.2, 40), 30, run=k) for k in range(3)])
    shuffled = runs.sample(frac=1, random_state=0)
    assert bootstrap_interval(runs) == bootstrap_interval(shuffled)
    assert paired_bootstrap(table(rng.binomial(30, 0.3, 40), 30), runs).runs == 3


def test_many_units_are_drawn_in_blocks():
    rng = np.random.default_rng(2)
    n = 30_000
    draws = _resample(rng.binomial(8, 0.2, n), np.full(n, 8), rng, 1000)
    assert len(draws) == 1000 and draws.std() == pytest.approx(100 * np.sqrt(0.16 / (8 * n)), rel=0.15)


def test_degenerate_cases():
    perfect = table(np.zeros(12, int), np.full(12, 5))
    assert (bootstrap_interval(perfect).low, bootstrap_interval(perfect).high) == (0, 0)
    same = paired_bootstrap(perfect, perfect)
    assert (same.p_value, same.relative, same.significant) == (1, 0, False) and 'not significant' in str(same)
    alike = paired_bootstrap(table([1, 1], [1, 1]), table([0, 0], [1, 1]))
    assert alike.p_value == 0.5 and 'the same gain everywhere' in str(alike) # no fewer than the sign test's
    few = table([1, 0], [5, 5])
    assert bootstrap_interval(few).unit == 'utterances'
    with pytest.raises(ValueError, match='at least two'): bootstrap_interval(few[:1])
    with pytest.raises(ValueError, match=r'different utterances \(12 and 11\).*only the baseline has 0'): paired_bootstrap(perfect, perfect[1:])


FOLDS = np.where(np.arange(84) % 5 == np.arange(5)[:, None], 74, 0)          # words of each run (fold) and speaker
DESIGNS = {'5 folds': FOLDS, '3 seeds': np.full((3, 84), 74), '2 sets of 5 folds': np.tile(FOLDS, (2, 1))}


def equals(rng, words, run_sds, trials):
    "Errors (trials, rows, runs, speakers) of equally good recipes; points between the runs of each row"
    shape = trials, len(run_sds), *words.shape
    shift = rng.normal(0, 1, shape[:3] + (1,)) * np.reshape(run_sds, (-1, 1, 1)) + rng.normal(0, 6, (trials, 1, 1, words.shape[1]))
    return words * (10 + shift + rng.normal(0, 2.5, shape)) / 100


def false_alarms(words, run_sds, used, trials=1500):
    "Whether the first two rows are called different, tested with the noise of the first `used` rows"
    errors = equals(np.random.default_rng(0), words, run_sds, trials)
    pairs = [_noise(_spread(errors[:, i] - errors[:, j], words), 2 / used) for i, j in combinations(range(used), 2)]
    test = _difference(errors[:, 0] - errors[:, 1], words, _average(pairs))
    return _p_value(*test) < 0.05


def test_rows_that_vary_more_than_the_others_are_not_called_different():
    assert false_alarms(FOLDS, [0.98, 0.98, 0.2, 0.2], 4).mean() <= 0.05


def as_table(errors, words):
    "A row per run and speaker."
    run, speaker = np.nonzero(words)
    return pd.concat([table(errors[k][words[k] > 0], words[k][words[k] > 0], f'run {k}').assign(
        id=speaker[run == k], speaker=speaker[run == k]) for k in range(len(words))])


def test_tables_and_arrays_give_the_same_test():
    words = DESIGNS['2 sets of 5 folds']
    errors = equals(np.random.default_rng(3), words, [0.5] * 3, 1)[0]
    tables = [as_table(e, words) for e in errors]
    noise = run_noise([tables])
    assert noise.freedom == pytest.approx(2 * 5)
    value, error, freedom = _difference(errors[0] - errors[1], words, noise)
    test = paired_bootstrap(tables[0], tables[1], noise)
    assert (test.improvement, test.standard_error) == pytest.approx((value, error))
    assert test.p_value == pytest.approx(_p_value(value, error, freedom))


def test_more_seeds_of_every_fold_on_one_side_keep_the_level():
    rng, wrong, trials = np.random.default_rng(0), 0, 150
    for errors in equals(rng, FOLDS, [0.5] * 3, trials):
        a, *b = (as_table(e, FOLDS) for e in errors)
        b = pd.concat([t.assign(run=t.run + f' seed {seed}') for seed, t in enumerate(b)])
        test, mirrored = paired_bootstrap(a, b), paired_bootstrap(b, a)
        assert test.runs == mirrored.runs == 5 and test.improvement == pytest.approx(-mirrored.improvement)
        wrong += test.significant
    assert wrong / trials <= 0.05, f'{wrong} of {trials} comparisons of equals are called significant'


SPOKEN = [Utterance(id=f'u{k:03d}', speaker=f's{k % 40:02d}', duration=1.0, reference='one two three four five six') for k in range(120)]


def fold_record(run, fold, seed, rate, rng, alpha):
    "A run of protocol folds, which tests every fifth speaker."
    config = Config(run=run, seed=seed)
    config.data.protocol, config.data.fold, config.loss_weights.alpha = 'folds', fold, alpha
    tested = [u for u in SPOKEN if int(u.speaker[1:]) % 5 == fold]
    hypotheses = [' '.join('x' if rng.random() < rate else w for w in u.reference.split()) for u in tested]
    return add_decode(new_record('training', config), make_decode('test', 'greedy', tested, hypotheses), tested)


def test_folds_are_pooled_and_paired_by_fold():
    rng = np.random.default_rng(0)
    base = [fold_record(f'b_fold{k}', k, 0, 0.4, rng, 0.0) for k in range(5)]
    better = [fold_record(f'd_fold{k}_seed{s}', k, s, 0.2, rng, 0.7) for s in (0, 1) for k in range(5)]
    result = compare([*base, *better])
    row = result.table.iloc[1]
    assert (result.table.runs.tolist(), row.significant) == ([5, 10], True)
    pooled = [d for r in better for d in r.decodes]
    assert row.wer == pytest.approx(100 * sum(sum(d.words.substitutions) for d in pooled) / sum(sum(d.words.reference) for d in pooled))
    systems = [System('base', base), System('better', better)]
    assert by_speaker(systems).words.sum() == 720                      # every speaker once, however many seeds
    with pytest.raises(ValueError, match='different utterances'): compare([*base[:4], *better])
    with pytest.raises(RecordError, match='a run counts once'): compare([System('twice', [*base, base[0]]), systems[1]])
