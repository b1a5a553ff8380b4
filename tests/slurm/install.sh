#!/usr/bin/env bash
# Installs the daemons that tests/slurm starts (Debian or Ubuntu, as root). Does nothing where they are there.
set -euo pipefail
packages=(slurmctld slurmd slurm-client slurmdbd munge mariadb-server iproute2)
missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null)" = "install ok installed" ] || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "The test cluster needs ${missing[*]}: install them as root, on Debian or Ubuntu with apt-get." >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# The services must not start: each test cluster brings daemons of its own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null ||
  { apt-get update -q && apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null; }
