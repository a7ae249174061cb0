"What the page of 20a_beam_search cannot show: properties over many inputs, both engines"
import importlib.util, itertools, math, sys
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip('kenlm')
from self_distill.decode.beam_search import BeamDecoder, example_log_probs, pick_engine
from self_distill.decode.language_model import estimate_arpa
from self_distill.data.text import Tokenizer

ENGINES = ['pyctcdecode', 'ctc-beam-decoder']
LETTERS = Tokenizer.english()
TEXTS = ['go to the ball', 'all is well', 'tell the bee', 'see the moon', 'the ball is well']

@pytest.fixture(autouse=True)
def engine_installed(request):
    if 'engine' in request.fixturenames and request.getfixturevalue('engine') == 'ctc-beam-decoder': pytest.importorskip('ctc_beam_decoder')

@pytest.fixture(scope='module')
def arpa(tmp_path_factory): return estimate_arpa(TEXTS * 3, 3, tmp_path_factory.mktemp('lm')/'m.arpa')

@pytest.fixture(scope='module')
def log_probs():
    draw = np.random.default_rng(0)
    return [example_log_probs(TEXTS[i % len(TEXTS)], LETTERS, draw, doubt=1.5) for i in range(60)]

def details(hypotheses): return [(h.text, [(w.word, w.start, w.end, round(w.confidence, 3)) for w in h.words]) for h in hypotheses]

def test_engines_agree(arpa, log_probs):
    pytest.importorskip('ctc_beam_decoder')
    for values in [(0.9, 1.5, 10), (0.3, -1.0, 3), (1.5, 4.0, 40)]:
        one, other = (BeamDecoder(LETTERS, arpa, *values, engine=e).nbest_batch(log_probs) for e in ENGINES)
        assert [*map(details, one)] == [*map(details, other)]
        for found in (*one, *other): assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)

def test_the_cpp_engine_is_the_default_where_it_loads_and_pyctcdecode_elsewhere(arpa, log_probs, monkeypatch, tmp_path, capfd):
    expected = BeamDecoder(LETTERS, arpa, engine='pyctcdecode').decode_batch(log_probs[:10])
    assert pick_engine('auto') == ENGINES[importlib.util.find_spec('ctc_beam_decoder') is not None]
    (tmp_path/'other_system').write_text('no library of this system')
    monkeypatch.setenv('CTC_BEAM_DECODER_LIB', str(tmp_path/'other_system'))
    for module in (sys.modules.get('ctc_beam_decoder'), None):
        monkeypatch.setitem(sys.modules, 'ctc_beam_decoder', module)
        decoder = BeamDecoder(LETTERS, arpa)
        assert decoder.settings['engine'] == 'pyctcdecode' and decoder.decode_batch(log_probs[:10]) == expected
    with pytest.raises(ImportError, match="engine='pyctcdecode'"): BeamDecoder(LETTERS, arpa, engine='ctc-beam-decoder')
    assert capfd.readouterr() == ('', '')

@pytest.mark.parametrize('engine', ENGINES)
def test_a_damaged_language_model_is_named(engine, arpa, tmp_path):
    (tmp_path/'cut.arpa').write_text(arpa.read_text(encoding='utf-8')[:400], encoding='utf-8')
    with pytest.raises(ValueError, match='cut.arpa is damaged'): BeamDecoder(LETTERS, tmp_path/'cut.arpa', engine=engine)

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from(ENGINES), st.sampled_from(['character', 'word', 'subword']))
def test_brute_force(seed, frames, engine, kind):
    if engine == 'ctc-beam-decoder': pytest.importorskip('ctc_beam_decoder')
    tokens = dict(character=(' ', 'a', 'b'), word=('rain', 'Sun', '雨'), subword=('▁a', 'b', '▁ba'))[kind]
    tokenizer = Tokenizer(kind, ('<blank>', *tokens), (-1, -1, -1) if kind == 'subword' else ())
    x = np.log(np.random.default_rng(seed).dirichlet(np.ones(4), size=frames)).astype(np.float32)
    truth = defaultdict(float)
    for path in itertools.product(range(4), repeat=frames):
        labels = [label for label, _ in itertools.groupby(path) if label]
        text = (' ' if kind == 'word' else '').join(tokens[label - 1] for label in labels).replace('▁', ' ')
        truth[' '.join(text.split())] += math.exp(sum(x[t, label] for t, label in enumerate(path)))
    decoder = BeamDecoder(tokenizer, beam_width=10**5, beam_prune=-1e9, token_min=-1e9, engine=engine)
    found = {h.text: h.score for h in decoder.nbest(x, n=10**5)}
    assert set(found) == set(truth)
    for text, p in truth.items(): assert found[text] == pytest.approx(math.log(p), abs=1e-4)

@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('text', ['ball', 'a  a', "it's all"])
def test_double_letters_and_times(engine, text):
    text = ' '.join(text.split())
    draw = np.random.default_rng(4)
    x = example_log_probs(text, LETTERS, draw, doubt=20, silence=6)
    hypothesis = BeamDecoder(LETTERS, engine=engine).nbest(x)[0]
    assert hypothesis.text == text
    peaks = np.flatnonzero(x.argmax(1) > 1) # letters, without spaces
    first, words = 0, text.split()
    for word, timed in zip(words, hypothesis.words):
        last = first + len(word) - 1
        assert (timed.word, timed.start, timed.end) == (word, pytest.approx(peaks[first] * 0.04), pytest.approx((peaks[last] + 1) * 0.04))
        first = last + 1

@pytest.mark.parametrize('text', ['привет мир', 'שלום עולם', 'مرحبا بالعالم', '今日 雨', 'naïve café', 'a_b|c d'])
@pytest.mark.parametrize('engine', ENGINES)
def test_any_alphabet(engine, text, tmp_path):
    tokenizer = Tokenizer.from_texts([text], 'character')
    x = example_log_probs(text, tokenizer, np.random.default_rng(0), doubt=20)
    arpa = estimate_arpa([text], 2, tmp_path/'m.arpa')
    assert BeamDecoder(tokenizer, engine=engine).decode(x) == BeamDecoder(tokenizer, arpa, engine=engine).decode(x) == text

@pytest.mark.parametrize('engine', ENGINES)
def test_word_tokens_repeat_and_keep_their_times(engine, tmp_path):
    glosses = ['loc-REGEN', 'poss-BEREICH', '__ON__', 'IX', '##x', '<noise>', '[pause]']
    tokenizer = Tokenizer('word', ('<blank>', *glosses))
    text = 'IX IX loc-REGEN __ON__ ##x <noise> [pause] poss-BEREICH IX'
    x = example_log_probs(text, tokenizer, np.random.default_rng(0), doubt=20)
    arpa = estimate_arpa([text, 'IX loc-REGEN'], 2, tmp_path/'m.arpa')
    for model in (None, arpa):
        best = BeamDecoder(tokenizer, model, engine=engine).nbest(x)[0]
        assert best.text == text
        peaks = np.flatnonzero(x.argmax(1))
        assert [w.start for w in best.words] == pytest.approx(list(peaks * 0.04))

@pytest.mark.parametrize('engine', ENGINES)
def test_values_of_a_call_hold_for_that_call(engine, arpa, log_probs):
    decoder = BeamDecoder(LETTERS, arpa, engine=engine)
    for weight, bonus, width in [(0.9, 1.5, 10), (0.0, -3.0, 3), (2.0, 6.0, 10), (0.9, 1.5, 10)]:
        arguments = dict(lm_weight=weight, word_bonus=bonus, beam_width=width)
        assert decoder.decode_batch(log_probs, **arguments) == BeamDecoder(LETTERS, arpa, engine=engine, **arguments).decode_batch(log_probs)
