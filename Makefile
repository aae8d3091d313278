# Two commands are enough: `make run` (build, start, run a first pod) and `make test`.
# On a fresh Debian machine, as root, both install what is missing. `make help` lists the rest.

.PHONY: help run test check deb test-unit test-node test-critest test-kubelet test-lxc test-proxmox-lxc test-proxmox-vm test-zfs test-images test-bfc test-faults fuzz soak bench bench-load build sbom setup fmt clean-caches

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

test-images: ## registries, credentials, mirrors, signatures, hostile images, umoci's trees, the command line's verbs for images
	@scripts/setup test
	@scripts/test-images

test-bfc: ## Binary File Containers: the format, malformed files, images from them, speed
	@scripts/setup test
	@cargo test --lib bfc
	@cargo test --test bfc -- --test-threads=1

fuzz: ## fuzz the parsers that face the network and of files from elsewhere, each target for SECONDS (default 10)
	@scripts/setup test
	@scripts/fuzz $(or $(SECONDS),10)

test-kubelet: ## Kubernetes on the daemon: a real kubelet, control plane, one to three nodes
	@scripts/setup test
	@scripts/test-kubelet

test-lxc: ## the handler lxc: its own suite, crictl's verbs, killed daemons, and all of critest on it
	@scripts/setup test
	@scripts/test-lxc whole

test-proxmox-lxc: ## the handler proxmox-lxc with the tests' Proxmox: its own suite, crictl's verbs, killed daemons, and all of critest on it
	@scripts/setup test
	@scripts/test-proxmox-lxc

test-proxmox-vm: ## the handler proxmox-vm with the tests' Proxmox, which runs virtual machines by QEMU
	@scripts/setup test
	@scripts/test-proxmox-vm

test-zfs: ## the image, crictl and conformance suites, and ZFS's own, on the ZFS driver over zfs-fuse
	@scripts/setup test
	@ZFS_SUITES="zfs zfs_send zfs_fork zfs_migrate zfs_crash" scripts/test-zfs

test-faults: ## kill -9 of daemon, monitor or both at every named point (FAULT_SEED=... repeats a run), power cuts, full disks
	@scripts/setup test
	@cargo test --test faults --test monitor_death --test power_and_disk -- --test-threads=1

soak: ## the long forms: critest three times, ZFS crashes, crash points, churn for SOAK_MINUTES (default 10), load, the kubelet's long waits
	@scripts/setup test
	@scripts/soak

bench: ## this runtime beside its peers (docs/performance.md), and time and memory of a pod's life
	@scripts/setup test
	@scripts/build release
	@scripts/bench

bench-load: ## LOAD_MINUTES (2) of churn, ten at a time, on release programs, and the same on containerd
	@scripts/setup test
	@scripts/build release
	@scripts/bench-load

build: ## release binaries: target/release/proxmox-lxcri, the static monitor, the programs of the handler lxc
	@scripts/setup build
	@scripts/build release

deb: ## the Debian package of the release programs: target/deb
	@scripts/setup build
	@scripts/build release
	@scripts/deb

sbom: ## what is in the shipped programs (CycloneDX): target/sbom
	@scripts/setup build
	@scripts/sbom

fmt: ## format the sources
	@cargo fmt --all

clean-caches: ## remove what the tests keep between runs (not the node guest's kernel and root)
	@tests/tools/clean
