# Every target sets up what is missing first (scripts/dev.py): the environment, PyTorch, fastres itself.
PYTHON ?= python3
DEV = $(PYTHON) scripts/dev.py
comma := ,

.PHONY: help test bench bench-ops bench-cpu bench-gpu sweep kernel-report test-triton cuda-report cuda-sanitize wheels test-matrix test-sanitize lint format clean

help:
	@echo "make test           the tests                                    ARGS='-k fuse' goes to pytest"
	@echo "make bench          whole networks against other engines         ARGS='resnet34 --mode infer' goes to fastres bench"
	@echo "make bench-ops      every op at the shapes of real layers        ARGS goes to pytest"
	@echo "make bench-cpu      networks, layers, memory, sweeps on the CPU  ARGS='layers depth': these parts; --help lists all"
	@echo "make sweep          every model of timm, torchvision, transformers: same numbers fused?   ARGS='timm --only resnet'"
	@echo "make kernel-report  what compilers make of the Triton kernels, for GPUs not here   ARGS='--kernel apply --targets sm_90'"
	@echo "make test-triton    the tests of the Triton kernels with the oldest Triton         ARGS goes to pytest"
	@echo "make cuda-report    what nvcc makes of the CUDA kernels, for GPUs not here"
	@echo "make cuda-sanitize  the CUDA kernels on the CPU, under sanitizers and with seeded bugs"
	@echo "make bench-gpu      ceilings, ops, layers, networks on a GPU     ARGS='--list' names what it measures"
	@echo "make test-matrix    the tests with the oldest, a middle and the newest PyTorch"
	@echo "make wheels         source distribution and wheels, checked, installed and tried   ARGS='oldest default newest'"
	@echo "make test-sanitize  the kernels under a sanitizer                KIND=undefined or address (default: both)"
	@echo "make lint           ruff, clang-format, mypy"
	@echo "make format         ruff and clang-format mend what they can"
	@echo "make clean          remove what was built, and .venv"
	@echo
	@echo "TORCH='torch==2.11.0'  what pip installs into .venv; without it, an active environment with PyTorch is used"
	@echo "PYTHON=python3.12      which Python"

test bench bench-ops bench-cpu bench-gpu sweep kernel-report test-triton:
	@$(DEV) $@ $(ARGS)

lint format:
	@$(DEV) $@

cuda-report cuda-sanitize:
	@$(DEV) python scripts/$(subst -,_,$@).py $(ARGS)

wheels:
	@$(PYTHON) scripts/matrix.py --wheels $(ARGS)

test-matrix:
	@$(PYTHON) scripts/matrix.py $(ARGS)

test-sanitize:
	@$(DEV) python scripts/sanitize.py $(or $(KIND),address$(comma)undefined) $(ARGS)

clean:
	rm -rf build dist *.egg-info .venv .venv-matrix .pytest_cache .mypy_cache .ruff_cache fastres/*.so fastres/_build_info.json
	find fastres tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +
