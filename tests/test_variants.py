"What the notebooks of model and evaluation cannot show: options A, B and C across runs, old checkpoints, and files that others left."
import os, re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd, pytest, torch
from self_distill.data.demo import picture_config, write_pictures

from self_distill.train.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint
from self_distill.core.config import ModelConfig
from self_distill.evaluate.ensemble import _ensemble_path, load_ensemble, open_model
from self_distill.evaluate.ensemble_table import average_weights, evaluate_ensemble
from self_distill.evaluate.evaluate import Beam, Greedy, evaluate, search, search_table
from self_distill.core.files import file_sha256
from self_distill.decode.language_model import estimate_arpa, language_model_for, ngram_order
from self_distill.core.records import read_ledger, RecordError, find_decode, read_record, record_path
from self_distill.train.loss import hard_loss
from self_distill.train.model import BiLSTMCTC, build_model, count_parameters
from self_distill.evaluate.session import open_corpus, open_record
from self_distill.train.training import train

def tiny(heads, **more): return BiLSTMCTC(7, 5, num_layers=2, hidden_size=16, conv_channels=24, dropout=0., attention_heads=heads, **more)

# option B: attention

def test_without_attention_nothing_has_changed():
    torch.manual_seed(3)
    plain, drawn = tiny(0), torch.rand(1)
    torch.manual_seed(3)
    with_it = tiny(4)
    assert not any('attention' in key for key in plain.state_dict()) and 'attention_heads' not in plain.settings
    for key, value in plain.state_dict().items(): assert torch.equal(value, with_it.state_dict()[key]), key
    torch.manual_seed(3)
    build_model(ModelConfig(num_layers=2, hidden_size=16, conv_channels=24), 7, 5)
    assert torch.rand(1) == drawn

@pytest.mark.parametrize('heads', [0, 1, 4])
def test_padding_never_counts(heads):
    torch.manual_seed(0)
    model, lengths, labels = tiny(heads), torch.tensor([41, 9, 30]), torch.randint(1, 5, (3, 2))
    batch = torch.randn(3, 80, 7)
    def gradients(frames, order):
        model.zero_grad()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d): module.reset_running_stats()
        out = model.train()(batch[order, :frames], lengths[order])
        hard_loss(out.logits, out.lengths, labels[order], torch.full((3,), 2)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    tight = gradients(41, [0, 1, 2])
    assert torch.allclose(gradients(80, [0, 1, 2]), tight, atol=1e-4)
    assert torch.allclose(gradients(60, [2, 0, 1]), tight, atol=1e-4)

# runs to decode

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A root with a trained run, another seed of it, and a student with attention whose teacher has none."
    folder, before = tmp_path_factory.mktemp('variants'), os.environ.get('SELF_DISTILL_ROOT')
    os.environ['SELF_DISTILL_ROOT'] = str(folder)
    write_pictures(folder)
    for config in (picture_config(), picture_config('other', seed=1),
                   picture_config('attentive', model=dict(attention_heads=4), teacher=dict(checkpoint='models/pictures/checkpoint_best.pt'), training=dict(epochs=4))): train(config)
    yield folder
    os.environ.pop('SELF_DISTILL_ROOT') if before is None else os.environ.__setitem__('SELF_DISTILL_ROOT', before)

@pytest.fixture
def results(root, tmp_path):
    "Records and ledger of one test, in a folder of its own."
    return str(tmp_path/'results')

BEST = 'models/pictures/checkpoint_best.pt'
EPOCHS = [f'models/pictures/checkpoint_epoch_{e:03d}.pt' for e in (4, 5, 6)]

def test_attention_is_trained_saved_and_taught(root):
    student = open_model('models/attentive/checkpoint_best.pt')
    assert student.config.model.attention_heads == student.model.settings['attention_heads'] == 4
    assert student.payload['teacher']['checkpoint'] == BEST
    torch.manual_seed(student.config.seed)
    fresh = build_model(student.config.model, student.model.settings['input_size'], len(student.tokenizer))
    moved = {k for k, v in student.model.state_dict().items() if k.startswith('attention') and not torch.equal(v, fresh.state_dict()[k])}
    assert 'attention.attention.in_proj_weight' in moved
    train(student.config)                                                             # finished: found, not refused

def test_a_checkpoint_from_before_attention_loads(root):
    payload = load_checkpoint('models/pictures/checkpoint_last.pt')
    older = {k: v for k, v in payload.items() if k not in ('format', 'sha256')}
    without = lambda settings: {k: v for k, v in settings.items() if k != 'attention_heads'}
    older |= dict(config=payload['config'] | dict(model=without(payload['config']['model'])), model_settings=without(payload['model_settings']))
    save_checkpoint(older, root/'models'/'older'/'checkpoint_best.pt')
    a, b = open_model('models/older/checkpoint_best.pt'), load_model('models/pictures/checkpoint_last.pt')
    assert a.model.attention is None and a.config == b.config and list(a.model.state_dict()) == list(b.model.state_dict())

# option C: ensembles

def features(loaded, lengths):
    torch.manual_seed(0)
    return torch.randn(len(lengths), max(lengths), loaded.model.settings['input_size']), torch.tensor(lengths)

def test_mean_of_probabilities(root):
    x, lengths = features(open_model(BEST), [50, 23, 4])
    members, mixed = [open_model(f).model for f in EPOCHS], open_model(EPOCHS)
    with torch.no_grad():
        out = mixed.model(x, lengths)
        assert torch.allclose(out.logits.exp(), sum(m(x, lengths).logits.softmax(-1) for m in members) / 3, atol=1e-6)
        assert torch.allclose(out.logits.logsumexp(-1), torch.zeros(()), atol=1e-5)
        alone = mixed.model(x[1:2, :23], lengths[1:2])
    assert torch.allclose(out.logits[1, :alone.logits.shape[1]], alone.logits[0], atol=1e-5) and out.lengths.tolist() == [13, 6, 1] and out.hidden == []
    assert count_parameters(mixed.model) == 3 * count_parameters(members[0])

def test_an_ensemble_is_the_same_in_any_order_and_another_with_other_members(root):
    assert open_model(EPOCHS).weights_sha256 == open_model(EPOCHS[::-1]).weights_sha256 != open_model(EPOCHS[:2]).weights_sha256
    assert open_model(EPOCHS[::-1]).path.name == 'checkpoint_ensemble_004_005_006.pt'
    assert open_model([BEST]).weights_sha256 == open_model(BEST).weights_sha256

def test_mean_of_weights_with_batch_norm_statistics(root, tmp_path):
    path = average_weights(EPOCHS, tmp_path/'checkpoint_mine.pt', device='cpu')
    states, mean = [load_checkpoint(f)['model'] for f in EPOCHS], load_checkpoint(path)
    for key, value in mean['model'].items():
        if value.is_floating_point(): assert torch.allclose(value.double(), sum(s[key].double() for s in states) / 3, atol=1e-6), key
        else: assert torch.equal(value, states[-1][key]), key
    assert any('running_var' in key for key in mean['model']) and 'training' not in mean
    assert [m['checkpoint'] for m in mean['average']] == [f'pictures/{os.path.basename(f)}' for f in EPOCHS]
    assert mean['best_val_wer'] == pytest.approx(find_decode(evaluate(path, folder=tmp_path), 'dev', 'greedy', 'mine').wer, abs=1e-3)

def test_averaged_weights_can_teach(root):
    path = average_weights(EPOCHS)
    assert path == root/'models'/'pictures'/'checkpoint_average.pt'
    record = train(picture_config('taught', teacher=dict(checkpoint='models/pictures/checkpoint_average.pt'), training=dict(epochs=1)))
    assert record.teacher.weights_sha256 == open_model(path).weights_sha256

def test_what_cannot_be_averaged(root, tmp_path):
    def changed(name, **more):
        payload = {k: v for k, v in load_checkpoint(BEST).items() if k not in ('format', 'sha256', 'training')} | more
        save_checkpoint(payload | dict(model={k: v + 1 for k, v in payload['model'].items()}), tmp_path/name)
        return tmp_path/name
    tokens = load_checkpoint(BEST)['tokenizer']
    other_tokens = changed('a.pt', tokenizer=tokens | dict(tokens=[*tokens['tokens'][:-1], 'ß']))
    config = load_checkpoint(BEST)['config']
    other_features = changed('b.pt', config=config | dict(features=config['features'] | dict(normalization='utterance')))
    other_statistics = changed('c.pt', feature_statistics=[torch.zeros(12), torch.ones(12)])
    for path, why in ((other_tokens, 'write other tokens'), (other_features, 'read other features'), (other_statistics, 'read other features'), (BEST, 'given twice')):
        with pytest.raises(CheckpointError, match=why): load_ensemble([BEST, path])
    with pytest.raises(CheckpointError, match='at least two'): load_ensemble([BEST])
    with pytest.raises(CheckpointError, match='do not correspond'): average_weights([BEST, 'models/other/checkpoint_best.pt'])
    load_ensemble([BEST, 'models/other/checkpoint_best.pt', 'models/attentive/checkpoint_best.pt'])
    with pytest.warns(UserWarning, match='other, pictures: different runs'): open_model([BEST, 'models/other/checkpoint_best.pt'])

def test_a_record_names_a_teacher_that_has_no_checkpoint(root, results):
    loaded = open_model(BEST)
    loaded.payload['teacher'] = dict(run='whisper', checkpoint=None, weights_sha256='0' * 64, wer=None)
    assert open_record(loaded, folder=results).teacher.run == 'whisper'

def test_ensembles_in_records(root, results):
    table = evaluate_ensemble(EPOCHS, 'dev', folder=results)
    assert list(table.model) == ['member'] * 3 + ['mean of probabilities', 'mean of weights']
    record = read_record(record_path('pictures', results))
    assert {d.checkpoint for d in record.decodes} == {'epoch_004', 'epoch_005', 'epoch_006', 'ensemble_004_005_006', 'average'}
    table = evaluate_ensemble([BEST, 'models/other/checkpoint_best.pt'], 'test', why='a test', folder=results)
    assert list(table.model) == ['mean of probabilities']
    assert list(read_ledger(f'{results}/test_ledger.jsonl').run) == ['ensemble_of_other_pictures']

# the language model

def test_runs_with_one_training_text_share_one_language_model(root):
    paths = {language_model_for(open_corpus(open_model(f'models/{run}/checkpoint_best.pt')), picture_config(run)) for run in ('pictures', 'other')}
    assert len(paths) == 1 and ngram_order(paths.pop()) == 3

def test_the_language_model_is_the_same_file_wherever_it_is_estimated(root, tmp_path):
    corpus = open_corpus(open_model(BEST))
    kept = language_model_for(corpus, picture_config())
    again = language_model_for(corpus, picture_config(checkpoints=dict(folder=str(tmp_path))))
    assert kept.name == again.name and kept != again and file_sha256(kept) == file_sha256(again)

# settings of a beam search, and records

def beam_settings(checkpoint, folder, **given): return find_decode(evaluate(checkpoint, 'dev', [Beam(**given)], folder=folder), 'dev', 'beam', 'epoch_005').settings

def test_given_before_searched_before_default(root, results):
    def settings(**given): return [beam_settings(EPOCHS[1], results, **given)[k] for k in ('lm_weight', 'word_bonus', 'beam_width')]
    assert settings() == [0.9, 1.5, 10]
    search(EPOCHS[1], folder=results, lm_weights=[0.3], word_bonuses=[0.5], beam_widths=[7])
    assert settings() == [0.3, 0.5, 7] and settings(lm_weight=0.0) == [0.0, 0.5, 7]
    other = estimate_arpa(['the sea is sad'], 2, root/'other.arpa')
    assert settings(language_model=str(other)) == [0.9, 1.5, 10]  # the search was made with another language model

def test_a_mistyped_decoder_reads_no_test_set(root, results):
    with pytest.raises((ValueError, OSError), match='typo.arpa'): evaluate(BEST, 'test', (Greedy(), Beam(language_model='typo.arpa')), why='a test', folder=results)
    assert not Path(f'{results}/test_ledger.jsonl').exists()

def test_a_search_is_in_the_record(root, results):
    found = search(EPOCHS, folder=results, lm_weights=[0.2, 0.9], word_bonuses=[0.0, 3.0], beam_widths=[5])
    record = read_record(record_path('pictures', results))
    table = search_table(record, 'ensemble_004_005_006')
    assert len(table) == 4 and found == record.searches[0] and table.wer.min() == table[(table.lm_weight == found.lm_weight) & (table.word_bonus == found.word_bonus)].wer.item()
    search(EPOCHS, folder=results, lm_weights=[0.5], word_bonuses=[0.0], beam_widths=[5])
    record = read_record(record_path('pictures', results))
    assert len(search_table(record, 'ensemble_004_005_006')) == 1
    with pytest.raises(RecordError, match='no search of checkpoint best'): search_table(record)

def test_one_beam_decoding_of_each_name(root, results, capsys):
    def beam(lm_weight, name='beam'): return evaluate(BEST, 'dev', (Greedy(), Beam(lm_weight, 1.0, 5, name=name)), folder=results)
    beam(0.4)
    beam(0.8)
    record = beam(1.0, 'beam_heavy')
    assert {(d.decoder, d.settings.get('lm_weight')) for d in record.decodes} == {('beam', 0.8), ('greedy', None), ('beam_heavy', 1.0)}
    out = capsys.readouterr().out
    assert 'Dev WER (greedy): ' in out and 'Dev WER (beam): ' in out and 'Improvement: ' in out and 'lm_weight 0.4' in out
    assert len(read_ledger(f'{results}/test_ledger.jsonl')) == 0

def test_a_record_names_no_folder(root, results):
    arpa = str(language_model_for(open_corpus(open_model(BEST)), picture_config()))
    evaluate(BEST, 'test', (Greedy(), Beam(language_model=arpa)), why='a test', folder=results)
    path = record_path('pictures', results)
    settings = find_decode(read_record(path), 'test', 'beam').settings
    assert str(root) not in path.read_text() and settings['language_model_order'] == 3
    assert len(settings['language_model_sha256']) == 64 and '/' not in settings['language_model']
    assert list(read_ledger(f'{results}/test_ledger.jsonl').why) == ['a test', 'a test']

def test_another_corpus_says_what_is_left_out_and_may_be_one_utterance(root, results, capsys):
    table = pd.read_csv(root/'pictures.csv')
    dev = table.index[table.split == 'dev']
    table.loc[dev[1], 'text'], table.loc[dev[2], 'path'] = 'ω', 'missing.npy'
    table.drop(index=dev[3:]).to_csv(root/'one.csv', index=False)
    other = ['data.corpus=manifest', 'data.path=one.csv', 'data.on_error=skip']
    record = evaluate(BEST, 'dev', (Greedy(), Beam()), overrides=other, folder=results)
    assert sum(note.startswith('excluded ') for note in record.notes) == 2
    said = capsys.readouterr().out
    for words in ("2 utterances are left out: 'ω'", 'missing.npy', 'model is of the training text of one.csv', 'one utterance; ', 'no test'): assert words in said, words

def test_a_language_model_of_other_training_texts_is_noted(root, results):
    table = pd.read_csv(root/'pictures.csv')
    table.drop(index=table.index[table.split == 'train'][-3:]).to_csv(root/'fewer.csv', index=False)
    def notes(*decoders): return evaluate(BEST, 'dev', decoders, overrides=['data.path=fewer.csv'], folder=results).notes
    assert not any('language model' in note for note in notes(Greedy()))
    assert any('language model is of training texts that changed' in note for note in notes(Beam()))

def test_a_beam_with_other_values_is_decoded_again(root, results):
    for decoder, weight in ((Beam(lm_weight=0.3), 0.3), (Beam(), 0.3), (Beam(lm_weight=0.9), 0.9), (Beam(language_model=str(estimate_arpa(['sea'], 2, root/'sea.arpa'))), 0.9)):
        record = evaluate(BEST, 'dev', (decoder,), folder=results, again=False)
        assert find_decode(record, 'dev', 'beam').settings['lm_weight'] == weight
    assert find_decode(record, 'dev', 'beam').settings['language_model'] == 'sea.arpa'

def test_an_ensemble_of_long_names_has_a_short_one():
    members = [SimpleNamespace(config=SimpleNamespace(run=f'{"a_long_name_" * 4}{k}'), path=Path(f'models/{k}/checkpoint_best.pt')) for k in range(4)]
    assert re.fullmatch('ensemble_of_4_[0-9a-f]{8}', _ensemble_path(members).parent.name)
