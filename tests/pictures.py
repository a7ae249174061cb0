"A corpus that is learnt in a second, for tests that need a trained run: sentences of a small grammar as pictures of their letters under noise."
import random

import numpy as np, pandas as pd

from self_distill.config import build_config

FOLLOW = {'the': ['red', 'dead', 'torn'], 'red': ['star', 'road'], 'dead': ['star', 'sea'], 'torn': ['sea', 'road'],
          'star': ['is', 'rose'], 'sea': ['is', 'rose'], 'road': ['is'], 'is': ['near', 'sad'], 'rose': ['near', 'late']}
LETTERS = ' adehilnorst'

def sentence(pick, word='the'): return word if word not in FOLLOW else f'{word} {sentence(pick, pick.choice(FOLLOW[word]))}'

def write_pictures(folder, utterances=120, upper=False):
    "Write the corpus into `folder`: pictures.csv, and features six frames a letter."
    pick, draw, rows = random.Random(0), np.random.default_rng(0), []
    for k in range(utterances):
        text = sentence(pick)
        x = 2 * np.repeat(np.eye(len(LETTERS))[[LETTERS.index(c) for c in text]], 6, 0)
        np.save(folder/f'{k}.npy', (x + draw.normal(0, 1.4, x.shape)).astype(np.float32))
        rows.append(dict(id=f'u{k:03d}', path=f'{k}.npy', text=text.upper() if upper else text, split={4: 'dev', 5: 'test'}.get(k % 6, 'train'), speaker=f's{k % 60:02d}'))
    pd.DataFrame(rows).to_csv(folder/'pictures.csv', index=False)

def picture_values(run='pictures', **more):
    "The settings of a run on it, as a nested dictionary: a second on one core."
    values = dict(run=run, threads=1, device='cpu', data=dict(corpus='manifest', path='pictures.csv'), text=dict(alphabet='train'),
                  features=dict(kind='precomputed', normalization='none'), augmentation=dict(time_masks=0, frequency_masks=0),
                  model=dict(num_layers=1, hidden_size=32, conv_channels=48, dropout=0.0), checkpoints=dict(every=1),
                  feature_matching=dict(teacher_layers=[0], student_layers=[0]),
                  training=dict(epochs=6, batch_size=12, gradient_accumulation_steps=1, gradient_norms_every=0, optimizer=dict(learning_rate=1e-2)))
    for section, part in more.items(): values[section] = values[section] | part if isinstance(values.get(section), dict) else part
    return values

def picture_config(run='pictures', **more): return build_config(picture_values(run, **more))
