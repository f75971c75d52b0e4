# make demo        the main job on the embedded model, from nothing to a table
# make test        lint and the whole test suite, vLLM included
# make test-serve  the vLLM half of the suite; with VLLM=0.29.0, here or above, that version of
#                  vLLM is used instead of the pinned one, in an environment of its own
# make docs      writes every table of README.md and docs/ anew from evals/results
# make evidence  the paper's claims on the embedded model and on SmolLM2; an hour. DATA=FOLDER
#                  has the texts (evals/paper/texts.py), or they come from the hub; MODEL=DIR is
#                  SmolLM2 or another model; QUICK=1: the embedded model alone, small, minutes
# make sanitize    random cases of the CPU kernel under AddressSanitizer and UBSan (x86; minutes)
# The others first make the environments they need; versions are pinned in .ci/pins.txt.

VENVS ?= .venvs
COMPRESS := $(VENVS)/compress
SERVE := $(VENVS)/serve$(if $(VLLM),-$(VLLM))
# One thread: the models of the tests are so small that more only wait for each other.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
TEST_SERVE := $(TEST_ENV) $(SERVE)/bin/python -m pytest tests/serve

.PHONY: help demo docs evidence test test-serve sanitize lint env-compress env-serve clean
help:
	@sed -n '/^#/!q; s/^# //p' Makefile
	@echo "make lint, make env-compress, make env-serve, make clean (keeps the environments)"

env-compress: $(COMPRESS)/.complete
env-serve: $(SERVE)/.complete
$(VENVS)/%/.complete: .ci/pins.txt .ci/make-env pyproject.toml
	@PYTHON="$(PYTHON)" .ci/make-env $* $(VENVS)/$*

demo: env-compress env-serve
	$(COMPRESS)/bin/python -m evals.demo --serve-env $(SERVE)

docs: env-compress
	$(COMPRESS)/bin/python -m evals.documents

EVIDENCE := $(COMPRESS)/bin/python -m evals.paper $(if $(DATA),--data $(DATA))
evidence: env-compress
ifdef QUICK
	$(EVIDENCE) --quick
else
	$(EVIDENCE)
	$(EVIDENCE) --model $(or $(MODEL),smollm2) --seeds 1 --tokens 8192
endif

lint: env-compress
	$(COMPRESS)/bin/ruff check .
	$(COMPRESS)/bin/mypy
	$(COMPRESS)/bin/lint-imports --no-cache --no-logo
	.ci/check-lines

# tests/serve needs vLLM, everything else the compress environment. Both run, whatever fails.
test: env-compress env-serve lint
	@failed=; \
	echo "== tests in the compress environment"; \
	$(TEST_ENV) $(COMPRESS)/bin/python -m pytest --ignore=tests/serve tests || failed="compress"; \
	echo "== tests in the serve environment"; \
	$(TEST_SERVE) || failed="$$failed serve"; \
	if [ -n "$$failed" ]; then echo "make test: failed in: $$failed"; exit 1; fi; \
	echo "make test: lint and both halves of the suite passed"

test-serve: env-serve
	$(TEST_SERVE)

# Every set of instructions and dtype of x; not optimised, so that it compiles in seconds.
SANITIZE := -std=c++17 -O0 -g1 -w -Wno-psabi -fopenmp \
	-fsanitize=address,undefined -fno-sanitize-recover=all
sanitize:
	@mkdir -p build && for march in native haswell x86-64; do for x in float Bf16 Fp16; do \
		$(CXX) $(SANITIZE) -march=$$march -DWEXPAND_X=$$x tests/kernels/sanitize_cpu.cpp \
			-o build/sanitize && ASAN_OPTIONS=detect_leaks=0 build/sanitize 120 || exit 1; \
	done; done

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path "./.venvs/*" -prune -exec rm -rf {} +
