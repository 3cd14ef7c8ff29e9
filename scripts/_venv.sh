# Sourced by the scripts beside it, from the repository's root: makes and mends virtual environments.

: "${PYTHON:=python3}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

die() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# check_python PYTHON: whether it runs and is new enough; says in one line what is wrong.
check_python() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    die "'$1' does not run; jkv needs Python 3.11 or newer (PYTHON=/path/to/python3 names another)"
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "'$1' is Python $version; jkv needs 3.11 or newer (PYTHON=/path/to/python3 names another)"
}

# fingerprint PYTHON [REQUIREMENT...]: changes with whatever would change what is installed, and where.
fingerprint() {
  local python=$1
  shift
  "$python" - "$PWD" "$@" <<'PY'
import hashlib, pathlib, sys
made_of = [sys.version, *sys.argv[1:], pathlib.Path("pyproject.toml").read_text()]
print(hashlib.sha256("\0".join(made_of).encode()).hexdigest())
PY
}

# whole VENV: whether it works and its last installation was not interrupted.
whole() {
  [ ! -e "$1/unfinished" ] && "$1/bin/python" -m pip --version >/dev/null 2>&1 &&
    [ "$("$1/bin/python" -c 'import sys; print(sys.version)')" = \
      "$("$PYTHON" -c 'import sys; print(sys.version)')" ]
}

pip_install() {
  local venv=$1
  shift
  "$venv/bin/python" -m pip install --quiet --quiet "$@" </dev/null ||
    die "the installation into $venv failed; the same command tries again from the start"
}

# make_venv VENV EXTRAS [REQUIREMENT...]: VENV with the project, editable, and its extras ("" for
# none). Requirements are installed first, and the project must leave them as they are. Nothing is
# asked of the network where all is in place.
make_venv() {
  local venv=$1 extras=$2 mark log
  shift 2
  check_python "$PYTHON"
  mark=$(fingerprint "$PYTHON" "$@")
  if whole "$venv"; then
    [ "$(cat "$venv/installed-${extras:-base}" 2>/dev/null)" = "$mark" ] && return
  else
    rm -rf "$venv"
    log=$("$PYTHON" -m venv "$venv" 2>&1) ||
      die "'$PYTHON -m venv' failed (Debian and Ubuntu: apt install python3-venv): ${log##*$'\n'}"
  fi
  echo "Installing jkv${extras:+ with [$extras]} into $venv ..." >&2
  touch "$venv/unfinished"
  printf '%s\n' "$@" >"$venv/requirements.txt"
  if [ $# -gt 0 ]; then
    pip_install "$venv" --requirement "$venv/requirements.txt"
    pip_install "$venv" --editable . # as users do: into what they have, without a constraint
    "$venv/bin/python" -m pip install --quiet --no-index --requirement "$venv/requirements.txt" ||
      die "installing jkv into $venv changed the versions of: $*"
  fi
  # The extras may have other wishes.
  pip_install "$venv" --constraint "$venv/requirements.txt" --editable ".${extras:+[$extras]}"
  # Whatever the extras, the project itself is in place too.
  echo "$mark" | tee "$venv/installed-base" >"$venv/installed-${extras:-base}"
  rm "$venv/unfinished"
}
