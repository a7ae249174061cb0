# Everything installs into .venv from requirements.lock; `make` alone lists what there is.
SHELL := /bin/sh
BIN := .venv/bin
STAMP := .venv/.installed
WORKERS ?= 2
# one thread for each process: the small models here gain nothing from more, and tests run side by side
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test torture bench figures docs export clean-notebooks readme lock

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## install everything into .venv (Python 3.11 or 3.12; costs nothing when it is there)

$(STAMP): requirements.lock settings.ini setup.py tools/install.py
	@python=$$(for p in python3.11 python3.12 python3 python; do \
	    if $$p -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1; then echo $$p; break; fi; done); \
	if [ -z "$$python" ]; then echo "No Python 3 was found. Install Python 3.11 or 3.12 (Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv)."; exit 1; fi; \
	$$python tools/install.py

demo: $(STAMP) ## the whole recipe on the synthetic corpus: baseline, distilled student, beam, comparison, figures
	$(BIN)/self-distill demo

test: $(STAMP) ## all tests, every notebook's included (WORKERS=2 at a time)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

torture: $(STAMP) ## the long tests alone: runs killed and resumed many times, full disks
	$(BIN)/python -m pytest -m "torture or disk"

bench: $(STAMP) ## measure speed, scale and memory here, into results/ and thesis_figures/speed.md (20 minutes)
	@mkdir -p runs; set -e; measure() { name=$$1; shift; $(BIN)/papermill nbs/bench/$$name.ipynb runs/$$name.ipynb --cwd nbs/bench --no-progress-bar "$$@"; }; \
	measure 31_step_time -p record speed_step -p batches 4 -p rounds 7 -y '{data: [data.corpus=demo]}'; \
	measure 33_decoding_speed -p record speed_decoding -p blocks 5; \
	measure 37_scale -p record speed_scale -p steps 4 -p long 150 -y '{rows: [330, 3300, 33000, 300000], bare_rows: [300000], settings: [training.batch_size=12]}'; \
	measure 38_peers -p record speed_peers -p epochs 10 -p rounds 3 -y '{settings: []}'
	$(BIN)/self-distill figures speed

figures: $(STAMP) ## draw every figure and table again from results/, without training
	$(BIN)/self-distill figures

docs: $(STAMP) ## build the searchable site of guides and notebooks into _docs/
	$(BIN)/python tools/docs.py

export: $(STAMP) ## write self_distill/ from the notebooks
	$(BIN)/nbdev_export

clean-notebooks: $(STAMP) ## strip from the notebooks what git should not see
	$(BIN)/nbdev_clean

readme: $(STAMP) ## run nbs/index.ipynb and write README.md from it
	$(BIN)/python tools/readme.py

lock: $(STAMP) ## resolve settings.ini's requirements anew into requirements.lock
	$(BIN)/python tools/lock.py --upgrade
