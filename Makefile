# Two commands: `make run` serves the models of models/zoo, `make test` runs the tests. Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRITON := .cache/triton
TRITONCLIENT := .cache/tritonclient
PROTOS := $(sort $(wildcard proto/rnnserve/v1/*.proto))
SERVICES := $(shell grep -l '^service ' $(PROTOS))
# The other protocol is the server's alone: nothing of it is in the client.
OIP := server/src/rnnserve_server/api/oip

.PHONY: run test vectors samples lint breaking types stubs check-stubs torture fuzz fuzz-files fuzz-files-guided soak bench bench-triton requirements triton-requirements clean

run: $(VENV)/.serve
	-$(BIN)/rnnserve fetch models/zoo
	$(BIN)/rnnserve serve $(ARGS)

test: $(VENV)/.dev $(TRITONCLIENT)/.ready
	-$(BIN)/rnnserve fetch models/zoo
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

# How far the engines are from what real Keras 2 and 3 computed, family by family.
vectors: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m vectors.keras.table $(ARGS)

# Recordings to try the models with: speech and sunspot numbers.
samples: $(VENV)/.serve
	$(BIN)/python models/fetch_samples.py

# The distributions are installed in place: an edit takes effect at once.
$(VENV)/.serve: requirements/serve.txt client/pyproject.toml models/pyproject.toml server/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/serve.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e client -e models -e server
	touch $@

$(VENV)/.dev: $(VENV)/.serve requirements/dev.txt
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/dev.txt
	touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd proto && ../$(BIN)/buf lint
	$(BIN)/hadolint server/Dockerfile

# Fails when the contract breaks whoever was built with that of the commit before, or of AGAINST.
breaking: $(VENV)/.dev
	BUF=$(abspath $(BIN)/buf) .ci/breaking $(AGAINST)

types: $(VENV)/.dev
	$(BIN)/mypy

stubs: $(VENV)/.dev
	$(BIN)/python -m grpc_tools.protoc -Iproto --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	    --python_out=client/src --mypy_out=quiet:client/src $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -Iproto --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	    --grpc_python_out=client/src --mypy_grpc_out=quiet:client/src $(SERVICES)
	$(BIN)/python -m grpc_tools.protoc -I$(OIP:server/src/%=%)=proto/inference \
	    --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	    --python_out=server/src --mypy_out=quiet:server/src --grpc_python_out=server/src \
	    --mypy_grpc_out=quiet:server/src proto/inference/service.proto

# Fails when the committed stubs are not what the contract generates.
check-stubs: stubs
	git diff --exit-code --stat -- client/src/rnnserve/v1 $(OIP)/*_pb2*
	test -z "$$(git status --porcelain -- client/src/rnnserve/v1 $(OIP)/*_pb2*)"

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

# The same with Triton beside it. Once it is installed, `make bench` has it too.
bench-triton: $(VENV)/.dev $(TRITON)/.ready
	$(BIN)/python -m benchmarks $(ARGS)

$(TRITON)/.ready: benchmarks/requirements-triton.txt
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --require-hashes --no-deps -r benchmarks/requirements-triton.txt
	touch $@

# NVIDIA's client, and KServe's stubs, which the tests of the Open Inference Protocol run as they are.
$(TRITONCLIENT)/.ready: requirements/tritonclient.txt requirements/kserve.txt
	$(PYTHON) -m venv $(TRITONCLIENT)
	$(TRITONCLIENT)/bin/python -m pip install --quiet --require-hashes -r requirements/tritonclient.txt
	$(TRITONCLIENT)/bin/python -m pip install --quiet --require-hashes --no-deps -r requirements/kserve.txt
	touch $@

triton-requirements: $(VENV)/.dev
	$(BIN)/uv pip compile --quiet --upgrade --no-deps --generate-hashes --no-header --python-version 3.11 \
	    --output-file benchmarks/requirements-triton.txt benchmarks/requirements-triton.in

# Pins every dependency, with hashes and without download addresses.
requirements: $(VENV)/.dev
	for name in serve dev fuzz tritonclient; do \
	    $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-header --python-version 3.11 \
	        --output-file requirements/$$name.txt requirements/$$name.in || exit 1; \
	done
	$(BIN)/uv pip compile --quiet --upgrade --no-deps --generate-hashes --no-header --python-version 3.11 \
	    --output-file requirements/kserve.txt requirements/kserve.in

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Servers are killed and connections cut for minutes: every session must come out as if nothing had been.
torture: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m torture $(ARGS)

# A million frames that nobody should send: nobody else may notice, and nothing may be left of them.
fuzz: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

# Model files, manifests and other files that nobody should write: each is read, or refused with a reason.
fuzz-files: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m fuzz.files $(ARGS)

# The same, chosen by Atheris by the code that they reach. Its wheels are for Linux.
fuzz-files-guided: $(VENV)/.fuzz
	PYTHONPATH=tests $(BIN)/python -m fuzz.files --guided $(ARGS)

$(VENV)/.fuzz: $(VENV)/.dev requirements/fuzz.txt
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/fuzz.txt
	touch $@

# Visitors come and go, rude ones too, while the server's memory and descriptors are watched.
soak: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m soak $(ARGS)
