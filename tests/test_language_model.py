"""What the pages of 19_language_model and 19_language_model cannot show: real text, any alphabet, properties over many texts"""
import gzip, math, re
from pathlib import Path

import pandas as pd
import pytest
from conftest import DATA, ROOT
from hypothesis import given, settings, strategies as st

kenlm = pytest.importorskip('kenlm')
from self_distill.core.config import CheckpointConfig, Config
from self_distill.data.corpora import Corpus
from self_distill.decode.language_model import (language_model_for, language_model_path, language_model_report, read_sentences,
                                         sentence_overlap, training_sentences)
from self_distill.decode.language_model import (check_spelling, estimate_arpa, load_language_model, ngram_order,
                                 out_of_vocabulary_rate, perplexity, read_unigrams)
from self_distill.data.text import Tokenizer


AN4 = DATA/'an4/etc'

def total_after(model, words, history):
    "The sum of P(w | history) over the whole vocabulary, by KenLM"
    state = kenlm.State()
    if history[:1] == ['<s>']: model.BeginSentenceWrite(state)
    else: model.NullContextWrite(state)
    for word in history[history[:1] == ['<s>']:]:
        following = kenlm.State()
        model.BaseScore(state, word, following)
        state = following
    return sum(10 ** model.BaseScore(state, w, kenlm.State()) for w in [*words, '</s>', '<unk>'])

@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sampled_from(['a', 'b', 'c', 'dé', 'ж']), max_size=6).map(' '.join), min_size=1, max_size=12).filter(lambda s: any(s)), st.integers(1, 4))
def test_every_context_sums_to_one(tmp_path_factory, sentences, order):
    arpa = estimate_arpa(sentences, order, tmp_path_factory.mktemp('lm')/'m.arpa')
    model, words = load_language_model(arpa), read_unigrams(arpa)
    assert set(words) == {w for s in sentences for w in s.split()}
    histories = [[], ['<s>'], ['new'], *([*s.split()[:i]] for s in sentences for i in range(1, 4)), *(['<s>', *s.split()[:2]] for s in sentences)]
    for history in histories: assert total_after(model, words, history) == pytest.approx(1, abs=2e-6), history

@pytest.mark.parametrize('order', [2, 3])
def test_seen_ngrams_keep_probability_where_nothing_occurs_twice(tmp_path, order):
    model = load_language_model(estimate_arpa(['a b c', 'd e f'], order, tmp_path/'m.arpa'))
    assert perplexity(model, ['a b c']) < perplexity(model, ['a c b'])

@pytest.mark.parametrize('sentences', [['привет мир', 'мир дому'], ['שלום עולם'], ['مرحبا بالعالم'], ['cafe\u0301 noir', 'café au lait'], ['今日 は 雨'], ['no\u00a0break space']])
def test_any_script_survives(tmp_path, sentences):
    arpa = estimate_arpa(sentences, 2, tmp_path/'m.arpa')
    assert set(read_unigrams(arpa)) == {w for s in sentences for w in s.split()}
    assert out_of_vocabulary_rate(load_language_model(arpa), sentences) == 0

def corpus_of(**texts):
    "A corpus of nothing but sentences, by split"
    rows = [(text, split) for split, sentences in texts.items() for text in sentences]
    return Corpus('lesson', pd.DataFrame(rows, columns=['text', 'split']), None, 0, False, Tokenizer.english())

def config_in(folder): return Config(checkpoints=CheckpointConfig(folder=str(folder)))

def test_dev_and_test_never_enter(tmp_path):
    corpus, config = corpus_of(train=['a b'], dev=['secret dev'], test=['secret test']), config_in(tmp_path)
    path = language_model_for(corpus, config, order=2)
    assert set(read_unigrams(path)) == {'a', 'b'} and ngram_order(path) == 2
    assert language_model_path(corpus_of(train=['a b'], dev=['other'], test=['words']), config, order=2) == path
    report = language_model_report(corpus, config, order=2)
    assert list(report['unknown dev words (%)']) == [100, 100] and set(report['test sentences in the text']) == {'0 of 1'}

def test_a_language_model_is_estimated_once_and_never_outdated(tmp_path):
    config, corpus = config_in(tmp_path), corpus_of(train=['a b', 'b a'], dev=['a'], test=['b'])
    path = language_model_for(corpus, config)
    made = path.stat().st_mtime_ns
    assert language_model_for(corpus, config) == path and path.stat().st_mtime_ns == made
    others = [language_model_path(corpus_of(train=['a b'], dev=['a']), config), language_model_path(corpus, config, order=2)]
    assert len({path, *others}) == 3 and not any(p.exists() for p in others)

def test_gzipped_extra_text(tmp_path):
    with gzip.open(tmp_path/'x.txt.gz', 'wt', encoding='utf-8') as f: f.write('Ça va!\n\n')
    corpus, config = corpus_of(train=['a b']), config_in(tmp_path)
    assert training_sentences(corpus, config, [tmp_path/'x.txt.gz']) == ['a b', 'ça va']
    assert len(read_unigrams(language_model_for(corpus, config, 2, [tmp_path/'x.txt.gz']))) == 4
    (tmp_path/'cut.txt.gz').write_bytes((tmp_path/'x.txt.gz').read_bytes()[:-9])
    with pytest.raises(ValueError, match='cut.txt.gz cannot be read'): training_sentences(corpus, config, [tmp_path/'cut.txt.gz'])

@pytest.mark.parametrize('content', [b'', b'\\data', b'\\data\\\nngram 1=5\n', b'PK\x03\x04', b'\x1f\x8b\x08broken', b'mmap lm http://kheafield.com/code format version 5\n\0'])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path/'bad.arpa'
    path.write_bytes(content)
    with pytest.raises(ValueError, match='bad.arpa'): load_language_model(path)

def test_spelling_of_word_tokens():
    glosses = Tokenizer.from_texts(['REGEN MORGEN SONNE'], 'word')
    assert check_spelling(['REGEN', 'MORGEN', 'SCHNEE'], glosses, 'm.arpa') == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match='upper-case'): check_spelling(['regen', 'morgen', 'sonne'], glosses, 'm.arpa')

@pytest.mark.skipif(not AN4.is_dir(), reason='no an4/ in data/ or $SELF_DISTILL_DATA')
def test_an4(tmp_path):
    texts = lambda part: [' '.join(re.sub(r'\(.*?\)|</?s>', '', line).lower().split()) for line in open(AN4/f'an4_{part}.transcription')]
    training = texts('train')
    assert sentence_overlap(training, texts('test')) == 26
    held_out, training = training[::8], [s for i, s in enumerate(training) if i % 8] # perplexity on training text held out: orders are not compared on test
    values = [perplexity(load_language_model(estimate_arpa(training, n, tmp_path/f'{n}.arpa')), held_out) for n in (1, 2, 3, 4)]
    assert values[0] > 1.5 * values[2] and all(math.isfinite(v) for v in values)
    more = read_sentences(ROOT/'configs/experiments/an4_text.txt')
    names, mixed = (perplexity(load_language_model(estimate_arpa(training + text, 3 if text is not more else 5, tmp_path/'more.arpa')), held_out) for text in (more[:6000], more))
    assert mixed < 0.85 * values[2] and names > values[2] # names alone make all else less likely

def test_the_header_of_another_toolkit(tmp_path):
    (tmp_path/'x.arpa').write_text('\\data\\\nngram  1=      3\nngram  2=      1\n\n\\1-grams:\n')
    assert ngram_order(tmp_path/'x.arpa') == 2
