"What the pages of model, loss and schedule cannot show: what the guide's configs say, and a model that can learn a batch by heart."
import torch

from self_distill.batches import UtteranceDataset, collate
from self_distill.config import DataConfig, FeatureConfig, TextConfig
from self_distill.config_io import load_config
from self_distill.corpora import load_corpus
from self_distill.greedy import greedy_decode
from self_distill.loss import hard_loss
from self_distill.metrics import count_errors, error_rate
from self_distill.model import BiLSTMCTC
from self_distill.schedule import temperature_at

def test_the_guides_configs_say_what_the_guide_says():
    student, traditional = (load_config(f'configs/{name}.yaml') for name in ('self_distillation_config', 'distillation'))
    for c in (student, traditional):
        assert (c.loss_weights.alpha, c.loss_weights.beta, c.loss_weights.gamma) == (0.7, 0.2, 0.1)
        assert [temperature_at(e, 80, c.temperature) for e in (1, 30, 31, 70, 71, 80)] == [4.0, 4.0, 3.5, 3.5, 3.0, 3.0]
        t = c.training
        assert (t.epochs, t.batch_size, t.gradient_accumulation_steps, t.optimizer.learning_rate) == (80, 24, 3, 2e-4)
        assert c.feature_matching.student_layers == [2, 3] and c.ctc_loss.label_smoothing == 0
    assert student.feature_matching.teacher_layers == [2, 3] and traditional.feature_matching.teacher_layers == [2, 4]
    assert student.teacher.checkpoint == f'models/{load_config("configs/baseline.yaml").run}/checkpoint_best.pt'
    assert traditional.teacher.checkpoint == f'models/{load_config("configs/teacher.yaml").run}/checkpoint_best.pt'

def test_overfits_one_batch(shared_cache):
    corpus = load_corpus(DataConfig(utterances=60, cache=str(shared_cache)), TextConfig(), FeatureConfig())
    data = UtteranceDataset(corpus, 'train', corpus.tokenizer, FeatureConfig(), None)
    batch = collate([data[i] for i in range(8)])
    torch.manual_seed(0)
    model = BiLSTMCTC(80, len(corpus.tokenizer), num_layers=2, hidden_size=64, conv_channels=96, dropout=0.)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    def wer():
        with torch.no_grad(): out = model.eval()(batch.features, batch.lengths)
        return error_rate(count_errors(batch.texts, greedy_decode(out.logits, out.lengths, corpus.tokenizer)))
    for step in range(1, 301):
        out = model.train()(batch.features, batch.lengths)
        loss = hard_loss(out.logits, out.lengths, batch.labels, batch.label_lengths) / out.lengths.sum()
        optimizer.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        if step % 20 == 0 and wer() == 0: break
    assert wer() == 0, f'{wer():.1f} % of the words are wrong after {step} steps'
