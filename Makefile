# make demo    show a live update, after installing what it needs
# make check   run the linters and the tests that need no guest; asks for no root
# make test    the same, and then the tests with guests
# make test-vms  test VMs in guests, of which `make test` has only one: about an hour more
# make soak    test the state machines, the store, the crashes of guests and the kernel
#              `debug`, which it builds, for hours: see SOAK_* below
# make bench   measure times, as ratios of one another and by size, and write them to
#              build/bench.json and build/bench.html: see BENCH_ROUNDS below
# make docs    make a site of the manual, build/docs/index.html; a warning is an error
# make sdist   build the sdist, the same bytes each time
# make wheel   build the wheels for x86-64 and aarch64, and use the first one; needs a cross compiler.
#              If there is a python3.14t, also the wheel for that free-threaded Python
# make sbom    write a bill of materials: what an installation consists of
# make man     write the manual page pyluo.1 into build/
# make types   check by pyright that an installed pyluo has whole types (fetches pyright by pip and npm)
# make lint    run ruff, mypy and import-linter
# make clean   remove what the other targets made here; the kernels and roots in the cache stay

# The system's own, for which the packages below are, unless it is too old. Another one in PATH may
# be built without optimization, and guests then take a tenth more CPU time. `make PYTHON=...` takes it.
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell /usr/bin/python3 -c '$(RECENT)' 2>/dev/null && echo /usr/bin/ || :)python3
BIN := .venv/bin

# Guests cannot write bytecode: what the host does not leave them, each of their lives compiles anew.
unexport PYTHONDONTWRITEBYTECODE

# What a Debian 12 or 13 with only git, make and python3 needs to build the extension, to fetch and
# build kernels, their selftests and roots, and to run them. The first ones are for `make check` as well.
CHECK_PACKAGES := python3-venv python3-dev gcc libc6-dev make bc bison flex libelf-dev lz4 perl \
	rsync xz-utils
# libssl-dev, openssl and sbsigntool are for the kernel `signed` and its images.
PACKAGES := $(CHECK_PACKAGES) cpio debian-archive-keyring iproute2 libcap-dev libssl-dev openssl \
	qemu-system-x86 kexec-tools mmdebstrap sbsigntool uidmap zstd
# Tests look at the pages of results in it.
BROWSER := chromium

# The length of a soak: live updates of one store, of VMs, steps of each state machine, rounds of
# crashes.
SOAK_HOPS ?= 500
SOAK_VM_HOPS ?= 20
SOAK_STEPS ?= 20000
SOAK_ROUNDS ?= 20

# Not for `make test`: the kernel for these takes twice as long to build as any other.
DEBUG_TESTS := vm-tests/deaths/test_debug_kernel.py

# VMs in guests. Of these, `make test` has the test that an author of a VMM would start from.
VMS := vm-tests/kvm vm-tests/update
FIRST_VM := 'vm-tests/kvm/test_examples.py::test_an_example_passes_and_records_the_gap_of_its_vm[mini_vmm/test_mini_vm.py]'
# Before the tests, because several processes must not make the same file.
EXAMPLES = for each in mini_vmm passthrough_vm qemu_live_update; do \
	$(MAKE) -s -C examples/$$each || exit 1; done
OTHERS := $(filter-out $(VMS:%=%/) vm-tests/__pycache__/,$(wildcard vm-tests/*/))

# A service with the RAM of a VM, in MiB, and its live updates; `make test` has 32 and two of these.
SERVICE := vm-tests/stores/test_vm_service.py
SERVICE_MIB := 256
SERVICE_UPDATES := 5

# Of how many pairs of times each ratio is made: at least five.
BENCH_ROUNDS ?= 5

.DELETE_ON_ERROR:
.PHONY: demo check test test-vms soak bench docs man sbom sdist types wheel lint clean browser packages check-packages

demo: packages $(BIN)/.vm
	@$(BIN)/pyluo demo

check: lint
	$(BIN)/pytest -n auto --dist worksteal tests

test: packages browser check docs
	$(BIN)/pyluo vm kernel build stable previous selftest signed
	$(BIN)/pyluo vm root build sid
	$(BIN)/pytest -n auto --dist worksteal --durations 20 --ignore $(DEBUG_TESTS) \
		$(OTHERS) $(FIRST_VM)

test-vms: packages $(BIN)/.dev
	$(BIN)/pyluo vm kernel build stable previous
	$(BIN)/pyluo vm root build sid qemu
	$(EXAMPLES)
	PYLUO_SERVICE_MIB=$(SERVICE_MIB) PYLUO_SERVICE_UPDATES=$(SERVICE_UPDATES) \
		$(BIN)/pytest -n 2 --dist loadfile --durations 20 $(SERVICE) $(VMS)

soak: packages $(BIN)/.dev
	PYLUO_STORE_HOPS=$(SOAK_HOPS) PYLUO_MACHINE_STEPS=$(SOAK_STEPS) PYLUO_LINE_STEP=1 PYLUO_RENEWALS=300 \
		$(BIN)/pytest -s -rA vm-tests/stores/test_interrupted.py vm-tests/stores/test_keepers.py \
		vm-tests/stores/test_stores.py::test_a_store_is_renewed_hop_after_hop_and_nothing_is_lost \
		vm-tests/sessions/test_state_machine.py vm-tests/stores/test_store_machine.py
	$(EXAMPLES)
	PYLUO_VM_HOPS=$(SOAK_VM_HOPS) $(BIN)/pytest -n 2 --dist loadfile $(VMS)
	PYLUO_ROUNDS=$(SOAK_ROUNDS) $(BIN)/pytest vm-tests/deaths/test_deaths.py
	$(BIN)/pyluo vm kernel build debug
	PYLUO_ROUNDS=$(SOAK_ROUNDS) $(BIN)/pytest $(DEBUG_TESTS)

bench: packages $(BIN)/.dev
	$(BIN)/python -m benchmarks --rounds $(BENCH_ROUNDS)

lint: $(BIN)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(BIN)/.dev
	$(BIN)/python docs/make_reference.py --check
	$(BIN)/python docs/make_performance.py --check
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

man: $(BIN)/.dev
	mkdir -p build
	$(BIN)/argparse-manpage --module pyluo.cli --function make_parser --prog pyluo \
		--project-name pyluo --manual-title "User Commands" --output build/pyluo.1

sdist: $(BIN)/.dev
	$(BIN)/python -m release.sdist

wheel: $(BIN)/.dev
	$(BIN)/python -m release.wheels

# A bill of materials in CycloneDX's format: a new environment, pip included, with pyluo[vm].
sbom: $(BIN)/python
	$(PYTHON) -m venv --clear build/sbom build/cyclonedx
	build/sbom/bin/pip install -q --disable-pip-version-check '.[vm]'
	build/cyclonedx/bin/pip install -q --disable-pip-version-check cyclonedx-bom
	build/cyclonedx/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file build/pyluo.cdx.json build/sbom

types: $(BIN)/python
	$(PYTHON) -m venv --clear build/types
	build/types/bin/pip install -q --disable-pip-version-check '.[vm]' 'pyright[nodejs]'
	cd build/types && VIRTUAL_ENV=$$PWD PATH=$$PWD/bin:$$PATH \
		pyright --ignoreexternal --verifytypes pyluo

clean:
	rm -rf .venv build dist pyluo.egg-info pyluo/_ffi.c pyluo/_ffi.o pyluo/_ffi.*.so .hypothesis
	rm -rf examples/*/program.elf examples/qemu_live_update/build
	rm -f examples/qemu_live_update/guest.cpio
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find pyluo benchmarks docs examples release tests vm-tests -name __pycache__ -prune -exec rm -rf {} +

# A shell command that prints the packages among its arguments that are not installed.
MISSING := missing() { for package; do \
	dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed \
		|| echo $$package; done; }

# Asks for a password only if a package is missing.
packages browser:
	@$(MISSING); set -- $$(missing $(if $(filter browser,$@),$(BROWSER),$(PACKAGES))); \
	if [ $$# != 0 ]; then \
		echo installing $$*; \
		root=; [ "$$(id -u)" = 0 ] || root=sudo; \
		$$root apt-get -qq update && \
		$$root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
			-o Dpkg::Use-Pty=0 install $$*; \
	fi

# Never asks for root, but says what is missing.
check-packages:
	@$(MISSING); set -- $$(missing $(CHECK_PACKAGES)); \
	if [ $$# != 0 ]; then echo "missing: apt install $$*" >&2; exit 1; fi

# The environment is rebuilt if one of its sources changes.
WITHOUT_ROOT := $(if $(filter-out check docs lint man sbom sdist types wheel,$(or $(MAKECMDGOALS),demo)),,yes)
$(BIN)/python: | $(if $(WITHOUT_ROOT),check-packages,packages)
	$(PYTHON) -m venv .venv

SOURCES := pyproject.toml setup.py build_ffi.py $(wildcard pyluo/_uapi/*.h)

# Without import hooks, which take a fifth of a second to load in an emulated guest.
INSTALL := $(BIN)/pip install -q --disable-pip-version-check --config-settings editable_mode=compat -e

$(BIN)/.vm: $(BIN)/python $(SOURCES)
	$(INSTALL) '.[vm]'
	@touch $@

# This has all that .vm has.
$(BIN)/.dev: $(BIN)/python $(SOURCES)
	$(INSTALL) '.[dev]'
	@touch $(BIN)/.vm $@
