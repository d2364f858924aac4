# Two commands for everybody: `make serve` and `make test`. The others are for those who change the code.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Ray's and torch's own switches, set here once so that every command below runs alike.
export RAY_USAGE_STATS_ENABLED := 0
export RAY_AUTH_MODE ?= token
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: serve test gpu-test chaos fuzz clients image-check check format stubs clean

serve: $(STAMP)          ## make everything and serve the demo model (MODEL=path serves another)
	@$(BIN)/octavo serve $(MODEL) $(ARGS)

# Two processes: Ray forks to start its own, which a process with gRPC threads must not do.
test: $(STAMP)           ## all tests; ARGS="..." hands pytest a choice of them instead
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest -m "not e2e"
	$(BIN)/python -m pytest -m e2e
else
	$(BIN)/python -m pytest $(ARGS)
endif

gpu-test: $(STAMP)       ## kernels, model, engine and wire on a CUDA device (needs a torch build for it); skipped without
	$(BIN)/python -m pytest tests/gpu $(ARGS)

# Exit status 1: a row does not hold. ARGS="--rows F1,F3 --model demo --repeats 4 --json-out FILE", ARGS=--list
chaos: $(STAMP)          ## kill, freeze, slow and cut; compare every token; the whole table takes about an hour
	@$(BIN)/python -m tests.chaos $(ARGS)

# Needs root, and Debian's buildah, runc and mmdebstrap; what it fetches stays in build/image.
image-check: $(STAMP)    ## build k8s/Dockerfile without a registry, run the demo overlay's pods in containers
	OCTAVO_IMAGE_CHECK=1 $(BIN)/python -m pytest -s tests/image $(ARGS)

# The whole campaign; ARGS="--executions 50000 --only submit", ARGS="ports --messages 5000", ARGS="http --requests 5000"
fuzz: $(STAMP)           ## a million damaged inputs for every decoder that faces a socket or a file; a JSON line for each
	@$(BIN)/python -m tests.fuzz $(ARGS)

# Real clients (openai 1 to 3, langchain, litellm, lm-eval, guidellm, locust, schemathesis), each in an environment of its
# own under ~/.cache/octavo/clients (1.5 GB in all), made once; `make test` runs them too from then on.
clients: $(STAMP)        ## clients that others wrote, against a served cluster; ARGS="-k openai" for some
	$(BIN)/python -m tests.clients.environments
	$(BIN)/python -m pytest -m clients $(ARGS)

check: $(STAMP)          ## style, types, structure, stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/protos/test_stubs.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: $(STAMP)          ## compile protos/*.proto again
	$(BIN)/python -m protos.generate

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "Python 3.11 is needed; say where it is: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing into $(VENV) (about 1.5 GB, a few minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
