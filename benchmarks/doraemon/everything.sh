#!/bin/bash
# Every benchmark of docs/doraemon.md, the most important first.
#
#   benchmarks/doraemon/everything.sh           what there is, with the minutes expected on one core that nothing else uses
#   benchmarks/doraemon/everything.sh 1 2 7     these parts, one after the other, in any order
#   benchmarks/doraemon/everything.sh all
#
# How long each part took is printed after it, and of all parts at the end, beside the minutes that were expected.
# TEXTS is the folder of the texts, PY the Python that has the packages. Each processor's rows are in a folder of its own;
# rows measured with another Python or NumPy are dropped from a file by the first row that is measured with this one.
# The page needs of each file at least: batches 4M and 64M uniform, changes at 4M and 64M. "page" makes it of what is there.
REPO=$(cd "$(dirname "$0")/../.." && pwd)
PY=${PY:-$REPO/.venv/bin/python}
TEXT=$(ls "${TEXTS:-$REPO/../shared/data/text}"/wikipedia_en_2014.00*.txt) || exit 1
export PYTHONPATH=$REPO/doraemon OMP_NUM_THREADS=1
cd "$REPO" || exit 1

PARTS=(
  # minutes | command after benchmarks/doraemon/
  "3|lookups.py batches --n 4000000 --keys uniform lognormal --rounds 9"
  "2|lookups.py single --n 4000000 --keys uniform"
  "4|single.py ycsb --rounds 9"
  "2|single.py inserts --rounds 9"
  "4|lookups.py batches --n 4000000 --keys normal osm facebook --rounds 7"
  "8|lookups.py batches --n 64000000 --keys uniform --rounds 5"
  "2|changes.py building --n 1000000 4000000 16000000"
  "3|changes.py building --n 64000000 --rounds 3"
  "3|changes.py adapting --n 1000000 4000000 16000000"
  "5|changes.py adapting --n 64000000 --rounds 5"
  "1|changes.py writing --n 4000000"
  "8|changes.py writing --n 1000000 16000000 64000000 --rounds 3"
  "1|lookups.py moving --n 4000000 --keys uniform"
  "5|skew.py batches --n 4000000"
  "15|skew.py batches --n 64000000"
  "6|lookups.py batches --n 4000000 --keys cascade words offsets --rounds 5 --text $(echo $TEXT)"
  "4|lookups.py batches --n 1000000 --keys uniform --rounds 5"
  "6|lookups.py batches --n 16000000 --keys uniform --rounds 5"
  "4|skew.py single --n 4000000"
  "5|skew.py moving --n 4000000"
  "10|skew.py single --n 64000000"
  "15|skew.py moving --n 64000000"
  "5|lookups.py batches --n 1000000 --keys lognormal osm facebook cascade words offsets --queries uniform 90/10 --rounds 5 --text $(echo $TEXT)"
  "15|lookups.py batches --n 16000000 --keys lognormal osm facebook cascade words offsets --queries uniform 90/10 --rounds 5 --text $(echo $TEXT)"
  "15|lookups.py batches --n 64000000 --keys lognormal osm offsets --queries uniform 90/10 --rounds 5 --text $(echo $TEXT)"
  "3|lookups.py single --n 4000000 --keys osm facebook --queries uniform zipf"
  "2|lookups.py single --n 1000000 --keys uniform"
  "2|lookups.py single --n 4000000 --keys offsets --queries uniform 90/10 --text $(echo $TEXT)"
  "8|lookups.py moving --n 4000000 --keys cascade words --rounds 5 --text $(echo $TEXT)"
  "15|lookups.py moving --n 64000000 --keys uniform --rounds 5"
  "15|paper.py latency"
  "8|paper.py retraining --keys uniform"
  "8|texts.py --text $(echo $TEXT)"
  "7|threads.py"
)
# threads.py needs both cores, on which nothing else may run; all others run on core 0.

if [ $# -eq 0 ]; then
  for number in "${!PARTS[@]}"; do printf '%2d  %s\n' $((number + 1)) "${PARTS[$number]//$(echo $TEXT)/...}"; done
  exit
fi
(cd doraemon && "$PY" setup.py -q build_ext --inplace) || exit 1
"$PY" -c "import doraemon, sys; print(doraemon.__file__); sys.exit(not doraemon.__file__.startswith('$REPO/'))" || exit 1
[ "$1" = page ] && exec taskset -c 0 "$PY" benchmarks/doraemon/results.py
[ "$1" = all ] && set -- $(seq ${#PARTS[@]})
took=()
for number in "$@"; do
  part=${PARTS[$((number - 1))]}
  cores=0
  begin=$SECONDS
  [[ $part == *"|threads.py"* ]] && cores=0,1
  echo "== $number: ${part//$(echo $TEXT)/...} ($(date +%T))"
  taskset -c $cores "$PY" benchmarks/doraemon/${part#*|} || echo "part $number failed"
  seconds=$((SECONDS - begin))
  took+=("$(printf '%2d  %3d:%02d of %2d min  %s' $number $((seconds / 60)) $((seconds % 60)) "${part%%|*}" "${part#*|}")")
  echo "== $number took $((seconds / 60)) min $((seconds % 60)) s"
done
echo "== all in $((SECONDS / 60)) min, until $(date +%T)"
printf '%s\n' "${took[@]//$(echo $TEXT)/...}"
