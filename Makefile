# make help lists what there is to do.
GO ?= go
BIN := bin

# What the tests and the demo talk to, as command-or-file=Debian-package.
LIB := /usr/lib/x86_64-linux-gnu
TOOLS := swtpm=swtpm swtpm_setup=swtpm-tools certtool=gnutls-bin softhsm2-util=softhsm2 \
	tpm2_readpublic=tpm2-tools pkcs11-tool=opensc p11-kit=p11-kit \
	openssl=openssl curl=curl strace=strace gcc=gcc xxd=xxd node=nodejs /usr/bin/python3=python3 \
	pg_ctlcluster=postgresql chromium=chromium npm=npm chronyd=chrony certutil=libnss3-tools \
	$(LIB)/pkcs11/libtpm2_pkcs11.so=libtpm2-pkcs11-1

.DEFAULT_GOAL := help
.PHONY: help build nocgo tools demo test lint bench bench-start attack crash storm vm fuzz clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build bin/inkan and bin/inkan-sim
	$(GO) build -o $(BIN)/ ./cmd/inkan ./cmd/inkan-sim

nocgo: ## build without cgo: everything but PKCS#11
	CGO_ENABLED=0 $(GO) build -o $(BIN)/nocgo/ ./cmd/inkan

tools: ## install what tests and demo need and this machine lacks (apt)
	@scripts/need $(TOOLS)

demo: tools build ## from a bare host to a verified order, then attacks on it; HSM=1 with the key in a token, APPROVER=1 with an approver that the TPM demands
	$(BIN)/inkan-sim demo --inkan $(BIN)/inkan $(if $(HSM),--hsm) $(if $(APPROVER),--approver) $(if $(JSON),--json)

test: tools build nocgo ## all tests, on real parts, then all attacks
	$(GO) vet ./...
	$(GO) test -timeout 9m ./...
	$(BIN)/inkan-sim attack --inkan $(BIN)/inkan

lint: ## gofmt, vet, staticcheck
	@fmt=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$fmt" ] || { echo "not gofmt-ed: $$fmt" >&2; exit 1; }
	$(GO) vet ./...
	$(GO) tool -modfile=internal/tools/go.mod staticcheck ./...

bench: tools build ## speed beside the raw device and the standard library, as ratios; ONLY=token for one section
	$(BIN)/inkan-sim bench --inkan $(BIN)/inkan $(if $(ONLY),--only $(ONLY)) $(if $(JSON),--json)

bench-start: build ## how long a signer takes to start with ten million records (10 GB in TMPDIR); RECORDS=1000000 for fewer
	$(BIN)/inkan-sim bench-start $(if $(RECORDS),--records $(RECORDS)) $(if $(JSON),--json)

attack: tools build ## attacks on each layer; FAMILY=os for one of them
	$(BIN)/inkan-sim attack --inkan $(BIN)/inkan $(if $(FAMILY),--family $(FAMILY)) $(if $(JSON),--json)

crash: tools build ## 2000 orders from 16 clients while the signer is killed with -9 five times
	$(BIN)/inkan-sim crash --inkan $(BIN)/inkan $(if $(JSON),--json)

storm: tools build ## 20000 orders from 16 clients while the token with the key hangs, crashes, vanishes and lies
	$(BIN)/inkan-sim storm --inkan $(BIN)/inkan $(if $(JSON),--json)

vm: build nocgo ## the whole of it on a real kernel with /dev/tpmrm0, in a virtual machine
	@scripts/need swtpm=swtpm swtpm_setup=swtpm-tools certtool=gnutls-bin qemu-system-x86_64=qemu-system-x86 busybox=busybox-static cpio=cpio
	scripts/vm

FUZZTIME ?= 30s
fuzz: tools ## every fuzz target for FUZZTIME (30s)
	scripts/fuzz $(FUZZTIME)

clean: ## remove what was built
	rm -rf $(BIN)
