# shellcheck shell=bash
# Common parts of the scripts that make what the tests need. Sourced, never run.
#
# Everything made here is kept in one cache, each thing in a folder named by the hash of what it is made from. A folder
# appears by rename when it is whole, so that an interrupted making leaves only a `.tmp-` folder, which the next one removes.
LXCRI_CACHE=${LXCRI_CACHE:-/var/cache/proxmox-lxcri-tests}
export LXCRI_CACHE

# shellcheck source=../../scripts/lib.sh
. "${BASH_SOURCE[0]%/*}/../../scripts/lib.sh"

hash_text() { sha256sum | cut -c1-16; }

# cached NAME KEY FUNCTION: prints the folder NAME-KEY, made by FUNCTION TEMPORARY_FOLDER if it is not there.
cached() {
  local name=$1 key=$2 make=$3 folder=$LXCRI_CACHE/$1-$2 t=$SECONDS
  mkdir -p "$LXCRI_CACHE"
  exec 8> "$LXCRI_CACHE/.lock-$name"
  flock 8
  if [ ! -d "$folder" ]; then
    rm -rf --one-file-system "$LXCRI_CACHE/.tmp-$name"-*
    local tmp=$LXCRI_CACHE/.tmp-$name-$$
    mkdir "$tmp"
    say "making $folder"
    # The lock is not handed on: a daemon that a step leaves behind must not hold it.
    # In the background, because `set -e` does not work in a condition.
    local status=0
    ( set -e; "$make" "$tmp" ) 8>&- < /dev/null > "$LXCRI_CACHE/$name.log" 2>&1 &
    wait $! || status=$?
    if [ $status != 0 ]; then
      tail -n 40 "$LXCRI_CACHE/$name.log" >&2
      die "could not make $name; the log: $LXCRI_CACHE/$name.log"
    fi
    mv "$tmp" "$folder"
    say "made in $((SECONDS - t)) s, $(du -sh "$folder" | cut -f1)"
  fi
  exec 8>&-
  echo "$folder"
}

# Debian mirror, security mirror and keyring as apt on this machine has them.
debian_mirror() {
  local targets kept=$LXCRI_CACHE/apt-targets
  # apt takes a second to tell, and every test asks several times: the answer is kept until apt's sources change.
  if [ -s "$kept" ] && [ -z "$(find /etc/apt /var/lib/apt/lists -newer "$kept" -print -quit 2>&1)" ]; then
    targets=$(cat "$kept")
  else
    targets=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2> /dev/null | sort -u || true)
    mkdir -p "$LXCRI_CACHE"
    [ -z "$targets" ] || { echo "$targets" > "$kept.$$" && mv "$kept.$$" "$kept"; }
  fi
  mirror=$(grep -m1 -E '/debian/?$' <<< "$targets") || die "no Debian mirror in apt's sources"
  security=$(grep -m1 -E '/debian-security/?$' <<< "$targets" || echo "${mirror%/debian*}/debian-security")
  keyring=/usr/share/keyrings/debian-archive-keyring.gpg
}

# Sets `go` to a Go that can build the module: the one that is there, or Debian's. A Go before 1.21 can't fetch a newer
# toolchain by itself, so the toolchain's module is fetched and used by path.
find_go() {
  command -v go > /dev/null || need golang-go:go
  go=$(command -v go)
  [[ "$("$go" env GOVERSION)" =~ ^go1\.(1[0-9]|20)(\.|$) ]] || return 0
  local module=golang.org/toolchain@v0.0.1-go1.25.0.linux-amd64 folder
  (cd / && GOFLAGS=-mod=mod "$go" mod download "$module")
  folder=$("$go" env GOMODCACHE)/$module
  chmod -R u+w "$folder"
  chmod +x "$folder"/bin/* "$folder"/pkg/tool/*/*
  go=$folder/bin/go
}
