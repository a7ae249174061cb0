"Figures and tables from invented records: complete, and never without records"
import csv, hashlib, json

import nbformat, pandas as pd, pytest
from conftest import ROOT
from synthetic import write_records

from self_distill.study.figures import PAGES, MissingRecords, Results, artifact_notebooks, latex_table, make_figures, write_page
from self_distill.study.plan import PlanError
from self_distill.core.records import RecordError, read_record, write_record
from self_distill.use.cli import main

PLAN, DEMO = ROOT/'configs/experiments/an4.yaml', ROOT/'configs/experiments/demo.yaml'
NAMES, TABLES = [*artifact_notebooks()], {'main_table', 'ablation_table', 'cost_table'}
ROWS = 'baseline', 'control', 'student'

@pytest.fixture(scope='module')
def records(tmp_path_factory):
    "A folder with a record of every run of the AN4 plan"
    folder = tmp_path_factory.mktemp('records')
    write_records(PLAN, folder)
    return folder

def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}
def csv_rows(path): return list(csv.DictReader(open(path, encoding='utf-8')))
def sha256(path): return hashlib.sha256(path.read_bytes()).hexdigest()

def test_every_figure_and_table_is_made(records, tmp_path):
    make_figures(NAMES, PLAN, records, folder=tmp_path)
    assert set(contents(tmp_path)) == {f'{n}.{e}' for n in NAMES for e in (('tex', 'csv', 'json') if n in TABLES else ('pdf', 'png', 'json'))}

def test_inputs_are_named_by_hash_and_by_the_revision_in_the_record(records, tmp_path):
    make_figures(['loss_curves'], PLAN, records, folder=tmp_path)
    made = json.loads((tmp_path/'loss_curves.json').read_text())
    assert made['group'] == 'folds_50' and len(made['records']) == 10 and made['plan_sha256'] == sha256(PLAN)
    for record in made['records']: assert (record['sha256'], record['revision']) == (sha256(records/f'{record["run"]}.json'), '0' * 40)
    assert b'CreationDate' not in (tmp_path/'loss_curves.pdf').read_bytes() and b'Software' not in (tmp_path/'loss_curves.png').read_bytes()

def test_the_csv_holds_the_numbers_of_the_table(records, tmp_path):
    make_figures(['main_table', 'cost_table'], PLAN, records, folder=tmp_path)
    rows, text = csv_rows(tmp_path/'main_table.csv'), (tmp_path/'main_table.tex').read_text()
    assert len(rows) == 8 and r'\toprule' in text and 'Over the control' in text
    for row in rows: assert f'{float(row["wer"]):.2f}' in text
    against = {row['model']: row['control_p_value'] for row in rows}
    assert against['self-distilled'] and not against['control: twice the epochs'] and not against['baseline']
    totals = {row['model'].split(' (')[0]: float(row['total']) for row in csv_rows(tmp_path/'cost_table.csv')}
    assert totals == {'baseline': 50, 'control: CTC alone': 50, 'control: twice the epochs': 100, 'self-distilled': 50 + 50 * 1.35}

def test_a_student_of_more_updates_an_epoch_costs_more(tmp_path):
    make_figures(['cost_table'], ROOT/'configs/experiments/an4_few.yaml', group='untranscribed', folder=tmp_path)
    teacher, student = csv_rows(tmp_path/'cost_table.csv')
    assert (teacher['updates'], student['updates']) == ('1600', '3200') and (teacher['epochs'], student['epochs']) == ('100', '50')
    assert float(student['total']) == pytest.approx(100 + 50 * float(student['ratio']), abs=0.02) and float(student['ratio']) > 4

# what is committed

COMMITTED = sorted((ROOT/'thesis_figures').glob('*.json'))

@pytest.mark.parametrize('path', COMMITTED, ids=lambda p: p.stem)
def test_a_committed_artifact_is_of_the_committed_records(path):
    made = json.loads(path.read_text(encoding='utf-8'))
    if 'plan' in made: assert made['plan_sha256'] == sha256(ROOT/made['plan']), 'the plan has changed: make figures'
    for record in made['records']: assert record['sha256'] == sha256(ROOT/f'results/{record["run"]}.json'), f'{record["run"]} has changed: make figures'

@pytest.mark.parametrize('name', [p.stem for p in COMMITTED if p.stem in TABLES])
def test_a_committed_table_is_what_the_records_say(name, tmp_path):
    make_figures([name], PLAN, folder=tmp_path)
    assert {n: (ROOT/'thesis_figures'/n).read_bytes() for n in contents(tmp_path)} == contents(tmp_path)

@pytest.mark.parametrize('name', PAGES)
def test_a_committed_page_is_what_the_records_say(name, tmp_path):
    assert write_page(name, folder=tmp_path).read_text('utf-8') == (ROOT/f'thesis_figures/{name}.md').read_text('utf-8'), 'make figures'

# what is missing

def test_without_records_everything_is_left_out_by_name(tmp_path):
    states = make_figures(plan=PLAN, records=tmp_path, folder=tmp_path/'out').set_index('artifact').state
    assert states.pop('speed') == 'left out: no record yet of speed_step; `make bench` makes it'
    assert states.str.match('left out: no record yet of an4_').all(), states
    with pytest.raises(MissingRecords, match='no record yet of an4_'): make_figures(['loss_curves'], PLAN, tmp_path)
    with pytest.raises(MissingRecords, match='no record yet of an4_'): make_figures(['results'], PLAN, tmp_path)
    assert not (tmp_path/'out').exists()

def test_the_first_group_that_is_complete_is_taken(tmp_path):
    write_records(PLAN, tmp_path, lambda run: run.group == 'official' or run.name == 'an4_folds_baseline_f0')
    assert Results(PLAN, tmp_path).choose('baseline', 'student') == 'official'
    with pytest.raises(MissingRecords, match='an4_folds'): Results(PLAN, tmp_path, 'folds').choose('baseline', 'student')
    states = make_figures(plan=PLAN, records=tmp_path, folder=tmp_path/'out').set_index('artifact').state
    assert states.ablation_table.startswith('left out: no record yet of an4_ablation_gamma_0_s0')
    assert states.results.startswith('left out: no record yet of an4_folds')
    assert states.drop(['ablation_table', *PAGES]).str.startswith('made').all(), states

def test_a_group_without_a_control_waits_behind_one_that_has_all(tmp_path):
    write_records(PLAN, tmp_path, lambda run: run.group in ('folds', 'folds_50') and not run.name.startswith('an4_folds50_compute'))
    assert Results(PLAN, tmp_path).choose('baseline', 'student') == 'folds'
    (tmp_path/'an4_folds_control_f4.json').unlink()
    assert Results(PLAN, tmp_path).choose('baseline', 'student') == 'folds_50'

def test_the_ablation_table_has_what_is_recorded_and_names_the_rest(tmp_path):
    write_records(PLAN, tmp_path, lambda run: run.group in ('official', 'options') or run.row == 'gamma_0')
    make_figures(['ablation_table'], PLAN, tmp_path, folder=tmp_path)
    names = [row['model'] for row in csv_rows(tmp_path/'ablation_table.csv')]
    assert names[:2] == ['γ = 0', 'attention layer, 4 heads (option B)'] and len(names) == 4
    assert 'Not recorded yet: T = 1 throughout; ' in (tmp_path/'ablation_table.tex').read_text()

def test_a_plan_of_single_runs_draws_what_it_has(tmp_path):
    write_records(DEMO, tmp_path)
    states = make_figures(plan=DEMO, records=tmp_path, folder=tmp_path/'out').set_index('artifact').state
    assert 'has no ablations' in states.ablation_table and not set(PAGES) & set(states.index)
    assert states.drop('ablation_table').str.startswith('made').all(), states
    assert '[' not in (tmp_path/'out/main_table.tex').read_text().split('toprule')[1] # single runs have no interval

def test_records_that_lack_something_name_what_adds_it(tmp_path):
    write_records(PLAN, tmp_path, lambda run: run.group == 'official')
    (tmp_path/'training_cost.json').unlink()
    for path in tmp_path.glob('*.json'): path.write_text(json.dumps(json.loads(path.read_text()) | dict(arrays={}, searches=[])))
    for name in ('temperature', 'posteriors', 'beam_search'):
        with pytest.raises(MissingRecords, match='an4_(baseline|student)_s0.*self-distill experiments'): make_figures([name], PLAN, tmp_path)
    with pytest.raises(MissingRecords, match='no record yet of training_cost; nbs/bench/31_step_time'): make_figures(['cost_table'], PLAN, tmp_path)

def test_what_cannot_be_used_is_named(tmp_path):
    write_records(PLAN, tmp_path, lambda run: run.group == 'official')
    (tmp_path/'an4_student_s1.json').write_text('{"format": 2')
    with pytest.raises(RecordError, match='an4_student_s1.json'): make_figures(plan=PLAN, records=tmp_path, folder=tmp_path/'out')

def test_records_that_the_plan_no_longer_describes_are_refused(tmp_path, monkeypatch):
    write_records(DEMO, tmp_path)
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    (tmp_path/'plan.yaml').write_text(DEMO.read_text().replace('training.epochs: 25', 'training.epochs: 30'))
    with pytest.raises(PlanError, match='record of demo_student was made with other settings .training.epochs was 25, is 30'):
        make_figures(['main_table'], 'plan.yaml', tmp_path, folder=tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_a_plan_of_the_repository_is_found_from_another_root(tmp_path, monkeypatch):
    write_records(DEMO, tmp_path)
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(tmp_path))
    make_figures(['main_table', 'wer_over_epochs'], 'configs/experiments/demo.yaml', tmp_path)
    assert json.loads((tmp_path/'thesis_figures/main_table.json').read_text())['plan_sha256'] == sha256(DEMO)

# single runs

OF_RUNS = [n for n in NAMES if n not in ('repetitions', 'ablation_table', 'cost_table', 'idea')]

@pytest.fixture(scope='module')
def trained(tmp_path_factory, shared_cache):
    "A root with a teacher, its student and a third run, trained by the commands of the README, with names of no plan"
    root, weights = tmp_path_factory.mktemp('runs'), 'models/my-lstm/checkpoint_best.pt'
    small = ['data.utterances=48', f'data.cache={shared_cache}', 'model.num_layers=2', 'model.hidden_size=16', 'model.conv_channels=16', 'threads=1']
    layers = [f'feature_matching.{who}_layers=[0, 1]' for who in ('teacher', 'student')]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SELF_DISTILL_ROOT', str(root))
        for config, words in (('demo', ['run=my-lstm', 'training.epochs=2']), ('demo', ['run=longer_1.0', 'training.epochs=3', 'seed=7']),
                              ('demo_student', ['run=pupil', 'training.epochs=2', f'teacher.checkpoint={weights}', *layers])):
            call('train', '--config', f'configs/{config}.yaml', *small, *words)
    return root

def call(*words):
    "A command in this process, which must succeed"
    with pytest.raises(SystemExit) as done: main([str(w) for w in words])
    assert not done.value.code

@pytest.fixture
def root(trained, monkeypatch):
    monkeypatch.setenv('SELF_DISTILL_ROOT', str(trained))
    return trained

def test_two_trained_runs_are_drawn_by_name(root, tmp_path, capsys):
    call('figures', '--runs', 'my-lstm,pupil', '--folder', tmp_path)
    said, ends = capsys.readouterr().out, {n: ('tex', 'csv', 'json') if n in TABLES else ('pdf', 'png', 'json') for n in OF_RUNS}
    assert set(contents(tmp_path)) == {f'{n}.{e}' for n in OF_RUNS if n != 'beam_search' for e in ends[n]}
    assert 'beam_search: left out: pupil has no search of beam settings on dev: `self-distill search --checkpoint models/pupil/checkpoint_best.pt`' in said
    for run in ('my-lstm', 'pupil'): assert f'{run} has no beam search on dev: `self-distill evaluate-beam --split dev --checkpoint models/{run}/checkpoint_best.pt`' in said
    for name in set(NAMES) - {*OF_RUNS}: assert f'{name}: left out: {name} is drawn from a plan' in said
    assert 'an4' not in said.lower() and 'experiments' not in said
    for path in tmp_path.glob('*.json'): # each names the records as they are now, with what was computed for the figures
        made = json.loads(path.read_text())
        assert 'plan' not in made and {r['run'] for r in made['records']} >= {'pupil'}
        for record in made['records']: assert record['sha256'] == sha256(root/f'results/{record["run"]}.json')
    call('figures', 'wer_over_epochs', 'main_table', '--runs', 'my-lstm, longer_1.0, pupil', '--labels', 'Baseline, Longer, Student', '--folder', tmp_path)
    assert [row['model'] for row in csv_rows(tmp_path/'main_table.csv')] == ['Baseline', 'Longer', 'Student']
    assert r'Corpus demo, dev set' in (tmp_path/'main_table.tex').read_text()

def test_a_beam_search_that_is_recorded_is_drawn(root, tmp_path, capsys):
    call('search', '--checkpoint', 'models/pupil/checkpoint_best.pt', '--lm_weights', '0.5', '--word_bonuses', '0,1', '--beam_widths', '5')
    call('figures', 'beam_search', '--runs', 'my-lstm,pupil', '--folder', tmp_path)
    assert set(contents(tmp_path)) == {f'beam_search.{e}' for e in ('pdf', 'png', 'json')}

def test_runs_without_a_student_have_no_figure_of_one(root, tmp_path):
    states = make_figures(runs=['longer_1.0', 'my-lstm'], folder=tmp_path).set_index('artifact').state
    alone = states[states.str.contains('no student among longer_1.0, my-lstm')]
    assert set(alone.index) == {'temperature', 'posteriors', 'loss_curves', 'beam_search', 'wer_by_speaker'}
    assert states[['wer_over_epochs', 'comparison', 'error_types', 'parameters', 'main_table']].str.startswith('made').all(), states

@pytest.mark.parametrize('runs, labels, why', [(['pupil'], [], 'two to 7'), (['pupil', 'pupil'], [], 'all different'), (['my-lstm', 'pupil'], ['one'], 'labels one'),
                                               (['my-lstm', 'nobody'], [], 'nobody.json: no such record'), (['my-lstm', 'begun'], [], 'begun: not trained to the end')])
def test_runs_that_cannot_be_drawn_are_named(runs, labels, why, root, tmp_path):
    write_record(read_record('results/pupil.json').model_copy(update=dict(run='begun', kind='decoding')))
    with pytest.raises(ValueError, match=why): make_figures(runs=runs, labels=labels, folder=tmp_path/'out')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('name', ['idea', 'results'])
def test_what_needs_a_plan_is_refused_by_name(name, root, tmp_path):
    with pytest.raises(MissingRecords, match=f'{name} is drawn from a plan'): make_figures([name], runs=['my-lstm', 'pupil'], folder=tmp_path/'out')
    assert not (tmp_path/'out').exists()

# rows

def test_a_row_shows_the_records_of_the_row_it_is_the_same_as(records):
    results = Results(PLAN, records, 'folds_50')
    assert [r.run for r in results.records('control')] == [f'an4_folds_compute_f{k}' for k in range(5)]
    assert results.named('control') == 'control: CTC alone' != results.named('folds.compute')
    assert results.rows('baseline', 'control') == ['baseline', 'control']

def test_repetitions_have_the_same_rows_folds_and_split(records, tmp_path):
    results = Results(PLAN, records, 'folds')
    assert results.repetitions(*ROWS) == ['folds_50', 'folds', 'again']
    assert results.repetitions('compute', 'student') == ['folds_50', 'folds']
    assert Results(PLAN, records, 'official').repetitions('baseline', 'student') == ['official']
    write_records(PLAN, tmp_path, lambda run: run.group in ('folds', 'again') and run.name != 'an4_again_student_f4')
    assert Results(PLAN, tmp_path, 'folds').repetitions(*ROWS) == ['folds'] # one run is missing

def test_run_n_of_one_row_is_paired_with_run_n_of_another(records):
    results = Results(PLAN, records, 'official')
    assert [[r.seed for r in results.system(row).records] for row in ('baseline', 'student')] == [[0, 1, 2]] * 2
    assert [r.seed for r in results.records('student')] == [100, 101, 102]

def test_latex_has_only_signs_that_latex_knows():
    text = latex_table(pd.DataFrame({'α_1': ['5 % & 3']}), 'x', '10 % of β')
    assert text.isascii() and r'$\alpha$\_1' in text and r'5 \% \& 3' in text and r'10 \% of $\beta$' in text

@pytest.mark.parametrize('name', NAMES)
def test_artifact_notebooks_take_the_same_parameters(name):
    cells = nbformat.read(artifact_notebooks()[name], as_version=4).cells
    names = {}
    exec(next(c.source for c in cells if 'parameters' in c.metadata.get('tags', [])), names)
    single = {'runs', 'labels'} if name in OF_RUNS else set()
    assert set(names) - {'__builtins__'} == {'plan', 'records', 'group', 'folder'} | single
