# Two commands are enough: `make run` (build, start, run a first pod) and `make test`.
# On a fresh Debian machine, as root, both install what is missing. `make help` lists the rest.

.PHONY: help run test check test-unit test-node test-critest test-kubelet test-zfs fuzz soak bench build setup fmt clean-caches

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 16

run: ## build, start the daemon on private folders, run a pod from a local image; Ctrl-C undoes it all
	@scripts/setup run
	@scripts/build release
	@scripts/run-demo

test: ## every suite that runs on this machine, with a count
	@scripts/setup test
	@scripts/test-all

check: ## the quick gate: format, lints, licences, unit tests, layers, wire contract
	@scripts/setup test
	@scripts/check

test-node: ## the life of a pod on a real systemd and cgroup v2 (a guest with its own kernel)
	@scripts/setup test
	@scripts/build release
	@tests/node/run

test-critest: ## the CRI conformance suite
	@scripts/setup test
	@scripts/test-critest

fuzz: ## fuzz the parsers that face the network, each target for SECONDS (default 10)
	@scripts/setup test
	@scripts/fuzz $(or $(SECONDS),10)

test-kubelet: ## Kubernetes on the daemon: a real kubelet, control plane, one to three nodes
	@scripts/setup test
	@scripts/test-kubelet

test-zfs: ## the image, crictl and conformance suites, and ZFS's own, on the ZFS driver over zfs-fuse
	@scripts/setup test
	@ZFS_SUITES="zfs zfs_crash" scripts/test-zfs

soak: ## the long forms: critest three times, ZFS crashes, churn for SOAK_MINUTES (default 10), the kubelet's long waits
	@scripts/setup test
	@scripts/soak

bench: ## time and memory of a pod's life
	@scripts/setup test
	@scripts/build release
	@scripts/bench

build: ## release binaries: target/release/proxmox-lxcri and the static monitor
	@scripts/setup build
	@scripts/build release

fmt: ## format the sources
	@cargo fmt --all

clean-caches: ## remove what the tests keep between runs (not the node guest's kernel and root)
	@tests/tools/clean
