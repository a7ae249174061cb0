"The error explorer: what its page holds, by the data in it; and the page itself in Chromium, where there is one."
import json, re

import numpy as np, pytest, soundfile, torch
from browser import CHROMIUM, Page
from conftest import ROOT

from self_distill.evaluate.compare import System, systems_of
from self_distill.core.config import Config, DataConfig
from self_distill.core.records import Utterance, add_decode, find_decode, make_decode, new_record, read_record
from self_distill.use.report import page_html, page_of, picture, report, sound, telling, track

NASTY = '</script><script>window.broken=1</script>', '<img src=x onerror=window.broken=1>', '<!--', '&lt;b&gt;', "'\"`${1}"
SPOKEN = [Utterance(id='u0', speaker='ann', duration=1.0, reference='open the door'), Utterance(id='u1', speaker='bob', duration=1.5, reference='close a window now'),
          Utterance(id='u2', speaker='ann', duration=0.5, reference='yes'), Utterance(id=f'u3 {NASTY[1]}', speaker=NASTY[1], duration=2.0, reference=f'no {NASTY[0]}')]
HEARD = dict(first=['open door', 'clothes a window', 'yes', 'no no'], second=['open the door', 'close a big window no', 'yes', f'no {" ".join(NASTY)}'])

def invented(run, texts, **more):
    "A record with a greedy decoding of dev"
    record = new_record('decoding', Config(run=run, data=DataConfig(corpus='manifest', path='nowhere.csv'), **more), parameters=1)
    return add_decode(record, make_decode('dev', 'greedy', SPOKEN, texts), SPOKEN)

def two(): return [System(name, [invented(name, texts)]) for name, texts in HEARD.items()]
def committed(*runs): return systems_of([read_record(ROOT/f'results/{run}.json') for run in runs])
def data_in(html): return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])
def errors(items): return sum(not isinstance(i, str) for i in items)

@pytest.fixture
def page(tmp_path, monkeypatch):
    "A page with sound of two invented runs, as data"
    monkeypatch.setattr('self_distill.use.report._open', lambda *a: (_ for _ in ()).throw(ValueError('recordings are elsewhere')))
    soundfile.write(tmp_path/'a.wav', 0.1*np.sin(np.arange(16000)/5), 16000)
    made = page_of(two())
    lines = track('first', np.eye(3)[[0, 1, 0, 2, 0] * 5], ['<blank>', 'a', '<b>'])
    return made | dict(audio=True, picture='80 log-mel bins', media={0: dict(audio=sound(tmp_path/'a.wav'), picture=picture(torch.randn(100, 80), True), posteriors=[lines])})

# what the page holds

@pytest.mark.parametrize('split', ['dev', 'test'])
def test_the_page_counts_as_the_records_do(split):
    systems = committed('an4_folds50_baseline_f0', 'an4_folds50_student_f0')
    made = data_in(page_html(page_of(systems, split)))
    assert [c['decoder'] for c in made['columns']] == ['greedy', 'beam', 'beam_guide'] * 2
    for k, c in enumerate(made['columns']):
        record = systems[k//3].records[0]
        decode = find_decode(record, split, c['decoder'])
        assert c['wer'] == pytest.approx(decode.wer, abs=1e-3) and c['low'] < c['wer'] < c['high'] and c['cer'] == pytest.approx(decode.cer, abs=1e-3)
        found = {u['id']: errors(items) for u in made['utterances'] for column, _, items in u['texts'] if column == k}
        assert found == {u.id: s + d + i for u, s, d, i in zip(record.utterances[split], decode.words.substitutions, decode.words.deletions, decode.words.insertions)}
    assert [c['gain'] is None for c in made['columns']] == [True]*3 + [False]*3
    assert made['notes'][0].startswith('A test set is for the end') == (split == 'test')

def test_folds_are_pooled():
    made = page_of(committed(*(f'an4_folds50_{row}_f{k}' for row in ('baseline', 'student') for k in (0, 1, 2))), 'test')
    assert [c['runs'] for c in made['columns']] == [3]*6 and made['title'] == 'baseline, student'
    assert len(made['utterances']) == sum(len(read_record(ROOT/f'results/an4_folds50_student_f{k}.json').utterances['test']) for k in (0, 1, 2))

def test_seeds_give_an_utterance_several_texts():
    both = System('both', [invented('both_s0', HEARD['first']), invented('both_s1', HEARD['second'], seed=1)])
    made = page_of([both])
    assert [(k, run) for k, run, _ in made['utterances'][0]['texts']] == [(0, 'seed 0'), (0, 'seed 1')]

def test_what_cannot_be_compared_has_no_test_and_says_so():
    made = page_of([two()[0], *committed('an4_folds50_baseline_f0')])
    assert all(c['gain'] is None for c in made['columns']) and 'No paired test: runs with different corpora' in ' '.join(made['notes'])
    assert len(made['utterances']) == 4 + 103

def test_no_data_can_leave_its_element(page):
    html, empty = page_html(page), page_html({})
    assert html.count('</script') == empty.count('</script') and html.count('<!--') == empty.count('<!--') and html.count('<img') == 0
    texts = [items for u in data_in(html)['utterances'] for _, _, items in u['texts']]
    assert texts[-1][-1][1] == NASTY[-1] and data_in(html) == json.loads(json.dumps(page))

def test_the_page_names_no_other_file():
    html = page_html({})
    assert set(re.findall(r'\w+://[\w.]+', html)) == {'http://www.w3.org'} and "default-src 'none'" in html # the name of SVG
    assert not re.search(r'\s(src|href)=|@import|innerHTML|insertAdjacent|document\.write', html)

def test_sound_goes_to_what_tells_most(page):
    assert telling(page['utterances'], 2) == [0, 3] and telling(page['utterances'], 0) == [] and telling(page['utterances'], 9) == [0, 1, 2, 3]

def test_where_the_data_are_named_they_must_be_there(tmp_path):
    with pytest.raises(ValueError, match='no such folder'): report(committed('an4_folds50_baseline_f0'), overrides=['data.path=/nowhere'], output=tmp_path/'a.html')
    assert not (tmp_path/'a.html').exists()

# the page in a browser

in_chromium = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium or Chrome here (Debian: apt-get install chromium)')
IDS = "[...document.querySelectorAll('.card .top b')].map(b => b.textContent.slice(0, 2))"

@pytest.fixture
def opened(page, tmp_path):
    (tmp_path/'page.html').write_text(page_html(page), encoding='utf-8')
    with Page(tmp_path/'page.html', tmp_path/'profile') as browser:
        yield browser
        assert browser.complaints == [] and browser('window.broken') is None

@in_chromium
def test_search_sort_and_filter(opened):
    assert opened(IDS) == ['u3', 'u0', 'u1', 'u2'] and opened("document.querySelectorAll('#results tbody tr').length") == 2
    opened.press('/', *'CLOSE')
    assert opened(IDS) == ['u1'] and 'of 4 utterances' in opened("document.getElementById('count').textContent")
    opened.press('Escape')
    assert len(opened(IDS)) == 4
    opened("(s => { s.value = 'longest'; s.onchange({target: s}) })(document.getElementById('sort'))")
    assert opened(IDS) == ['u3', 'u1', 'u0', 'u2']
    opened.click('#filters [data-name=better]')
    assert opened(IDS) == ['u0']
    opened.click('#filters [data-name=all]')
    opened("(s => { s.value = 0; s.onchange({target: s}) })(document.getElementById('second'))") # one column alone
    assert opened("document.querySelectorAll('.card')[1].querySelectorAll('.labels span').length") == 2

@in_chromium
def test_words_stand_below_the_words_they_answer(opened):
    slots = "[...document.querySelector('[data-index=\"1\"]').querySelectorAll('.flow .slot')].map(s => [...s.children].map(c => c.textContent))"
    assert opened(slots) == [['close', 'clothes', 'close'], ['a', 'a', 'a'], ['', '', '+big'], ['window', 'window', 'window'], ['now', '–', 'no']]
    opened.click('summary')
    opened.click('#confusions tbody tr:first-child')
    pair = opened("document.getElementById('search').value")
    assert pair.count('→') == 1 and 0 < len(opened(IDS)) < 4
    assert opened("document.querySelectorAll('#confusions tbody tr').length") >= 5

@in_chromium
def test_keys_play_and_theme(opened):
    opened.press('j', 'j')
    assert opened("document.querySelector('.chosen b').textContent") == 'u0'
    opened.press(' ')
    opened.until('!player.paused && player.currentTime > 0.1')
    assert opened("document.querySelectorAll('.chosen .track path').length") == 3 and opened("document.querySelector('.cursor').style.visibility") == 'visible'
    assert opened("getComputedStyle(document.querySelector('.picture')).maskImage").startswith('url("data:image/png')
    opened.press(' ')
    assert opened('player.paused')
    opened.press('o', 'k')
    assert opened("document.querySelectorAll('.media').length") == 0 and opened("document.querySelector('.chosen b').textContent").startswith('u3')
    papers = []
    for _ in range(3):
        papers.append(opened("getComputedStyle(document.body).backgroundColor"))
        opened.press('t')
    assert papers[0] == papers[1] != papers[2]                                        # the system's (light), light, dark

@in_chromium
def test_dark_and_narrow(page, tmp_path):
    (tmp_path/'page.html').write_text(page_html(page), encoding='utf-8')
    with Page(tmp_path/'page.html', tmp_path/'profile', 'dark', 360) as browser:
        assert sum(map(int, re.findall(r'\d+', browser("getComputedStyle(document.body).backgroundColor"))[:3])) < 150
        assert browser('document.documentElement.scrollWidth') <= 360 and browser.complaints == []
