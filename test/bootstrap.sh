#!/bin/sh
# From a bare clone to a running program: installs what is missing (and says so), builds what is out of date, then
# runs the demo, the tests, the lab or the benchmarks.
# usage: sh test/bootstrap.sh start|test|lab|bench [ARGUMENTS]
set -eu
cd "$(dirname "$0")/.."

# What the lab needs of Debian: its hardware, the guests' user space, a compiler for the kernel module and the
# layout probe (gcc-12 is what the kernels' headers call for), and the tools that take kernel packages apart.
packages="qemu-system-x86 busybox-static fio nvme-cli systemd-boot-efi kmod util-linux bsdutils xz-utils zstd
  acpica-tools e2fsprogs fdisk binutils spin gcc gcc-12 libc6-dev linux-libc-dev make pahole libelf1 sparse"

log="${XDG_CACHE_HOME:-$HOME/.cache}/pvdma/bootstrap.log"
mkdir -p "$(dirname "$log")"

say() { echo "bootstrap: $*" >&2; }
die() { say "$*"; exit 1; }

# Runs a command with its output in the log, which is shown when it fails.
quietly() {
  echo "+ $*" >>"$log"
  "$@" >>"$log" 2>&1 </dev/null || { status=$?; tail -n 40 "$log" >&2; die "failed ($status): $* (log: $log)"; }
}

mode="${1:-}"
case "$mode" in
  start | test | lab | bench) shift ;;
  *) die "usage: sh test/bootstrap.sh start|test|lab|bench [ARGUMENTS]" ;;
esac
: >"$log"

command -v node >/dev/null && command -v npm >/dev/null || die "Node.js 20.6 or later and npm are needed: https://nodejs.org"
node -e 'const [major, minor] = process.versions.node.split("."); process.exit(+(major * 100 + +minor < 2006))' ||
  die "Node.js $(node -v) is too old: 20.6 or later is needed"

command -v dpkg-query >/dev/null || die "the lab is made of Debian packages and this is no Debian; it needs: $(echo $packages)"
missing=""
for package in $packages; do
  status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing="$missing $package"
done
if [ -n "$missing" ]; then
  install="apt-get install -y --no-install-recommends$missing"
  [ "$(id -u)" = 0 ] || die "Debian packages are missing; run: sudo apt-get update && sudo $install"
  say "installing Debian packages:$missing"
  export DEBIAN_FRONTEND=noninteractive
  quietly apt-get -o DPkg::Lock::Timeout=300 update
  # shellcheck disable=SC2086 # a list of words
  quietly apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends $missing
fi

# One at a time from here: a second run in the same tree waits until the first has built.
exec 9<package.json
flock 9
if [ ! -e node_modules/.package-lock.json ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
  say "installing npm packages (npm ci)"
  echo "+ npm ci" >>"$log"
  if ! npm ci >>"$log" 2>&1 </dev/null; then
    # npm ci insists on optional packages of all platforms, which a lock file made with a partial registry lacks.
    # This takes what the lock file has, at its versions and hashes, and leaves the file as it is.
    grep -q '^npm error Missing: .* from lock file' "$log" || { tail -n 40 "$log" >&2; die "failed: npm ci (log: $log)"; }
    say "npm ci: the lock file lacks some platforms' optional packages; using npm install --no-save"
    quietly npm install --no-save
  fi
  touch node_modules/.package-lock.json
fi
# Directories count, too: a file that was removed must not live on in build/.
sources="vmm hypercalls iommu-emul test package.json tsconfig.json rollup.config.js"
# shellcheck disable=SC2086
if [ ! -e build/.complete ] || [ -n "$(find $sources -newer build/.complete \( -name '*.ts' -o -name '*.js*' -o -type d \) | head -n 1)" ]; then
  say "building (npm run build)"
  rm -rf build dist
  mkdir build
  touch build/.started
  quietly npm run build
  mv build/.started build/.complete
fi
exec 9<&-

case "$mode" in
  start) exec node build/test/lab/start.js "$@" ;;
  lab) exec node build/test/lab/cli.js "$@" ;;
  bench) exec node build/test/bench/run.js "$@" ;;
  test)
    node build/test/lab/kernels.js
    exec node build/test/run.js "$@"
    ;;
esac
