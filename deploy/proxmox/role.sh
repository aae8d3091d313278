#!/bin/bash
# Makes the role, user, pool and token that proxmox-lxcri works with, and writes the token's secret into its file.
# Run as root on a node, once for each node of the cluster that runs proxmox-lxcri:
#
#   role.sh [--pool k8s] [--storage local-zfs]... [--bridge vmbr0]... [--file /etc/proxmox-lxcri/token]
#
# A vnet of an SDN zone is --bridge ZONE/VNET. What is there already is kept; an old token of this node is replaced. docs/proxmox.md says what each privilege is for.
set -euo pipefail
role=lxcri user=lxcri@pve pool=k8s file=/etc/proxmox-lxcri/token
storages=() bridges=()
while [ $# -gt 0 ]; do
  case $1 in
  --pool) pool=${2:?--pool needs a value}; shift 2 ;;
  --storage) storages+=("${2:?--storage needs a value}"); shift 2 ;;
  --bridge) bridges+=("${2:?--bridge needs a value}"); shift 2 ;;
  --file) file=${2:?--file needs a value}; shift 2 ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d' >&2; exit 2 ;;
  esac
done
[ ${#storages[@]} -gt 0 ] || storages=(local)
[ ${#bridges[@]} -gt 0 ] || bridges=(vmbr0)
[ "$(id -u)" = 0 ] || { echo "role.sh: needs root" >&2; exit 1; }
command -v pveum > /dev/null || { echo "role.sh: no pveum here: run it on a Proxmox node" >&2; exit 1; }

# has COMMAND WORD...: whether the JSON list that it prints holds the word as a value
has() { local word=$1; shift; "$@" --output-format json | grep -qF "\"$word\""; }

# Proxmox VE 8 has one privilege for QEMU's monitor and the guest agent, 9 has those of the agent apart.
agent=VM.GuestAgent.Unrestricted
case $(pveum role list --output-format json) in
*$agent*) ;;
*) agent=VM.Monitor ;;
esac
privileges="Datastore.AllocateSpace Datastore.AllocateTemplate Datastore.Audit Pool.Audit SDN.Use VM.Allocate VM.Audit VM.Clone \
VM.Config.CPU VM.Config.Disk VM.Config.HWType VM.Config.Memory VM.Config.Network VM.Config.Options $agent VM.PowerMgmt VM.Snapshot \
VM.Snapshot.Rollback"
node=$(hostname -s)
token=$user!$node

if has "$role" pveum role list; then
  pveum role modify "$role" --privs "$privileges"
else
  pveum role add "$role" --privs "$privileges"
fi
has "$user" pveum user list || pveum user add "$user" --comment "proxmox-lxcri"
has "$pool" pveum pool list || pveum pool add "$pool" --comment "Pods"
if has "$node" pveum user token list "$user"; then pveum user token remove "$user" "$node"; fi

# The secret goes from the answer into the file and nowhere else.
mkdir -p "$(dirname "$file")"
umask 077
answer=$(pveum user token add "$user" "$node" --privsep 1 --output-format json)
printf '%s\n' "$answer" | sed -n 's/.*"value" *: *"\([^"]*\)".*/\1/p' > "$file.new"
[ -s "$file.new" ] || { rm -f "$file.new"; echo "role.sh: the answer holds no secret" >&2; exit 1; }
mv "$file.new" "$file"

# A token with privilege separation has what both it and its user have.
paths=("/pool/$pool")
for s in "${storages[@]}"; do paths+=("/storage/$s"); done
for b in "${bridges[@]}"; do
  case $b in */*) paths+=("/sdn/zones/$b") ;; *) paths+=("/sdn/zones/localnetwork/$b") ;; esac
done
for path in "${paths[@]}"; do
  pveum acl modify "$path" --users "$user" --roles "$role"
  pveum acl modify "$path" --tokens "$token" --roles "$role"
done
echo "token_id = \"$token\""
echo "token_file = \"$file\""
