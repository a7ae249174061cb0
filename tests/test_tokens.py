"Pieces of words through training, both decoders, the language model and distillation, and the limits of their number."
import os, random, re, sys

import numpy as np, pytest
from self_distill.data.demo import picture_config, write_pictures

from self_distill.decode.beam_search import BeamDecoder, example_log_probs
from self_distill.train.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint
from self_distill.core.config import Config, TextConfig, config_hash
from self_distill.data.corpora import load_corpus
from self_distill.evaluate.evaluate import Beam, Greedy, evaluate
from self_distill.decode.language_model import estimate_arpa
from self_distill.data.text import Tokenizer, build_tokenizer, learn_pieces, normalize_text
from self_distill.train.teacher import load_teacher
from self_distill.train.training import train

PIECES = dict(text=dict(tokenizer='subword', vocabulary=28))
BEST = 'models/pieces/checkpoint_best.pt'

def subword(texts, vocabulary): return build_tokenizer(TextConfig(tokenizer='subword', vocabulary=vocabulary), texts)

# learning

@pytest.mark.parametrize('text', ['привет приветы мир миры', 'नमस्ते नमस्कार दुनिया', 'שלום עולם שלומים', "it's its don't do", '今日 今日は 雨 雨が', '\U00020000\U00020001 \U00020001'])
def test_any_word_of_known_letters_can_be_spelled(text):
    letters = sorted(set(text) - {' '})
    tokenizer = subword([text], 2*len(letters))
    words = [''.join(random.Random(k).choices(letters, k=1 + k % 5)) for k in range(40)]
    for word in words: assert tokenizer.decode(tokenizer.encode(f'{word} {text}')) == f'{word} {text}'
    with pytest.raises(ValueError, match="'q' .*the training split has no such symbol"): tokenizer.encode(f'{text} q')

def test_the_limits_that_a_message_names_are_the_limits():
    texts = [normalize_text(str(n), language='de') for n in range(0, 1000, 7)]
    for wrong, beyond in ((5, -1), (10**5, 1)):
        with pytest.raises(ValueError, match='text.vocabulary') as said: learn_pieces(texts, wrong)
        limit = int(re.search(r'at (?:least|most) (\d+)', str(said.value))[1])
        assert len(learn_pieces(texts, limit)) == limit
        with pytest.raises(ValueError, match=f'at (least|most) {limit}'): learn_pieces(texts, limit + beyond)
    with pytest.raises(ValueError, match='learnt no pieces'): learn_pieces(['', ''], 200)

def test_the_text_alone_decides():
    texts = [normalize_text(str(n), language='de') for n in range(0, 1000, 7)]
    tokenizer = subword(texts, 60)
    assert subword([*reversed(texts), ''], 60) == tokenizer                     # untranscribed utterances are empty
    assert subword(texts[1:], 60) != tokenizer and subword(texts, 61) != tokenizer

def test_other_tokens_are_another_experiment():
    hashes = {config_hash(Config(text=TextConfig(**t))) for t in ({}, dict(tokenizer='word'), dict(tokenizer='subword'), dict(tokenizer='subword', vocabulary=100))}
    assert len(hashes) == 4

# searching

ENGINES = ['pyctcdecode', 'ctc-beam-decoder']
TEXTS = ['go to the ball', 'all is well', 'tell the bee', 'see the moon', 'the ball is well', 'the bees see all']

@pytest.fixture(scope='module')
def pieces(): return subword(TEXTS, 36)

@pytest.fixture(scope='module')
def arpa(tmp_path_factory): return estimate_arpa(TEXTS * 3, 3, tmp_path_factory.mktemp('lm')/'m.arpa')

def engine_or_skip(engine):
    if engine == 'ctc-beam-decoder': pytest.importorskip('ctc_beam_decoder')
    return engine

@pytest.mark.parametrize('engine', ENGINES)
def test_pieces_become_words_with_times(engine, pieces, arpa):
    for seed, text in enumerate(TEXTS):
        x = example_log_probs(text, pieces, np.random.default_rng(seed), doubt=20)
        peaks, words = np.flatnonzero(x.argmax(1)), [pieces.encode(word) for word in text.split()]
        first = np.cumsum([0, *map(len, words)])
        for model in (None, arpa):
            best = BeamDecoder(pieces, model, engine=engine_or_skip(engine)).nbest(x)[0]
            assert best.text == text and [w.word for w in best.words] == text.split()
            assert [w.start for w in best.words] == pytest.approx(list(peaks[first[:-1]] * 0.04))
            assert [w.end for w in best.words] == pytest.approx(list((peaks[first[1:] - 1] + 1) * 0.04))

@pytest.mark.parametrize('with_model', [False, True])
def test_engines_agree_on_random_log_probs(with_model, pieces, arpa):
    pytest.importorskip('ctc_beam_decoder')
    draw = np.random.default_rng(0)
    x = [draw.normal(size=(20, len(pieces))) * 3 for _ in range(10)]
    x = [(o - np.log(np.exp(o).sum(1, keepdims=True))).astype(np.float32) for o in x]
    one, other = (BeamDecoder(pieces, arpa if with_model else None, engine=e).nbest_batch(x) for e in ENGINES)
    assert [[(h.text, [w[:3] for w in h.words]) for h in o] for o in one] == [[(h.text, [w[:3] for w in h.words]) for h in o] for o in other]
    assert [h.score for o in one for h in o] == pytest.approx([h.score for o in other for h in o], abs=1e-3)

def test_the_language_model_knows_words_and_not_pieces(pieces, arpa):
    draw, plain, helped = np.random.default_rng(0), BeamDecoder(pieces), BeamDecoder(pieces, arpa)
    texts = TEXTS * 10
    x = [example_log_probs(text, pieces, draw, doubt=1) for text in texts]
    right = [sum(map(str.__eq__, decoder.decode_batch(x), texts)) for decoder in (plain, helped)]
    assert right[1] > 1.5*right[0] > 0
    with pytest.raises(ValueError, match='does not fit the tokenizer'): BeamDecoder(subword([t.upper() for t in TEXTS], 36), arpa)

# a run

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A root with a trained run of pieces, and its student."
    folder, before = tmp_path_factory.mktemp('tokens'), os.environ.get('SELF_DISTILL_ROOT')
    os.environ['SELF_DISTILL_ROOT'] = str(folder)
    write_pictures(folder)
    train(picture_config('pieces', **PIECES | dict(training=dict(epochs=10))))
    train(student())
    yield folder
    os.environ.pop('SELF_DISTILL_ROOT') if before is None else os.environ.__setitem__('SELF_DISTILL_ROOT', before)

def student(**more): return picture_config('student', **PIECES | dict(seed=1, teacher=dict(checkpoint=BEST)) | more)

def test_a_run_learns_is_decoded_and_teaches(root):
    records = [evaluate(f'models/{run}/checkpoint_best.pt', 'dev', (Greedy(), Beam()), show=False) for run in ('pieces', 'student')]
    for record in records:
        wer = {d.decoder: d.wer for d in record.decodes}
        assert wer['beam'] < wer['greedy'] < 90
    assert records[1].teacher.run == 'pieces' and records[0].fingerprint == records[1].fingerprint
    assert train(student()).run == 'student'                                    # finished: found, not refused

def test_a_teacher_of_other_pieces_is_refused(root):
    for more in (dict(text=dict(tokenizer='subword', vocabulary=27)), dict(text=dict(tokenizer='character')), dict(data=dict(transcribed=0.5))):
        config = student(**more)
        corpus = load_corpus(config.data, config.text, config.features)
        with pytest.raises(CheckpointError, match='other tokens'): load_teacher(config, corpus)

def test_a_checkpoint_holds_the_pieces_as_plain_data(root):
    payload, loaded = load_checkpoint(BEST), load_model(BEST)
    assert Tokenizer.from_dict(payload['tokenizer']) == loaded.tokenizer == load_corpus(loaded.config.data, loaded.config.text, loaded.config.features).tokenizer
    assert {type(s) for s in payload['tokenizer']['scores']} == {float} and len(loaded.tokenizer) == 29
    damaged = {k: v for k, v in payload.items() if k not in ('format', 'sha256')}
    for wrong in (dict(scores=payload['tokenizer']['scores'][1:]), dict(kind='character')):
        save_checkpoint(damaged | dict(tokenizer=payload['tokenizer'] | wrong), root/'models'/'damaged.pt')
        with pytest.raises(CheckpointError, match='scores for 29 tokens'): load_model('models/damaged.pt')

def test_only_learning_needs_sentencepiece(root, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'sentencepiece', None)
    assert evaluate(BEST, 'dev', (Greedy(), Beam()), folder=str(tmp_path), show=False).decodes
