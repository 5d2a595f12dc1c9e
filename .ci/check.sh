#!/usr/bin/env bash
# Every check that runs nothing: the same list as .pre-commit-config.yaml.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin

failed=0
run() {
	printf '%-14s' "$1"
	shift
	if output=$("$@" 2>&1); then
		echo ok
	else
		echo FAILED
		printf '%s\n' "$output"
		failed=1
	fi
}

mapfile -t c_files < <(git ls-files 'bpf/*.c' 'bpf/*.h' 'tests/*.c' 'tests/*.h')
run ruff "$bin/ruff" check .
run format "$bin/ruff" format --check .
run mypy "$bin/mypy" --strict
run layers "$bin/lint-imports"
run clang-format "$bin/clang-format" --dry-run --Werror "${c_files[@]}"
run codespell "$bin/codespell"
exit "$failed"
