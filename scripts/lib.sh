# shellcheck shell=bash
# Common parts of the scripts. Sourced, never run.
set -euo pipefail

say() { echo "${0##*/}: $*" >&2; }
die() { say "$*"; exit 1; }

# need PACKAGE[:PROGRAM]...: installs the Debian packages whose program is missing (a program given as a path is looked
# for there).
need() {
  local want=() p program
  for p; do
    program=${p#*:}
    case $program in
    /*) [ -e "$program" ] || want+=("${p%%:*}") ;;
    *) PATH=$PATH:/usr/sbin:/sbin command -v "$program" > /dev/null || want+=("${p%%:*}") ;;
    esac
  done
  [ ${#want[@]} -gt 0 ] || return 0
  command -v apt-get > /dev/null || die "missing: ${want[*]}. This is not Debian: install them by hand, then run this again."
  [ "$(id -u)" = 0 ] || die "missing: ${want[*]}. Run this as root, or: apt-get install ${want[*]}"
  say "installing ${want[*]}"
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300)
  {
    "${apt[@]}" install -y --no-install-recommends "${want[@]}" < /dev/null ||
      { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "${want[@]}" < /dev/null; }
  } >&2
}

# Makes `cargo` callable where rustup keeps it but the PATH does not name it.
cargo_path() {
  command -v cargo > /dev/null || { [ -x "$HOME/.cargo/bin/cargo" ] && PATH=$HOME/.cargo/bin:$PATH; } || true
  export PATH
}
