"Figures and tables from invented records: complete, the same bytes each time, and never without records"
import csv, hashlib, json

import nbformat, pandas as pd, pytest
from conftest import ROOT
from synthetic import write_records

from self_distill.figures import MissingRecords, Results, artifact_notebooks, latex_table, make_figures
from self_distill.records import RecordError

PLAN = ROOT/'configs/experiments/an4.yaml'
TABLES = {'main_table', 'ablation_table', 'cost_table'}

@pytest.fixture(scope='module')
def records(tmp_path_factory):
    "A folder with a record of every run of the AN4 plan."
    folder = tmp_path_factory.mktemp('records')
    write_records(PLAN, folder)
    return folder

def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}

def test_every_artifact_and_the_page_are_the_same_bytes_again(records, tmp_path):
    first, second = tmp_path/'a', tmp_path/'b'
    states = make_figures(plan=PLAN, records=records, folder=first)
    assert states.state.str.startswith('made').all(), states
    make_figures(plan=PLAN, records=records, folder=second)
    assert contents(first) == contents(second)
    wanted = {'results.md'} | {f'{n}.{e}' for n in artifact_notebooks() for e in (('tex', 'csv', 'json') if n in TABLES else ('pdf', 'png', 'json'))}
    assert set(contents(first)) == wanted
    page = (first/'results.md').read_text(encoding='utf-8')
    assert ' nan' not in page and '](comparison.png)' in page

def test_inputs_are_named_by_hash_and_by_the_revision_in_the_record(records, tmp_path):
    make_figures(['loss_curves'], PLAN, records, folder=tmp_path)
    made = json.loads((tmp_path/'loss_curves.json').read_text())
    assert made['group'] == 'folds_50' and len(made['records']) == 10
    for record in made['records']:
        assert record['sha256'] == hashlib.sha256((records/f'{record["run"]}.json').read_bytes()).hexdigest()
        assert record['revision'] == '0' * 40
    assert made['plan_sha256'] == hashlib.sha256(PLAN.read_bytes()).hexdigest()

def test_pdf_and_png_carry_no_time(records, tmp_path):
    make_figures(['parameters'], PLAN, records, folder=tmp_path)
    assert b'CreationDate' not in (tmp_path/'parameters.pdf').read_bytes()
    assert b'Software' not in (tmp_path/'parameters.png').read_bytes()

def test_the_csv_holds_the_numbers_of_the_table(records, tmp_path):
    make_figures(['main_table'], PLAN, records, folder=tmp_path)
    rows = list(csv.DictReader(open(tmp_path/'main_table.csv', encoding='utf-8')))
    text = (tmp_path/'main_table.tex').read_text()
    assert len(rows) == 8 and r'\toprule' in text
    for row in rows: assert f'{float(row["wer"]):.2f}' in text

# what is committed

COMMITTED = sorted((ROOT/'thesis_figures').glob('*.json'))

@pytest.mark.parametrize('path', COMMITTED, ids=lambda p: p.stem)
def test_a_committed_artifact_is_of_the_committed_records(path):
    made = json.loads(path.read_text(encoding='utf-8'))
    assert made['plan_sha256'] == hashlib.sha256((ROOT/made['plan']).read_bytes()).hexdigest(), 'the plan has changed: make figures'
    for record in made['records']:
        assert record['sha256'] == hashlib.sha256((ROOT/f'results/{record["run"]}.json').read_bytes()).hexdigest(), f'{record["run"]} has changed: make figures'

@pytest.mark.parametrize('name', [p.stem for p in COMMITTED if p.stem in TABLES])
def test_a_committed_table_is_what_the_records_say(name, tmp_path):
    make_figures([name], PLAN, folder=tmp_path)
    assert {n: (ROOT/'thesis_figures'/n).read_bytes() for n in contents(tmp_path)} == contents(tmp_path)

# what is missing

def test_without_records_everything_is_left_out_by_name(tmp_path):
    states = make_figures(plan=PLAN, records=tmp_path, folder=tmp_path/'out')
    assert states.state.str.startswith('left out: no record yet of an4_').all(), states
    assert states.state.str.contains('self-distill experiments .*an4.yaml', regex=True).all()
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('name', [*artifact_notebooks(), 'results'])
def test_a_single_artifact_without_records_is_an_error(name, tmp_path):
    with pytest.raises(MissingRecords, match='no record yet of an4_.*self-distill experiments'):
        make_figures([name], PLAN, tmp_path, folder=tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_the_first_group_that_is_complete_is_taken(tmp_path):
    write_records(PLAN, tmp_path, lambda x: x.group == 'official' or x.name == 'an4_folds_baseline_f0')
    results = Results(PLAN, tmp_path)
    assert results.choose('baseline', 'student') == 'official'
    with pytest.raises(MissingRecords, match='an4_folds'): Results(PLAN, tmp_path, 'folds').choose('baseline', 'student')
    states = make_figures(plan=PLAN, records=tmp_path, folder=tmp_path/'out').set_index('artifact').state
    assert states.ablation_table.startswith('left out: no record yet of an4_ablation_gamma_0_s0')
    assert states.drop('ablation_table').str.startswith('made').all(), states

def test_a_group_without_a_control_waits_behind_one_that_has_all(tmp_path):
    write_records(PLAN, tmp_path, lambda x: x.group in ('folds', 'folds_50') and not x.name.startswith('an4_folds50_compute'))
    assert Results(PLAN, tmp_path).choose('baseline', 'student') == 'folds'
    (tmp_path/'an4_folds_control_f4.json').unlink()
    assert Results(PLAN, tmp_path).choose('baseline', 'student') == 'folds_50'

def test_the_ablation_table_has_what_is_recorded_and_names_the_rest(tmp_path):
    write_records(PLAN, tmp_path, lambda x: x.group in ('official', 'options') or x.row == 'gamma_0')
    make_figures(['ablation_table'], PLAN, tmp_path, folder=tmp_path/'out')
    rows = list(csv.DictReader(open(tmp_path/'out'/'ablation_table.csv', encoding='utf-8')))
    assert [r['model'] for r in rows[:2]] == ['γ = 0', 'attention layer, 4 heads (option B)'] and len(rows) == 4
    assert 'Not recorded yet: T = 1 throughout; ' in (tmp_path/'out'/'ablation_table.tex').read_text()

def test_a_plan_of_single_runs_draws_what_it_has(tmp_path):
    write_records(ROOT/'configs/experiments/demo.yaml', tmp_path)
    states = make_figures([], ROOT/'configs/experiments/demo.yaml', tmp_path, folder=tmp_path/'out').set_index('artifact').state
    assert 'has no ablations' in states.ablation_table
    assert states.drop('ablation_table').str.startswith('made').all(), states
    assert 'synthetic' in (tmp_path/'out'/'results.md').read_text()

def test_records_without_arrays_name_what_adds_them(tmp_path):
    write_records(PLAN, tmp_path, lambda x: x.group == 'official')
    for path in tmp_path.glob('*.json'):
        values = json.loads(path.read_text()) | {'arrays': {}, 'searches': []}
        path.write_text(json.dumps(values))
    for name in ('temperature', 'posteriors', 'beam_search'):
        with pytest.raises(MissingRecords, match='an4_(baseline|student)_s0.*self-distill experiments'): make_figures([name], PLAN, tmp_path, folder=tmp_path/'out')

def test_a_corrupt_record_is_named(tmp_path):
    write_records(PLAN, tmp_path, lambda x: x.group == 'official')
    (tmp_path/'an4_student_s1.json').write_text('{"format": 2')
    with pytest.raises(RecordError, match='an4_student_s1.json'): make_figures(plan=PLAN, records=tmp_path, folder=tmp_path/'out')

def test_unknown_artifacts_and_groups_are_refused(tmp_path):
    with pytest.raises(ValueError, match='no artifact is called losses; there are loss_curves'): make_figures(['losses'], PLAN, tmp_path)
    with pytest.raises(ValueError, match="has no group 'fold'"): Results(PLAN, tmp_path, 'fold')

def test_a_row_shows_the_records_of_the_row_it_is_the_same_as(records):
    results = Results(PLAN, records, 'folds_50')
    assert [r.run for r in results.records('control')] == [r.run for r in results.records('folds.compute')] == [f'an4_folds_compute_f{k}' for k in range(5)]
    assert results.named('control') == 'control: CTC alone' != results.named('folds.compute')
    assert results.rows('baseline', 'control') == ['baseline', 'control']

def test_repetitions_have_the_same_rows_folds_and_split(records, tmp_path):
    results = Results(PLAN, records, 'folds')
    assert results.repetitions('baseline', 'control', 'student') == ['folds_50', 'folds', 'again']
    assert results.repetitions('compute', 'student') == ['folds_50', 'folds']
    assert Results(PLAN, records, 'official').repetitions('baseline', 'student') == ['official']
    write_records(PLAN, tmp_path, lambda x: x.group in ('folds', 'again') and x.name != 'an4_again_student_f4')
    assert Results(PLAN, tmp_path, 'folds').repetitions('baseline', 'control', 'student') == ['folds'] # one run is missing

# seeds are paired

def test_run_n_of_one_row_is_paired_with_run_n_of_another(records):
    results = Results(PLAN, records, 'official')
    assert [[r.seed for r in results.system(row).records] for row in ('baseline', 'student')] == [[0, 1, 2]] * 2
    assert [r.seed for r in results.records('student')] == [100, 101, 102]

def test_latex_has_only_signs_that_latex_knows():
    text = latex_table(pd.DataFrame({'α_1': ['5 % & 3']}), 'x', '10 % of β')
    assert text.isascii() and r'$\alpha$\_1' in text and r'5 \% \& 3' in text and r'10 \% of $\beta$' in text

def test_artifact_notebooks_take_the_same_parameters():
    for name, path in artifact_notebooks().items():
        cells = [c for c in nbformat.read(path, as_version=4).cells if 'parameters' in c.metadata.get('tags', [])]
        names = {}
        exec(cells[0].source, names)
        assert set(names) - {'__builtins__'} == {'plan', 'records', 'group', 'folder'}, name
