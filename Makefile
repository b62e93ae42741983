# Needs make and Python 3.11 or newer; everything else is installed into .venv on first use.
#   make demo    generate with the built-in pair, with and without its drafter
#   make test    run the tests
#   make metal   run the kernels' tests on a Mac's GPU, and time the kernels
#   make lint    check style and types
#   make clean   remove .venv and everything that was built
# PYTHON=/path/to/python chooses the Python that .venv is made with.

PYTHON =
CANDIDATES = $(if $(PYTHON),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11 python)
BIN = .venv/bin
# The stamp's name holds the set of package files and where they are: a new file is installed anew.
STAMP := .venv/installed-$(shell { pwd; find gemma_mtp_mlx/ convert/ -type f ! -name '*.pyc' 2>/dev/null | sort; } | cksum | cut -d' ' -f1)

.PHONY: demo test metal lint clean

demo: $(STAMP)
	@$(BIN)/python -m bench.demo

test: $(STAMP)
	$(BIN)/pytest -n auto --dist worksteal $(ARGS)

metal: $(STAMP)
	@$(BIN)/python -c 'import mlx.core as mx, sys; mx.metal.is_available() or sys.exit("make metal needs a Mac with an Apple GPU; make test executes the kernels on Linux")'
	$(BIN)/pytest tests/kernels $(ARGS)
	$(BIN)/python -m bench.kernels --out bench/results/kernels.json

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@# From elsewhere, so that mypy sees the package as it is installed.
	cd .venv && bin/mypy --config-file ../pyproject.toml -p gemma_mtp_mlx

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): $(BIN)/python pyproject.toml constraints.txt
	@rm -rf .venv/installed-* build
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@echo 'Installing into .venv (takes a minute or two, once)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--config-settings editable_mode=strict --editable '.[test]'
	@touch $@

# Candidates are run, not only looked up: a version manager's shim exists and may yet fail.
$(BIN)/python:
	@found=; bare=; \
	for python in $(CANDIDATES); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
		if "$$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then found="$$python"; break; fi; \
		bare="$$python"; \
	done; \
	if [ -n "$$found" ]; then "$$found" -m venv --clear .venv; exit; fi; \
	if [ -n "$$bare" ]; then \
		echo "$$bare cannot make virtual environments: install its venv module (Debian, Ubuntu:" \
			"apt install python3-venv), then run make again" >&2; \
	else \
		echo "Python 3.11 or newer is needed: install it (python.org, 'brew install python', 'apt" \
			"install python3 python3-venv'), or give its path: make PYTHON=/path/to/python" >&2; \
	fi; exit 1
