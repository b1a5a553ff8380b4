#!/bin/bash
# Build SLURM's `scrontab` for the tests: Debian ships the server's half of it, but no client. As root, about a minute:
#
#     bash tests/slurm/build_scrontab.sh [FOLDER]
#
# puts it into FOLDER, /usr/local/bin by default. It is built from Debian's own source of the installed version.
set -euo pipefail
target=${1:-/usr/local/bin}
version=$(dpkg-query -W -f '${Version}' slurm-client)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get install -y -q --no-install-recommends gcc make dpkg-dev libc6-dev libmunge-dev > /dev/null
mkdir lists
cat > sources.list <<'LIST'
deb-src http://deb.debian.org/debian bookworm main
deb-src http://deb.debian.org/debian-security bookworm-security main
LIST
own=(-o "Dir::Etc::sourcelist=$folder/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::Lists=$folder/lists")
apt-get "${own[@]}" -q update > /dev/null
apt-get "${own[@]}" -q source "slurm-wlm=$version" > /dev/null
cd slurm-wlm-*/
./configure --without-rpath --disable-dependency-tracking > /dev/null
cd src/scrontab
for text in default_crontab usage; do
  ld -r -o "$text.bino" -z noexecstack --format=binary "$text.txt"
  objcopy --rename-section .data=.rodata,alloc,load,readonly,data,contents "$text.bino"
done
library=$(dirname "$(find /usr/lib -name libslurmfull.so | head -1)")
gcc -O1 -I../.. -I. -DHAVE_CONFIG_H env.c opt.c parse.c scrontab.c ./*.bino -o "$target/scrontab" \
  -L"$library" -lslurmfull -Wl,-rpath,"$library" -ldl -lpthread
echo "$target/scrontab"
